//! What a restore has come to, in sentences.

use std::fmt::Display;

use crate::ids::VmName;
use crate::knobs::affinity::restore::{Nothing, RestoreReport};
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::refusal::{host_refusal, left_alone};
use crate::knobs::host::step::HostStep;
use crate::knobs::outcome::Restored;
use crate::knobs::partition::restore::PartitionRestore;
use crate::wording::counted;

/// One line per thing worth saying.
#[must_use]
pub fn restore_lines(vm: &VmName, report: &RestoreReport) -> Vec<String> {
    let mut lines = partition_lines(vm, &report.partition);
    let RestoreReport { priority, cookie, masks, .. } = report;
    lines.extend(of_threads(vm, priority, "scheduled as before"));
    lines.extend(of_threads(vm, cookie, "without core-scheduling cookie, as before"));
    lines.push(in_all(vm, report));
    lines.extend(masks.lines().map(|line| format!("VM {vm}: {line}")));
    lines.extend(report.host_left.iter().cloned());
    lines.extend(report.unknown.iter().map(ToString::to_string));
    lines.extend(host_lines(&report.host));
    lines
}

fn partition_lines(vm: &VmName, partition: &PartitionRestore) -> Vec<String> {
    let taken = partition.taken_back.iter();
    let taken = taken.map(|cgroup| format!("VM {vm}: its partition in {cgroup} is removed"));
    let refused = partition.refused.iter().map(|refused| format!("VM {vm}: {refused}"));
    let foreign = partition.foreign.iter().map(|one| format!("VM {vm}: {one}"));
    taken.chain(refused).chain(foreign).collect()
}

/// How many threads are as before in one respect, and what is worth saying of single ones.
fn of_threads<V: Display>(vm: &VmName, restored: &Restored<V>, how: &str) -> Vec<String> {
    let number = restored.put_back.len();
    let put_back = (number > 0).then(|| format!("{} {how}", counted(number, "thread")));
    let lines = put_back.into_iter().chain(restored.lines());
    lines.map(|line| format!("VM {vm}: {line}")).collect()
}

/// How many threads are where they were, or why there is nothing to restore.
fn in_all(vm: &VmName, report: &RestoreReport) -> String {
    let nothing = |why| format!("VM {vm}: nothing to restore, {why}");
    match report.nothing {
        Some(Nothing::NeverAttached) => nothing("it is not attached"),
        Some(Nothing::OtherBoot) => nothing("it was attached before a reboot"),
        Some(Nothing::ProcessGone) => nothing("its QEMU has ended"),
        None => {
            let (number, unchanged) = (report.masks.put_back.len(), report.unchanged);
            format!("VM {vm}: {number} threads restored, {unchanged} unchanged")
        }
    }
}

/// What became of places of the host, the many that went well in one line. What is written meanwhile for VMs
/// that stay attached is shown by their own `status`.
#[must_use]
pub fn host_lines(applied: &[HostApplied]) -> Vec<String> {
    let is_back = |one: &&HostApplied| {
        matches!((&one.step, &one.outcome), (HostStep::PutBack { .. }, HostOutcome::Done))
    };
    let number = applied.iter().filter(is_back).count();
    let put_back = (number > 0).then(|| format!("{} restored", counted(number, "setting")));
    let own = applied.iter().filter(|one| !matches!(one.step, HostStep::Write { .. }));
    let sentences = own.filter_map(|one| host_refusal(one).or_else(|| left_alone(one)));
    put_back.into_iter().chain(sentences).map(|sentence| format!("host: {sentence}")).collect()
}
