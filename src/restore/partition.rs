//! Takes a partition back, from the journal alone. It may run twice, and without QEMU or its unit: then
//! only the levels above, and the drop-in, are left.
//!
//! ```text
//!   member ─▶ exclusive: vcpus, unit, slices ─▶ threads to the unit ─▶ groups go ─▶ -cpuset ─▶ unit's cpus
//!     └───────────────────── take_down, under the leases' lock ─────────────────────┘
//!   AllowedCPUs ─▶ drop-ins ─▶ reload                                             hand_back
//! ```
//!
//! Slices keep what other VMs and other people have in them.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use crate::apply::partition::{Refused, set_cpus, write};
use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup;
use crate::error::chain;
use crate::ids::Tid;
use crate::journal::PartitionUndo;
use crate::plan::partition::{Group, Share, level_target, levels};
use crate::sysroot::SysRoot;
use crate::systemd::{SystemdError, Units};

/// How often it looks again for threads born meanwhile.
const LOOKS_MAX: usize = 8;

/// What came of it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PartitionRestore {
    /// The cgroup whose partition it was, where there was one.
    pub taken_back: Option<String>,
    /// What could not be put back.
    pub refused: Vec<Refused>,
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
    // What went with its unit meanwhile needs no undo.
    if cgroups.read(&format!("{unit}/cgroup.procs")).is_err() {
        refused.retain(|refused| !refused.path.starts_with(unit));
    }
    refused
}

fn shrink(cgroups: &dyn Cgroups, group: &str, to: CpuSet) -> Result<(), Refused> {
    let found = cgroup::set(cgroups, group, "cpuset.cpus.exclusive");
    if found == to {
        return Ok(());
    }
    set_cpus(cgroups, &format!("{group}/cpuset.cpus.exclusive"), &to)
}

/// Moves a group's threads to the unit and removes it; a thread may be born in it meanwhile.
fn dissolve(cgroups: &dyn Cgroups, unit: &str, group: &str) -> Result<(), Refused> {
    let mut stuck: BTreeSet<Tid> = BTreeSet::new();
    let mut reason = None;
    for _ in 0..LOOKS_MAX {
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

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV))
}

/// Gives the unit back to systemd as it was. One reload, where the unit is still there.
pub fn hand_back(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    units: &dyn Units,
    undo: &PartitionUndo,
) -> Vec<Refused> {
    let mut refused = Vec::new();
    let unit = undo.unit.as_str();
    let said = |what: &str, error: SystemdError| Refused::new(unit, what, chain(&error));
    let mut is_there = true;
    match units.state(unit) {
        Ok(state) => {
            if undo.allowed_set.is_some_and(|ours| ours == state.allowed_cpus) {
                match units.set_allowed_cpus(unit, &CpuSet::EMPTY) {
                    Ok(()) => {}
                    // Its last process has ended just now.
                    Err(SystemdError::NoSuchUnit { .. }) => is_there = false,
                    Err(error) => refused.push(said("AllowedCPUs=", error)),
                }
            }
        }
        Err(SystemdError::NoSuchUnit { .. }) => is_there = false,
        Err(error) => refused.push(said("as it was", error)),
    }
    let mut changed = false;
    let mut gone = |path: &str| match remove(root, path) {
        Ok(removed) => changed |= removed,
        Err(error) => refused.push(Refused::new(format!("/{path}"), "gone", error)),
    };
    if let Some(drop_in) = &undo.drop_in {
        gone(drop_in);
    }
    // systemd leaves its own drop-in behind, with empty assignments.
    let leftover = format!("run/systemd/transient/{unit}.d/50-AllowedCPUs.conf");
    let is_leftover = |text: &str| {
        text.lines()
            .map(str::trim)
            .filter(|line| line.starts_with("AllowedCPUs="))
            .all(|line| line == "AllowedCPUs=")
    };
    if undo.allowed_set.is_some() && root.read(&leftover).is_ok_and(|text| is_leftover(&text)) {
        gone(&leftover);
    }
    if changed && is_there {
        match units.reload() {
            Ok(()) => {}
            Err(error) => refused.push(said("reloaded", error)),
        }
    }
    // Where the controller stays for a neighbour's sake, so does what was written by it.
    let found = cgroup::set(cgroups, &undo.cgroup, "cpuset.cpus");
    if undo.allowed_set == Some(found)
        && found != undo.cpus_before
        && let Err(error) =
            set_cpus(cgroups, &format!("{}/cpuset.cpus", undo.cgroup), &undo.cpus_before)
    {
        refused.push(error);
    }
    refused
}

/// Removes a file and its folder, where that is empty then. Whether it was there.
fn remove(root: &SysRoot, relative: &str) -> io::Result<bool> {
    let path = root.path(relative).map_err(|error| error.source)?;
    let removed = match fs::remove_file(&path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if removed && let Some(folder) = path.parent() {
        // Somebody else may have something in it; then it stays.
        let _ = fs::remove_dir(folder);
    }
    Ok(removed)
}
