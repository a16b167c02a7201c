//! What a restore has come to, in sentences.

use std::fmt::Display;

use crate::ids::VmName;
use crate::knobs::affinity::restore::{Nothing, RestoreReport};
use crate::knobs::core_scheduling::restore::CookieRestore;
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::refusal::{host_refusal, left_alone};
use crate::knobs::host::step::HostStep;
use crate::knobs::outcome::{Failed, Foreign};
use crate::knobs::partition::restore::PartitionRestore;
use crate::knobs::priority::restore::PriorityRestore;
use crate::wording::counted;

/// One line per thing worth saying.
#[must_use]
pub fn restore_lines(vm: &VmName, report: &RestoreReport) -> Vec<String> {
    let mut lines = partition_lines(vm, &report.partition);
    lines.extend(priority_lines(vm, &report.priority));
    lines.extend(cookie_lines(vm, &report.cookie));
    lines.extend(thread_lines(vm, report));
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

fn priority_lines(vm: &VmName, priority: &PriorityRestore) -> Vec<String> {
    let mut lines = Vec::new();
    if priority.put_back > 0 {
        let threads = counted(priority.put_back, "thread");
        lines.push(format!("VM {vm}: {threads} scheduled as before"));
    }
    lines.extend(changed(vm, &priority.foreign, &priority.failed));
    lines
}

/// A line for each thread that another program has changed, and for each that could not be restored.
fn changed<V: Display>(vm: &VmName, foreign: &[Foreign<V>], failed: &[Failed<V>]) -> Vec<String> {
    let foreign = foreign.iter().map(|one| format!("VM {vm}: {one}"));
    foreign.chain(failed.iter().map(|one| format!("VM {vm}: {one}"))).collect()
}

fn cookie_lines(vm: &VmName, cookie: &CookieRestore) -> Vec<String> {
    let mut lines = Vec::new();
    if cookie.cleared > 0 {
        let threads = counted(cookie.cleared, "thread");
        lines.push(format!("VM {vm}: the core-scheduling cookie of {threads} is removed"));
    }
    for (thread, found) in &cookie.foreign {
        lines.push(format!(
            "VM {vm}: thread {} has core-scheduling cookie {found} of another program, which is kept",
            thread.tid
        ));
    }
    for (thread, error) in &cookie.failed {
        let tid = thread.tid;
        lines.push(format!(
            "VM {vm}: the core-scheduling cookie of thread {tid} could not be removed: {error}"
        ));
    }
    lines
}

fn thread_lines(vm: &VmName, report: &RestoreReport) -> Vec<String> {
    let nothing = |why| vec![format!("VM {vm}: nothing to restore, {why}")];
    let mut lines = match report.nothing {
        Some(Nothing::NeverAttached) => nothing("it is not attached"),
        Some(Nothing::OtherBoot) => nothing("it was attached before a reboot"),
        Some(Nothing::ProcessGone) => nothing("its QEMU has ended"),
        None => vec![format!(
            "VM {vm}: {} threads restored, {} unchanged",
            report.put_back.len(),
            report.unchanged
        )],
    };
    lines.extend(changed(vm, &report.foreign, &report.failed));
    lines.extend(report.host_left.iter().cloned());
    lines.extend(report.unknown.iter().map(ToString::to_string));
    lines
}

/// What became of places of the host, the many that went well in one line. What is written meanwhile for VMs
/// that stay attached is shown by their own `status`.
#[must_use]
pub fn host_lines(applied: &[HostApplied]) -> Vec<String> {
    let is_back = |one: &&HostApplied| {
        matches!((&one.step, &one.outcome), (HostStep::PutBack { .. }, HostOutcome::Done))
    };
    let put_back = match applied.iter().filter(is_back).count() {
        0 => None,
        number => Some(format!("{} restored", counted(number, "setting"))),
    };
    let own = applied.iter().filter(|one| !matches!(one.step, HostStep::Write { .. }));
    let sentences = own.filter_map(|one| host_refusal(one).or_else(|| left_alone(one)));
    put_back.into_iter().chain(sentences).map(|sentence| format!("host: {sentence}")).collect()
}
