//! The knob *partition*: makes a unit ready for it, and writes one step of it.
//!
//! Each write is read back. What the kernel refuses is an outcome, and the rest goes on.

use std::{fmt, fs, io};

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup;
use crate::error::chain;
use crate::journal::{PartitionUndo, Record};
use crate::knobs::bench::Bench;
use crate::knobs::execute::{Applied, Step};
use crate::knobs::partition::drop_ins::{drop_in, drop_in_new};
use crate::knobs::partition::plan::steps::PartitionStep;
use crate::sched::is_gone;
use crate::services;
use crate::site::{Group, ISOLATED, Seat, Site};
use crate::state_file::{FolderLink, create_folder, folder_of};
use crate::sysroot::SysRoot;
use crate::systemd::{SystemdError, Units};
use crate::threads::ThreadKey;

/// A write that did not come to what was wanted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Refused {
    /// Which file, or what else.
    pub path: String,
    /// What was to be in it.
    pub value: String,
    /// What the kernel or systemd said.
    pub reason: String,
    /// The thread, where it is about one.
    pub thread: Option<ThreadKey>,
}

impl Refused {
    pub(crate) fn new(path: impl Into<String>, value: &str, reason: impl fmt::Display) -> Refused {
        let value = value.to_owned();
        Refused { path: path.into(), value, reason: reason.to_string(), thread: None }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = if self.value.is_empty() { "nothing" } else { &self.value };
        write!(f, "{} would not become {value}: {}", self.path, self.reason)
    }
}

/// What a unit has now that concerns its undo, and what is needed of systemd.
///
/// # Errors
/// Why no partition can be made in it.
pub fn survey_unit(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    units: &dyn Units,
    site: &Site,
    earlier: Option<&PartitionUndo>,
) -> Result<UnitNeeds, String> {
    let Site { unit, cgroup } = site;
    let state = units.state(unit).map_err(|error| chain(&error))?;
    if state.control_group != format!("/{cgroup}") {
        return Err(format!(
            "systemd has {unit} in {}, and QEMU is in /{cgroup}",
            state.control_group
        ));
    }
    let drop_in = drop_in(unit);
    let is_ours = root.path(&drop_in).is_ok_and(|path| path.exists());
    let is_delegated = state.delegated.iter().any(|controller| controller == "cpuset");
    let set_by_us = earlier.and_then(|earlier| earlier.allowed_set);
    let is_limited = !state.allowed_cpus.is_empty() && set_by_us != Some(state.allowed_cpus);
    let subtree = cgroups.read(&format!("{cgroup}/cgroup.subtree_control")).unwrap_or_default();
    Ok(UnitNeeds {
        drop_in: (is_ours || !is_delegated).then_some(drop_in),
        delegate: !is_delegated,
        limit: is_limited.then_some(state.allowed_cpus),
        allow: state.allowed_cpus.is_empty(),
        had_controller: cgroup::has_word(&subtree, "cpuset"),
    })
}

/// What a unit has, and what it needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnitNeeds {
    /// The drop-in, where it is qmpin's or is to be.
    pub drop_in: Option<String>,
    /// The controller is to be delegated.
    pub delegate: bool,
    /// `AllowedCPUs=` as another program has set it.
    pub limit: Option<CpuSet>,
    /// `AllowedCPUs=` is to be set: that is what makes systemd hand the controller down.
    pub allow: bool,
    /// Whether its groups had the controller before.
    pub had_controller: bool,
}

/// Delegates the unit to qmpin by a drop-in, and the units in `others` with the same reload of systemd.
///
/// # Errors
/// What could not be done for this unit. Others are served by their own attach.
pub fn delegate(
    root: &SysRoot,
    units: &dyn Units,
    unit: &str,
    others: &[String],
) -> Result<(), Refused> {
    let path = drop_in(unit);
    write_drop_in(root, unit, &path)
        .map_err(|error| Refused::new(format!("/{path}"), "Delegate=cpuset", error))?;
    for other in others {
        if let Err(error) = write_drop_in(root, other, &drop_in(other)) {
            tracing::debug!("/{}: {error}", drop_in(other));
        }
    }
    let refused = |reason: String| Refused::new(unit, "Delegate=cpuset", reason);
    services::reload(units).map_err(|error| refused(chain(&error)))?;
    match is_delegated(units, unit) {
        Ok(true) => Ok(()),
        Ok(false) => Err(refused("systemd has read the drop-in and does not apply it".to_owned())),
        Err(error) => Err(refused(chain(&error))),
    }
}

/// Whether systemd has delegated cpusets to what runs in the unit.
///
/// # Errors
/// [`SystemdError`].
pub fn is_delegated(units: &dyn Units, unit: &str) -> Result<bool, SystemdError> {
    Ok(units.state(unit)?.delegated.iter().any(|controller| controller == "cpuset"))
}

/// Makes the unit ready: delegated, with the controller. `all` are the host's CPUs.
///
/// # Errors
/// What could not be done.
pub fn prepare_unit(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    units: &dyn Units,
    site: &Site,
    needs: &UnitNeeds,
    all: &CpuSet,
) -> Result<(), Refused> {
    let unit = &site.unit;
    if needs.delegate {
        delegate(root, units, unit, &[])?;
    }
    if needs.allow {
        units
            .set_allowed_cpus(unit, all)
            .map_err(|error| Refused::new(unit, &format!("AllowedCPUs={all}"), chain(&error)))?;
    }
    let probe = format!("{}/cpuset.cpus.exclusive", site.cgroup);
    match cgroups.read(&probe) {
        Ok(_) => Ok(()),
        Err(_) if cgroups.read(&format!("{}/cpuset.cpus", site.cgroup)).is_ok() => {
            Err(Refused::new(probe, "there", cgroup::NO_EXCLUSIVE))
        }
        Err(error) => Err(Refused::new(probe, "there", error)),
    }
}

