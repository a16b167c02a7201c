//! What stands against taking CPUs offline for a moment: see [`crate::knobs::reonline::plan`] for why.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup::set;
use crate::discover::host::online_cpus;
use crate::discover::{DiscoverError, Occupant, OccupantKind, occupants};
use crate::ids::{CpuId, Pid};
use crate::knobs::host::interrupts::irq_places;
use crate::knobs::host::kernel_threads::{KthreadScan, all_kernel_threads};
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{Place, Value};
use crate::knobs::reonline::plan::{AloneKind, Blocker, Facts, Never};
use crate::leases::Lease;
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::threads::ThreadKey;

const CPU: &str = "sys/devices/system/cpu";
const RESCTRL: &str = "sys/fs/resctrl";

/// The most groups of the cgroup tree that are looked at.
const GROUPS_MAX: usize = 20_000;

/// Bound kernel threads that stop, or move and come back, with their CPU: those of `kernel/smpboot.c`'s
/// users and of workqueues. Names are up to the first `/`.
const HOTPLUGGED: [&str; 11] = [
    "cpuhp",
    "migration",
    "ksoftirqd",
    "kworker",
    "irq_work",
    "rcuc",
    "idle_inject",
    "backlog_napi",
    "ktimers",
    "vmbus_irq",
    "watchdog",
];

/// Where a CPU is taken offline and online (`Documentation/ABI/testing/sysfs-devices-system-cpu`).
#[must_use]
pub fn switch(cpu: CpuId) -> Place {
    Place::Word(format!("{CPU}/cpu{cpu}/online"))
}

/// Whether a place is such a switch.
#[must_use]
pub fn is_switch(place: &Place) -> bool {
    let number = |path: &str| {
        let rest = path.strip_prefix(CPU)?.strip_prefix("/cpu")?;
        rest.strip_suffix("/online")?.parse::<u32>().ok()
    };
    matches!(place, Place::Word(path) if number(path).is_some())
}

/// What stands against it, of these CPUs. `others` are the other VMs' leases, `memory` what the host's
/// journal remembers.
///
/// # Errors
/// [`DiscoverError`] where the online CPUs cannot be read. Where something else cannot be, no CPU is taken.
pub fn reonline_facts(
    root: &SysRoot,
    sched: &dyn Sched,
    cgroups: &dyn Cgroups,
    cpus: &CpuSet,
    others: &[Lease],
    memory: &HostMemory,
) -> Result<Facts, DiscoverError> {
    let online = online_cpus(root)?;
    let mut facts = Facts { never: never(root, sched, memory, &online), ..Facts::default() };
    let tree = Tree::walk(cgroups);
    let there = occupants(root, sched, cpus, Pid(0));
    if tree.lacks_exclusive {
        facts.never.get_or_insert(Never::OldKernel);
    }
    if tree.is_cut {
        let reason = format!("there are more than {GROUPS_MAX} cgroups");
        facts.never.get_or_insert(Never::Unknown(reason));
    }
    if let Err(error) = &there {
        facts.never.get_or_insert(Never::Unknown(format!("{error}: {}", error.source)));
    }
    let mut stands = |cpus: CpuSet, blocker: &Blocker| {
        for cpu in cpus.iter() {
            facts.blockers.entry(cpu).or_default().push(blocker.clone());
        }
    };
    let of = |found: CpuSet| found & *cpus;
    stands(of(CpuId::from_index(0).map(CpuSet::single).unwrap_or_default()), &Blocker::First);
    let has_switch = |cpu: &CpuId| match switch(*cpu) {
        Place::Word(path) => root.read(&path).is_ok(),
        _ => false,
    };
    stands(cpus.iter().filter(|cpu| !has_switch(cpu)).collect(), &Blocker::NoSwitch);
    for lease in others {
        stands(of(lease.exclusive | lease.vcpu_cpus()), &Blocker::Leased(lease.vm.clone()));
    }
    for (group, has) in tree.partitions {
        stands(of(has), &Blocker::Partition(group));
    }
    for (group, has) in resctrl(root) {
        stands(of(has), &Blocker::Resctrl(group));
    }
    // All threads count: the VM's own lose as much as others.
    for one in there.unwrap_or_default() {
        let alone = one.allowed & online;
        if alone.len() == 1
            && let Some(blocker) = alone_there(one)
        {
            stands(of(alone), &blocker);
        }
    }
    for (number, alone) in alone_irqs(root, &online) {
        stands(of(alone), &Blocker::Irq(number));
    }
    Ok(facts)
}

fn alone_there(one: Occupant) -> Option<Blocker> {
    let kind = match one.kind {
        OccupantKind::User => AloneKind::User,
        OccupantKind::Movable => AloneKind::Movable,
        OccupantKind::Bound => {
            let name = one.comm.split(['/', ':']).next().unwrap_or_default();
            if HOTPLUGGED.contains(&name) {
                return None;
            }
            AloneKind::Bound
        }
    };
    Some(Blocker::Thread { tid: one.tid, comm: one.comm, kind })
}

