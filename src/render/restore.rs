//! What a restore has come to, in sentences.

use crate::ids::VmName;
use crate::restore::partition::PartitionRestore;
use crate::restore::{Nothing, RestoreReport};

/// One line per thing worth saying.
#[must_use]
pub fn restore_lines(vm: &VmName, report: &RestoreReport) -> Vec<String> {
    let mut lines = partition_lines(vm, &report.partition);
    lines.extend(thread_lines(vm, report));
    lines
}

fn partition_lines(vm: &VmName, partition: &PartitionRestore) -> Vec<String> {
    let taken = partition.taken_back.iter();
    let taken = taken.map(|cgroup| format!("VM {vm}: its partition in {cgroup} is taken back"));
    let refused = partition.refused.iter().map(|refused| format!("VM {vm}: {refused}"));
    taken.chain(refused).collect()
}

fn thread_lines(vm: &VmName, report: &RestoreReport) -> Vec<String> {
    let mut lines = match report.nothing {
        Some(Nothing::NeverAttached) => {
            return vec![format!("VM {vm}: nothing to put back, it is not attached")];
        }
        Some(Nothing::OtherBoot) => {
            return vec![format!("VM {vm}: nothing to put back, it was attached before a reboot")];
        }
        Some(Nothing::ProcessGone) => {
            return vec![format!("VM {vm}: nothing to put back, its QEMU has ended")];
        }
        None => vec![format!(
            "VM {vm}: {} threads put back, {} were as before",
            report.put_back, report.unchanged
        )],
    };
    for foreign in &report.foreign {
        lines.push(format!(
            "VM {vm}: thread {} was moved to {} by somebody else and is left there (before qmpin: {})",
            foreign.thread.tid, foreign.found, foreign.before
        ));
    }
    for failed in &report.failed {
        lines.push(format!(
            "VM {vm}: thread {} could not be put back to {}: {}",
            failed.thread.tid, failed.to, failed.error
        ));
    }
    for line in &report.unreadable_lines {
        lines.push(format!("VM {vm}: line {line} of its journal cannot be read and was left out"));
    }
    lines
}