fn write_drop_in(root: &SysRoot, unit: &str, relative: &str) -> io::Result<()> {
    let path = root.path(relative).map_err(|error| error.source)?;
    let section = match unit.rsplit_once('.') {
        Some((_, "scope")) => "Scope",
        _ => "Service",
    };
    let made = path.parent().filter(|folder| !folder.exists());
    if let Some(folder) = made {
        create_folder(folder)?;
    }
    let text = format!(
        "# Made by qmpin while the VM is attached; `qmpin detach` removes it.\n\
         [{section}]\nDelegate=cpuset\n"
    );
    // Whole, or not at all: systemd may read it at any time.
    let new = root.path(&drop_in_new(relative)).map_err(|error| error.source)?;
    let (folder, name) = folder_of(&path, FolderLink::Refuse)?;
    let written = folder.replace_by(name, new.file_name().unwrap_or(name), text.as_bytes());
    if let (Err(_), Some(empty)) = (&written, made) {
        // Nothing remembers a folder without the file. Where it is not empty, it is another's by now.
        let _ = fs::remove_dir(empty);
    }
    written
}

/// What steps of a partition are carried out with.
#[derive(Clone, Copy)]
pub struct PartitionBench<'a> {
    /// What its threads are moved with.
    pub threads: Bench<'a>,
    /// The cgroup tree.
    pub cgroups: &'a dyn Cgroups,
    /// Where it is.
    pub site: &'a Site,
}

impl Step for PartitionStep {
    type Bench<'a> = PartitionBench<'a>;
    type Record = Record;
    type Outcome = Result<(), Refused>;

    /// The undo of a whole partition is one record, which was durable before the first of its steps was planned.
    fn undo(&self) -> Option<Record> {
        None
    }

    fn carry_out(&self, bench: &mut PartitionBench<'_>) -> Result<(), Refused> {
        let PartitionBench { threads, cgroups, site } = *bench;
        let below = |group: Group| group.below(&site.cgroup);
        match self {
            PartitionStep::Make(group) => {
                let path = below(*group);
                cgroups.make(&path).map_err(|error| Refused::new(&path, "a group", error))?;
                write(cgroups, &format!("{path}/cgroup.type"), "threaded", |now| now == "threaded")
            }
            PartitionStep::Enable => {
                let path = format!("{}/cgroup.subtree_control", site.cgroup);
                write(cgroups, &path, "+cpuset", |now| cgroup::has_word(now, "cpuset"))
            }
            PartitionStep::Move { thread, to } => {
                let group = match to {
                    Seat::In(group) => below(*group),
                    Seat::Loose => site.cgroup.clone(),
                };
                move_thread(threads, cgroups, thread.key, &group)
            }
            PartitionStep::SetCpus { group, cpus } => {
                set_cpus(cgroups, &format!("{}/cpuset.cpus", below(*group)), cpus)
            }
            PartitionStep::SetExclusive { cgroup, cpus } => {
                set_cpus(cgroups, &format!("{cgroup}/cpuset.cpus.exclusive"), cpus)
            }
            PartitionStep::Isolate => {
                let path = format!("{}/cpuset.cpus.partition", below(Group::Vcpus));
                write(cgroups, &path, ISOLATED, |now| now == ISOLATED)
            }
        }
    }
}

/// What was refused of steps that were carried out.
#[must_use]
pub fn refusals(applied: Vec<Applied<PartitionStep>>) -> Vec<Refused> {
    applied.into_iter().filter_map(|one| one.outcome.err()).collect()
}

fn move_thread(
    threads: Bench<'_>,
    cgroups: &dyn Cgroups,
    thread: ThreadKey,
    group: &str,
) -> Result<(), Refused> {
    let path = format!("{group}/cgroup.threads");
    let tid = thread.tid.to_string();
    let refused =
        |reason: String| Refused { thread: Some(thread), ..Refused::new(&path, &tid, reason) };
    match threads.has(thread) {
        Ok(true) => {}
        Ok(false) => return Ok(()),
        Err(error) => return Err(refused(chain(&error))),
    }
    match cgroups.write(&path, &tid) {
        Err(error) if !is_gone(&error) => Err(refused(error.to_string())),
        _ => Ok(()),
    }
}

/// Writes a cpulist and sees that it is that.
pub(crate) fn set_cpus(cgroups: &dyn Cgroups, path: &str, cpus: &CpuSet) -> Result<(), Refused> {
    write(cgroups, path, &cpus.to_string(), |now| {
        CpuSet::parse_cpulist(now).is_ok_and(|now| now == *cpus)
    })
}

/// Writes, reads back, and compares.
pub(crate) fn write(
    cgroups: &dyn Cgroups,
    path: &str,
    value: &str,
    holds: impl Fn(&str) -> bool,
) -> Result<(), Refused> {
    cgroups.write(path, value).map_err(|error| Refused::new(path, value, error))?;
    let now = cgroups.read(path).map_err(|error| Refused::new(path, value, error))?;
    if holds(&now) { Ok(()) } else { Err(Refused::new(path, value, format!("it is `{now}`"))) }
}
