//! Reads what the host has promised to others than VMs.
//!
//! ```text
//!   cgroups   cpuset.cpus.exclusive, a partition     hard     not of a VM that is attached
//!             cpuset.cpus                            soft     as before qmpin limited it
//!   threads   a mask of their own                    soft     but of a VM that is attached, and of its qmpin
//!   kernel    isolcpus=, nohz_full=                  isolated
//! ```
//!
//! Everything else on the host runs where the scheduler puts it, and moves away by itself.

use std::collections::BTreeMap;

use super::cpusets::{Below, cgroup_of, held_by, is_within, visit};
use super::{OwnMask, cgroup, isolcpus, online_cpus, stat, with_own_masks};
use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::ids::{Pid, Tid};
use crate::promises::{Promise, Promises, Strength};
use crate::sched::Sched;
use crate::site::levels;
use crate::sysroot::SysRoot;

/// The most promises that are kept apart: a plan weighs each.
const PROMISES_MAX: usize = 64;

/// What is qmpin's own, and no promise to others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Known {
    /// The QEMUs of attached VMs, and the supervisors of these.
    pub processes: Vec<Pid>,
    /// The QEMUs alone: other processes in their cgroups serve the VM.
    pub qemus: Vec<Pid>,
    /// What cgroups were limited to before qmpin limited them.
    pub limits: BTreeMap<String, CpuSet>,
}

/// Reads all promises. It looks at every thread of the host, so no lock should be held meanwhile.
#[must_use]
pub fn promises(
    root: &SysRoot,
    sched: &dyn Sched,
    cgroups: &dyn Cgroups,
    known: &Known,
) -> Promises {
    let online = online_cpus(root).unwrap_or_default();
    let isolated = isolated_at_boot(root) & online;
    let own = |qemu: &Pid| cgroup::own_cgroup(root, cgroups, *qemu);
    let vms: Vec<String> = known.qemus.iter().filter_map(own).collect();
    let mut made = of_cgroups(cgroups, &online, &vms, &known.limits);
    made.extend(of_threads(root, sched, &known.processes, &vms, &isolated));
    made.truncate(PROMISES_MAX);
    Promises { made, isolated }
}

/// The CPUs that the command line isolated.
fn isolated_at_boot(root: &SysRoot) -> CpuSet {
    let text = root.read_lossy("sys/devices/system/cpu/nohz_full").unwrap_or_default();
    // It says "(null)" where nothing was asked for.
    isolcpus(root) | CpuSet::parse_cpulist(text.trim()).unwrap_or_default()
}

/// What cgroups have: those that no other can use first. The root's own is the whole machine.
fn of_cgroups(
    cgroups: &dyn Cgroups,
    online: &CpuSet,
    vms: &[String],
    before: &BTreeMap<String, CpuSet>,
) -> Vec<Promise> {
    let (mut hard, mut soft) = (Vec::new(), Vec::new());
    visit(cgroups, &mut |group, now| {
        if vms.iter().any(|vm| is_within(group, vm)) {
            return Below::Skip;
        }
        // What qmpin has built for a VM goes through the slices above it.
        let is_above = vms.iter().any(|vm| levels(vm).contains(&group));
        if is_above {
            return Below::Visit;
        }
        if let Some(holder) = held_by(cgroups, group, online) {
            let cpus = holder.cpus.parse().unwrap_or_default();
            let what = format!("{} ({})", holder.cgroup, holder.file());
            hard.push(Promise { what, cpus, tid: None, strength: Strength::Hard });
            return Below::Skip;
        }
        let cpus = before.get(group).copied().unwrap_or(now) & *online;
        if !cpus.is_empty() && cpus != *online {
            let what = format!("{group} (cpuset.cpus)");
            soft.push(Promise { what, cpus, tid: None, strength: Strength::Soft });
        }
        Below::Visit
    });
    hard.append(&mut soft);
    hard
}

/// What threads have chosen, or were given by an administrator: one promise for each unit and mask.
fn of_threads(
    root: &SysRoot,
    sched: &dyn Sched,
    but: &[Pid],
    vms: &[String],
    isolated: &CpuSet,
) -> Vec<Promise> {
    let mut units: BTreeMap<Pid, Option<String>> = BTreeMap::new();
    let mut found: BTreeMap<(String, String), (CpuSet, Tid, usize)> = BTreeMap::new();
    for OwnMask { pid, key, cpus } in with_own_masks(root, sched, but, isolated) {
        let unit = units.entry(pid).or_insert_with(|| unit_of(root, pid, vms));
        let Some(unit) = unit else { continue };
        let seen = found.entry((unit.clone(), cpus.to_string())).or_insert((cpus, key.tid, 0));
        seen.2 += 1;
    }
    let promise = |((unit, _), (cpus, tid, number)): ((String, String), (CpuSet, Tid, usize))| {
        let more = match number {
            1 => format!("tid {tid}"),
            _ => format!("tid {tid} and {} more", number - 1),
        };
        let what = format!("{unit} ({more})");
        Promise { what, cpus, tid: Some(tid), strength: Strength::Soft }
    };
    found.into_iter().map(promise).collect()
}

/// The unit of a process, or its name where it has none; `None`: it belongs to a VM that is attached.
fn unit_of(root: &SysRoot, pid: Pid, vms: &[String]) -> Option<String> {
    let path = cgroup_of(root, pid).unwrap_or_default();
    if vms.iter().any(|vm| is_within(&path, vm)) {
        return None;
    }
    let unit = path.split('/').rev().find(|part| cgroup::is_unit(part));
    let name = || stat::of(root, pid).map_or_else(|_| "a process".to_owned(), |stat| stat.comm);
    Some(unit.map_or_else(name, str::to_owned))
}