fn never(root: &SysRoot, sched: &dyn Sched, memory: &HostMemory, online: &CpuSet) -> Option<Never> {
    let own = root.read("proc/self/cgroup").unwrap_or_default();
    let controllers = |line: &str| line.split(':').nth(1).map(str::to_owned).unwrap_or_default();
    if own.lines().any(|line| controllers(line).split(',').any(|one| one == "cpuset")) {
        return Some(Never::CpusetV1);
    }
    all_kernel_threads(root, KthreadScan::All).into_iter().find_map(|tid| {
        let stat = crate::discover::stat::of(root, tid).ok()?;
        let node: u32 = stat.comm.strip_prefix("kcompactd")?.parse().ok()?;
        if !stat.is_kernel_thread() {
            return None;
        }
        let key = ThreadKey { tid, start: stat.start };
        // With a VM that has it moved away, what it had before counts: that is what it goes back to.
        let has = match memory.original(&Place::Thread(key)).and_then(Value::cpus) {
            Some(has) => has,
            None => sched.affinity(tid).ok()?,
        };
        let nodes = root.read(&format!("sys/devices/system/node/node{node}/cpulist")).ok()?;
        let nodes = CpuSet::parse_cpulist(&nodes).ok()?;
        (has & *online != nodes & *online).then_some(Never::Kcompactd(stat.comm))
    })
}

/// Movable interrupts that may fire on one CPU alone. Where the kernel keeps one where it is, no program may
/// write its file (`kernel/irq/proc.c: register_irq_proc`), and the kernel looks after it.
fn alone_irqs(root: &SysRoot, online: &CpuSet) -> BTreeMap<u32, CpuSet> {
    let alone = |place: Place| {
        let (number, Place::CpuList(path)) = (place.irq()?, place) else { return None };
        let file = root.path(&path).ok()?;
        let can_be_written = fs::metadata(file).ok()?.permissions().mode() & 0o200 != 0;
        let on = CpuSet::parse_cpulist(&root.read(&path).ok()?).ok()? & *online;
        (can_be_written && on.len() == 1).then_some((number, on))
    };
    irq_places(root).into_iter().filter_map(alone).collect()
}

/// What the cgroup tree says.
#[derive(Default)]
struct Tree {
    partitions: Vec<(String, CpuSet)>,
    lacks_exclusive: bool,
    /// There are more groups than were looked at.
    is_cut: bool,
}

impl Tree {
    fn walk(cgroups: &dyn Cgroups) -> Tree {
        let mut tree = Tree::default();
        let mut todo = vec![String::new()];
        let mut seen = 0;
        while let Some(group) = todo.pop() {
            seen += 1;
            if seen > GROUPS_MAX {
                tree.is_cut = true;
                break;
            }
            for child in cgroups.children(&group).unwrap_or_default() {
                let path = if group.is_empty() { child } else { format!("{group}/{child}") };
                tree.search(cgroups, &path);
                todo.push(path);
            }
        }
        tree
    }

    fn search(&mut self, cgroups: &dyn Cgroups, group: &str) {
        let read = |file: &str| cgroups.read(&format!("{group}/{file}"));
        if read("cpuset.cpus").is_err() {
            return;
        }
        self.lacks_exclusive |= read("cpuset.cpus.exclusive").is_err();
        let state = read("cpuset.cpus.partition").unwrap_or_default();
        // Also one that is not in force: it may come back to be.
        if !state.is_empty() && state != "member" {
            let files = ["cpuset.cpus", "cpuset.cpus.exclusive", "cpuset.cpus.exclusive.effective"];
            let has = files.iter().fold(CpuSet::EMPTY, |has, file| has | set(cgroups, group, file));
            self.partitions.push((group.to_owned(), has));
        }
    }
}

/// The CPUs of resctrl's groups but its first, which takes whatever comes.
fn resctrl(root: &SysRoot) -> Vec<(String, CpuSet)> {
    let inside = |group: &str| {
        let names = root.folder(group).and_then(|folder| folder.names()).unwrap_or_default();
        names.into_iter().map(|name| format!("{group}/{name}")).collect::<Vec<String>>()
    };
    let groups = inside(RESCTRL);
    let monitored = groups.iter().map(String::as_str).chain([RESCTRL]);
    let monitored: Vec<String> =
        monitored.flat_map(|group| inside(&format!("{group}/mon_groups"))).collect();
    // What is no group has no such file.
    let cpus = |group: String| {
        let cpus = CpuSet::parse_cpulist(&root.read(&format!("{group}/cpus_list")).ok()?).ok()?;
        Some((group, cpus))
    };
    groups.into_iter().chain(monitored).filter_map(cpus).collect()
}
