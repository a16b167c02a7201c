//! Takes a partition back, from the journal alone. It may run twice, and without QEMU or its unit: then
//! only the levels above, and the drop-in, are left.
//!
//! ```text
//!   VM gone: systemd goes first                                           let_systemd_prune
//!   member ─▶ exclusive: vcpus, unit, slices ─▶ threads to the unit ─▶ groups go ─▶ -cpuset
//!     └────────────── take_down, under the leases' lock ──────────────┘
//!   drop-ins ─▶ reload ─▶ systemd takes the controller back               hand_back
//! ```
//!
//! Slices keep what other VMs and other people have in them.

use std::collections::BTreeSet;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup::{self, is_gone};
use crate::discover::tasks::LOOKS_MAX;
use crate::error::chain;
use crate::ids::Tid;
use crate::journal::PartitionUndo;
use crate::knobs::host::slices::apply::{files, lifts, remove};
use crate::knobs::partition::apply::{Refused, set_cpus, write};
use crate::knobs::partition::drop_ins::{drop_in_new, is_our_drop_in};
use crate::knobs::partition::plan::level_target;
use crate::services;
use crate::site::{Group, Share, levels};
use crate::sysroot::SysRoot;
use crate::systemd::{SystemdError, UnitState, Units};

/// How often it looks again for threads that are about to end: those can no longer be moved, and the group
/// stays until they have.
const ENDING_LOOKS_MAX: usize = 100;
/// Between two of these.
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// How long systemd has to take down the unit of a VM that has ended. It takes milliseconds.
const PRUNING_LIMIT: Duration = Duration::from_secs(2);
/// Between two checks whether it has.
const PRUNING_PAUSE: Duration = Duration::from_millis(10);

/// What came of it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PartitionRestore {
    /// The cgroup whose partition it was, where there was one.
    pub taken_back: Option<String>,
    /// What could not be restored.
    pub refused: Vec<Refused>,
    /// What another program has changed since and is left so, in sentences.
    pub foreign: Vec<String>,
}

/// Lets systemd take down the unit of a VM that has ended, where it is about to. It removes the groups in it
/// first, gives up where one of them is removed meanwhile, and then leaves the unit's own for good
/// (`cg_trim`, `src/basic/cgroup-util.c`); no other program can remove that one safely, since the VM may be
/// started anew at any moment.
pub fn let_systemd_prune(cgroups: &dyn Cgroups, undo: &PartitionUndo) {
    wait_for_pruning(cgroups, &undo.cgroup, PRUNING_LIMIT);
}

/// Whether it is gone within the limit, or lived in again.
fn wait_for_pruning(cgroups: &dyn Cgroups, unit: &str, limit: Duration) -> bool {
    let events = format!("{unit}/cgroup.events");
    let started = Instant::now();
    while cgroups.read(&events).is_ok_and(|now| now.lines().any(|line| line == "populated 0")) {
        if started.elapsed() >= limit {
            return false;
        }
        thread::sleep(PRUNING_PAUSE);
    }
    true
}

/// Takes down what is in the cgroup tree. `shares` are the other VMs' partitions.
pub fn take_down(cgroups: &dyn Cgroups, undo: &PartitionUndo, shares: &[Share]) -> Vec<Refused> {
    let mut refused = Vec::new();
    let mut keep = |done: Result<(), Refused>| refused.extend(done.err());
    let unit = undo.cgroup.as_str();
    let vcpus = Group::Vcpus.below(unit);
    let partition = format!("{vcpus}/cpuset.cpus.partition");
    if cgroups.read(&partition).is_ok_and(|now| now != "member") {
        keep(write(cgroups, &partition, "member", |now| now == "member"));
    }
    keep(shrink(cgroups, &vcpus, CpuSet::EMPTY));
    for level in levels(unit).into_iter().rev() {
        let found = cgroup::set(cgroups, level, "cpuset.cpus.exclusive");
        keep(shrink(cgroups, level, level_target(level, found, undo.cpus, CpuSet::EMPTY, shares)));
    }
    for group in Group::ALL {
        keep(dissolve(cgroups, unit, &group.below(unit)));
    }
    let control = format!("{unit}/cgroup.subtree_control");
    let has_controller = |now: &str| cgroup::has_word(now, "cpuset");
    if !undo.had_controller && cgroups.read(&control).is_ok_and(|now| has_controller(&now)) {
        keep(write(cgroups, &control, "-cpuset", |now| !has_controller(now)));
    }
    // What went with its unit meanwhile needs no undo: systemd takes it down from the leaf up, beside us.
    refused.retain(|refused| match cgroups.read(&refused.path) {
        Err(error) => !is_gone(&error),
        Ok(_) => true,
    });
    refused
}

