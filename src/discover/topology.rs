//! Reads the host's CPUs from sysfs into a [`Topology`].
//!
//! Called at the start of nearly every command, `attach` among them, so it opens as few files as it
//! can. The kernel says most things twice over: CPU 0 says that it shares a core with 12, and CPU 12
//! says the same. One CPU of each group is asked, and everyone is asked only where two answers
//! contradict each other (`groups`).
//!
//! ```text
//!  devices/system/cpu/{present,online}             which CPUs there are
//!  …/cpuN/topology/core_cpus_list                  once per core
//!  …/cpuN/topology/{package,die}_cpus_list, ids    once per package and die
//!  …/cpuN/cache/indexM/{type,shared_cpu_list,size} once per LLC group             `cache`
//!  …/cpuN/cpu_capacity, devices/cpu_{core,atom}    once per core                  `kinds`
//!  …/cpuN/cpufreq, …/cpuN/acpi_cppc                once per core, where there     `ranks`
//!  devices/system/node/{online,nodeN/…}            once per node                  `nodes`
//! ```
//!
//! The formats are those of `Documentation/ABI/testing/sysfs-devices-system-cpu`,
//! `Documentation/ABI/stable/sysfs-devices-system-cpu` and `…/sysfs-devices-node`, and of
//! `Documentation/admin-guide/cputopology.rst`. What is missing or makes no sense becomes `None` and
//! a line in [`Topology::unknown`]. `die_id` and `cpu_capacity` are the exception: many machines do
//! not have them at all, so their absence on the first CPU is taken as the architecture's and gets no
//! line.

mod attribute;
mod cache;
mod groups;
mod kinds;
mod nodes;
mod ranks;

use std::thread;

use attribute::{Notes, Why};
use groups::{ListWitness, split};
use tokio::sync::oneshot;

use crate::cpuset::CpuSet;
use crate::discover::{DiscoverError, online_cpus};
use crate::ids::{CPUS_MAX, CoreId, CpuId, LlcId, NodeId};
use crate::sysroot::SysRoot;
use crate::topology::{Core, Cpu, Llc, Topology};

const CPU: &str = "sys/devices/system/cpu";

/// Reads the machine's topology. What could not be read is in [`Topology::unknown`].
///
/// # Errors
/// [`DiscoverError`] where not even `sys/devices/system/cpu/online` can be read and understood.
pub fn read_topology(root: &SysRoot) -> Result<Topology, DiscoverError> {
    let online = read_online(root)?;
    let mut notes = Notes::default();
    let present = read_present(root, &online, &mut notes);

    let cores = split("the SMT siblings", &online, &mut ListWitness::cores(root), &mut notes);
    let packages = split("the package", &online, &mut ListWitness::packages(root), &mut notes);
    let dies = read_dies(root, &online, &mut notes);
    let llcs = cache::read_llcs(root, &online, &mut notes);
    let (nodes, node_of) = nodes::read_nodes(root, &online, &mut notes);
    let kind_of = kinds::read_kinds(root, &online, &cores, &mut notes);
    let rank_of = ranks::read_ranks(root, &cores);

    let package_of =
        ids_of_groups(root, "the package", "physical_package_id", &packages, &mut notes);
    let die_of = ids_of_groups(root, "the die", "die_id", &dies, &mut notes);
    let core_of = dense(cores.iter().copied(), CoreId);
    let llc_of = dense(llcs.iter().map(|(cpus, _)| *cpus), LlcId);

    let mut topology = Topology { nodes, ..Topology::default() };
    topology.cpus.extend(present.iter().map(|id| {
        let core = core_of.get(id);
        Cpu {
            id,
            online: online.contains(id),
            package: package_of.get(id),
            die: die_of.get(id),
            node: node_of.get(id),
            llc: llc_of.get(id),
            core,
            siblings: core.and_then(|core| cores.get(core.0 as usize)).copied().unwrap_or_default(),
            kind: kind_of.get(id),
        }
    }));
    topology.cores.extend((0..).zip(&cores).map(|(id, cpus)| {
        let id = CoreId(id);
        Core {
            id,
            cpus: *cpus,
            llc: common(id, cpus, "LLC", &llc_of, &mut notes),
            node: common(id, cpus, "node", &node_of, &mut notes),
            package: common(id, cpus, "package", &package_of, &mut notes),
            die: common(id, cpus, "die", &die_of, &mut notes),
            kind: common(id, cpus, "kind", &kind_of, &mut notes),
            rank: cpus.first().and_then(|cpu| rank_of.get(cpu)),
        }
    }));
    topology.llcs.extend((0..).zip(&llcs).map(|(llc, (cpus, size_bytes))| Llc {
        llc: LlcId(llc),
        cpus: *cpus,
        size_bytes: *size_bytes,
    }));
    for llc in &topology.llcs {
        note_a_cut_llc(llc, &node_of, &mut notes);
    }
    topology.unknown = notes.into_unknown();
    Ok(topology)
}