fn shrink(cgroups: &dyn Cgroups, group: &str, to: CpuSet) -> Result<(), Refused> {
    let found = cgroup::set(cgroups, group, "cpuset.cpus.exclusive");
    if found == to {
        return Ok(());
    }
    set_cpus(cgroups, &format!("{group}/cpuset.cpus.exclusive"), &to)
}

/// Moves a group's threads to the unit and removes it; a thread may be created in it meanwhile.
fn dissolve(cgroups: &dyn Cgroups, unit: &str, group: &str) -> Result<(), Refused> {
    let mut stuck: BTreeSet<Tid> = BTreeSet::new();
    let mut reason = None;
    let (mut looks, mut ending_looks) = (0, 0);
    while looks < LOOKS_MAX && ending_looks < ENDING_LOOKS_MAX {
        let threads = match cgroup::threads(cgroups, group) {
            Ok(threads) => threads,
            // It is gone, or never was a threaded one.
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => {
                reason = Some(error);
                BTreeSet::new()
            }
        };
        for tid in threads {
            match cgroups.write(&format!("{unit}/cgroup.threads"), &tid.to_string()) {
                Err(error) if error.raw_os_error() != Some(nix::libc::ESRCH) => {
                    stuck.insert(tid);
                    reason = Some(error);
                }
                _ => {}
            }
        }
        match cgroups.remove(group) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => {
                if stuck.is_empty() && error.kind() == io::ErrorKind::ResourceBusy {
                    ending_looks += 1;
                    thread::sleep(ENDING_PAUSE);
                } else {
                    looks += 1;
                }
                reason.get_or_insert(error);
            }
        }
    }
    let reason = reason.map_or_else(String::new, |error| error.to_string());
    let who = match stuck.first() {
        Some(tid) => format!("{reason} (thread {tid})"),
        None => reason,
    };
    Err(Refused::new(group, "gone", who))
}

/// Gives the unit back to systemd as it was. One reload, where the unit is still there.
///
/// Its `cpuset.cpus` says all CPUs for as long as systemd keeps the controller for another unit's sake:
/// the kernel does not allow to empty it while there are threads (`ENOSPC`), and it limits nothing.
pub fn hand_back(root: &SysRoot, units: &dyn Units, undo: &PartitionUndo) -> PartitionRestore {
    let PartitionRestore { mut refused, mut foreign, .. } = PartitionRestore::default();
    let unit = undo.unit.as_str();
    let said = |what: &str, error: SystemdError| Refused::new(unit, what, chain(&error));
    let (state, is_there) = match units.state(unit) {
        // One without a cgroup is about to be forgotten; it reads its files anew when it starts.
        Ok(state) => {
            let is_there = !state.control_group.is_empty();
            (state, is_there)
        }
        Err(SystemdError::NoSuchUnit { .. }) => (UnitState::default(), false),
        Err(error) => {
            refused.push(said("as it was", error));
            (UnitState::default(), false)
        }
    };
    // Killed between its text and its name, the drop-in is still under the other one.
    let mut paths: Vec<String> = undo.drop_in.iter().map(|path| drop_in_new(path)).collect();
    if let Some(path) = &undo.drop_in {
        match root.read(path) {
            Ok(text) if !is_our_drop_in(&text) => {
                foreign.push(format!("/{path} was changed externally and is left as it is"));
            }
            _ => paths.push(path.clone()),
        }
    }
    if let Some(ours) = undo.allowed_set {
        let is_ours = |text: &str| state.allowed_cpus == ours || lifts(text);
        if !state.allowed_cpus.is_empty() && state.allowed_cpus != ours {
            foreign.push(format!(
                "AllowedCPUs of {unit} was changed externally to {} and is left as it is",
                state.allowed_cpus
            ));
        }
        let written = files(unit).into_iter();
        paths.extend(written.filter(|path| root.read(path).is_ok_and(|text| is_ours(&text))));
    }
    let mut changed = false;
    for path in &paths {
        match remove(root, path) {
            Ok(removed) => changed |= removed,
            Err(error) => refused.push(Refused::new(format!("/{path}"), "gone", error)),
        }
    }
    // Removed and not reloaded: that is where the one before was killed.
    let is_known = undo.drop_in.is_some() && state.delegated.iter().any(|name| name == "cpuset");
    if is_there && (changed || is_known) {
        match services::reload(units) {
            Ok(()) => {}
            Err(error) => refused.push(said("reloaded", error)),
        }
    }
    let above = undo.cgroup.rsplit_once('/').map_or("", |(above, _)| above);
    let slice = above.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("-.slice");
    match units.realize(slice) {
        // It has gone with its last unit.
        Ok(()) | Err(SystemdError::NoSuchUnit { .. }) => {}
        Err(error) => tracing::debug!("the cpuset controller stays for a while: {}", chain(&error)),
    }
    PartitionRestore { taken_back: None, refused, foreign }
}

#[cfg(test)]
mod tests;