/// Reads it in a thread of its own, from now on: that takes milliseconds, and the answer of a QEMU whose monitor is
/// held does not wait for it.
///
/// # Errors
/// Those of [`read_topology`].
pub fn read_topology_aside(
    root: &SysRoot,
) -> impl Future<Output = Result<Topology, DiscoverError>> + use<> {
    let (tell, told) = oneshot::channel();
    let (there, here) = (root.clone(), root.clone());
    let read = move || drop(tell.send(read_topology(&there)));
    // Where there can be no more threads, nothing is told, and it is read here.
    drop(thread::Builder::new().name("qmpin-topology".to_owned()).spawn(read));
    async move { told.await.unwrap_or_else(|_| read_topology(&here)) }
}

/// A value per CPU, `None` for those that have none.
struct PerCpu<T> {
    values: Vec<Option<T>>,
}

impl<T: Copy + PartialEq> PerCpu<T> {
    fn none() -> PerCpu<T> {
        PerCpu { values: vec![None; CPUS_MAX] }
    }

    fn get(&self, cpu: CpuId) -> Option<T> {
        self.values[cpu.index()]
    }

    fn set(&mut self, cpus: &CpuSet, value: Option<T>) {
        for cpu in cpus.iter() {
            self.values[cpu.index()] = value;
        }
    }
}

fn read_online(root: &SysRoot) -> Result<CpuSet, DiscoverError> {
    let online = online_cpus(root)?;
    if online.is_empty() {
        return Err(DiscoverError::OnlineEmpty { path: root.root().join(CPU).join("online") });
    }
    Ok(online)
}

/// The CPUs that are present. An online CPU is, whatever the file says.
fn read_present(root: &SysRoot, online: &CpuSet, notes: &mut Notes) -> CpuSet {
    match attribute::cpulist(root, &format!("{CPU}/present")) {
        Ok(present) => {
            let forgotten = *online - present;
            if !forgotten.is_empty() {
                let why =
                    format!("CPUs {forgotten} are online and not among the present, {present}");
                notes.add("which CPUs are present".to_owned(), Why::new(why));
            }
            present | *online
        }
        Err(why) => {
            notes.add("which CPUs are offline".to_owned(), why);
            *online
        }
    }
}

/// The dies, silently none where the architecture has no such word.
fn read_dies(root: &SysRoot, online: &CpuSet, notes: &mut Notes) -> Vec<CpuSet> {
    let mut witness = ListWitness::dies(root);
    let mut of_dies = Notes::default();
    let dies = split("the die", online, &mut witness, &mut of_dies);
    if !witness.is_lacking() {
        notes.append(of_dies);
    }
    dies
}

/// The id that the first CPU of each group reads from `cpuN/topology/NAME`, for all of the group.
fn ids_of_groups(
    root: &SysRoot,
    subject: &'static str,
    name: &str,
    groups: &[CpuSet],
    notes: &mut Notes,
) -> PerCpu<u32> {
    let mut ids = PerCpu::none();
    for group in groups {
        let Some(first) = group.first() else { continue };
        match attribute::id(root, &format!("{CPU}/cpu{first}/topology/{name}")) {
            Ok(id) => ids.set(group, Some(id)),
            Err(why) => notes.add_cpus(subject, group, why),
        }
    }
    ids
}

/// Dense ids for groups that are in the order of their first CPUs.
fn dense<T: Copy + PartialEq>(
    groups: impl Iterator<Item = CpuSet>,
    id: impl Fn(u32) -> T,
) -> PerCpu<T> {
    let mut ids = PerCpu::none();
    for (at, group) in (0..).zip(groups) {
        ids.set(&group, Some(id(at)));
    }
    ids
}

/// What a core's CPUs agree on.
fn common<T: Copy + PartialEq>(
    id: CoreId,
    cpus: &CpuSet,
    subject: &str,
    of: &PerCpu<T>,
    notes: &mut Notes,
) -> Option<T> {
    let mut values = cpus.iter().map(|cpu| of.get(cpu));
    let first = values.next()?;
    if values.all(|value| value == first) {
        return first;
    }
    let why = Why::new(format!("its CPUs {cpus} do not agree"));
    notes.add(format!("the {subject} of core {id}"), why);
    None
}

/// Sub-NUMA clustering cuts one L3 into several nodes, so this is no mistake of the kernel's; but
/// a caller that takes an LLC group for a part of a node has to know.
fn note_a_cut_llc(llc: &Llc, node_of: &PerCpu<NodeId>, notes: &mut Notes) {
    let mut on: Vec<NodeId> = llc.cpus.iter().filter_map(|cpu| node_of.get(cpu)).collect();
    on.sort_unstable();
    on.dedup();
    if on.len() > 1 {
        let on: Vec<String> = on.iter().map(ToString::to_string).collect();
        let why = format!("its CPUs {} are on nodes {}", llc.cpus, on.join(", "));
        notes.add(format!("the one node of LLC {}", llc.llc), Why::new(why));
    }
}
