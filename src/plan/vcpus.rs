//! The knob *vCPUs*: one host CPU for each, guest siblings on host siblings.
//!
//! ```text
//!   guest threads=2   guest core ─▶ host core, thread by thread
//!   guest threads=1   vCPU ─▶ a core of its own, while there are any; then the second threads
//!   held              a vCPU that has a valid CPU keeps it; only new ones are placed
//! ```

use std::collections::BTreeMap;

use super::groups::{self, Need};
use super::machine::Group;
use super::report::{Placed, Why};
use super::{Guest, GuestVcpu};
use crate::cpuset::CpuSet;
use crate::ids::{CpuId, NodeId, VcpuIndex};
use crate::policy::Sharing;
use crate::topology::Topology;

/// Where the vCPUs went, and what had to give.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// By vCPU index.
    pub(super) placed: Vec<Placed>,
    /// vCPUs for which no CPU was left.
    pub(super) unplaced: Vec<VcpuIndex>,
    pub(super) siblings: Siblings,
}

/// Whether guest siblings are on host siblings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Siblings {
    /// The guest has no SMT.
    #[default]
    None,
    /// Each pair is on one host core.
    Together,
    /// The host has no cores to put them on.
    Apart,
}

/// The vCPUs of one guest core, by guest thread.
#[derive(Clone, Debug)]
struct GuestCore {
    node: Option<u32>,
    vcpus: Vec<VcpuIndex>,
}

/// The guest's cores, in the order of their first vCPU.
fn guest_cores(vcpus: &[GuestVcpu]) -> Vec<GuestCore> {
    let mut cores: BTreeMap<_, Vec<&GuestVcpu>> = BTreeMap::new();
    for vcpu in vcpus {
        // A vCPU without a core id, as QEMU leaves it for machines without topology, is a core.
        let alone = vcpu.core.is_none().then_some(vcpu.index);
        let key = (vcpu.node, vcpu.socket, vcpu.die, vcpu.cluster, vcpu.core, alone);
        cores.entry(key).or_default().push(vcpu);
    }
    let mut cores: Vec<GuestCore> = cores
        .into_values()
        .map(|mut vcpus| {
            vcpus.sort_by_key(|vcpu| (vcpu.thread, vcpu.index));
            GuestCore { node: vcpus[0].node, vcpus: vcpus.iter().map(|vcpu| vcpu.index).collect() }
        })
        .collect();
    cores.sort_by_key(|core| core.vcpus.iter().min().copied());
    cores
}

fn split(cores: &[GuestCore]) -> Vec<GuestCore> {
    let mut split: Vec<GuestCore> = cores
        .iter()
        .flat_map(|core| {
            core.vcpus.iter().map(|vcpu| GuestCore { node: core.node, vcpus: vec![*vcpu] })
        })
        .collect();
    split.sort_by_key(|core| core.vcpus[0]);
    split
}

fn threads(cores: &[GuestCore]) -> usize {
    cores.iter().map(|core| core.vcpus.len()).max().unwrap_or(1)
}

/// Places every vCPU of a VM that holds nothing yet. `None`: the free cores do not hold them.
pub(super) fn fresh(topology: &Topology, groups: &[Group], guest: &Guest) -> Option<Placement> {
    let cores = guest_cores(&guest.vcpus);
    let smt = threads(&cores) > 1;
    let together = cells(topology, groups, &cores);
    let (placed, siblings) = match together {
        Some(placed) if smt => (placed, Siblings::Together),
        Some(placed) => (placed, Siblings::None),
        None if smt => (cells(topology, groups, &split(&cores))?, Siblings::Apart),
        None => return None,
    };
    Some(Placement { placed: sorted(placed), unplaced: Vec::new(), siblings })
}

fn sorted(mut placed: Vec<Placed>) -> Vec<Placed> {
    placed.sort_unstable_by_key(|placed| placed.vcpu);
    placed
}

/// Places guest NUMA node by guest NUMA node; a guest without is one.
fn cells(topology: &Topology, groups: &[Group], cores: &[GuestCore]) -> Option<Vec<Placed>> {
    let mut by_node: BTreeMap<Option<u32>, Vec<&GuestCore>> = BTreeMap::new();
    for core in cores {
        by_node.entry(core.node).or_default().push(core);
    }
    let mut groups = groups.to_vec();
    let mut near: Vec<NodeId> = Vec::new();
    let mut placed = Vec::with_capacity(cores.len());
    for cell in by_node.values() {
        let need = Need {
            vcpus: cell.iter().map(|core| core.vcpus.len()).sum(),
            cores: cell.len(),
            threads: cell.iter().map(|core| core.vcpus.len()).max().unwrap_or(1),
        };
        let chosen = groups::choose(topology, &groups, need, &near)?;
        near.extend(chosen.iter().filter_map(|at| groups[*at].node));
        if need.threads > 1 {
            fill_cores(&mut groups, &chosen, cell, need.threads, &mut placed);
        } else {
            fill_threads(&mut groups, &chosen, cell, &mut placed);
        }
    }
    Some(placed)
}

/// Guest core by guest core onto cores that have enough threads.
fn fill_cores(
    groups: &mut [Group],
    chosen: &[usize],
    cell: &[&GuestCore],
    threads: usize,
    placed: &mut Vec<Placed>,
) {
    let mut rest = cell.iter();
    for at in chosen {
        groups[*at].free.retain(|core| {
            if core.cpus.len() < threads {
                return true;
            }
            let Some(guest) = rest.next() else { return true };
            for (vcpu, cpu) in guest.vcpus.iter().zip(&core.cpus) {
                let first = guest.vcpus[0];
                let why = if *vcpu == first { Why::OwnCore } else { Why::SiblingOf(first) };
                placed.push(Placed { vcpu: *vcpu, cpu: *cpu, why });
            }
            false
        });
    }
}

/// vCPU by vCPU: first the cores of all chosen groups, then their second threads. Neighbouring
/// vCPUs stay behind one cache: how many each group takes is settled first, then who.
fn fill_threads(
    groups: &mut [Group],
    chosen: &[usize],
    cell: &[&GuestCore],
    placed: &mut Vec<Placed>,
) {
    let mut left = cell.len();
    let mut takes = vec![0; chosen.len()];
    for round in 0.. {
        let before = left;
        for (take, at) in takes.iter_mut().zip(chosen) {
            let more = groups[*at].free_cores_of(round + 1).min(left);
            *take += more;
            left -= more;
        }
        if left == 0 || left == before {
            break;
        }
    }
    let mut rest = cell.iter().map(|core| core.vcpus[0]);
    for (take, at) in takes.into_iter().zip(chosen) {
        let mut on: Vec<Option<VcpuIndex>> = vec![None; groups[*at].free.len()];
        let mut taken = 0;
        'group: for round in 0.. {
            let before = taken;
            for (core, first) in groups[*at].free.iter().zip(&mut on) {
                if taken == take {
                    break 'group;
                }
                let Some(cpu) = core.cpus.get(round) else { continue };
                let Some(vcpu) = rest.next() else { break 'group };
                let why = first.map_or(Why::OwnCore, Why::SecondThreadBeside);
                first.get_or_insert(vcpu);
                placed.push(Placed { vcpu, cpu: *cpu, why });
                taken += 1;
            }
            if taken == before {
                break;
            }
        }
        let mut on = on.into_iter();
        groups[*at].free.retain(|_| on.next().flatten().is_none());
    }
}

/// Places more vCPUs than there are CPUs, around and around. `None`: there is no free CPU at all.
pub(super) fn wrapped(groups: &[Group], guest: &Guest) -> Option<Placement> {
    let cores = guest_cores(&guest.vcpus);
    let free: Vec<&Vec<CpuId>> =
        groups.iter().flat_map(|group| group.free.iter().map(|core| &core.cpus)).collect();
    if free.is_empty() {
        return None;
    }
    let smt = threads(&cores) > 1;
    let mut placed = Vec::new();
    if smt {
        for (guest, cpus) in cores.iter().zip(free.iter().cycle()) {
            for (vcpu, cpu) in guest.vcpus.iter().zip(cpus.iter().cycle()) {
                placed.push(Placed { vcpu: *vcpu, cpu: *cpu, why: Why::OwnCore });
            }
        }
    } else {
        let threads = free.iter().map(|core| core.len()).max().unwrap_or(1);
        let round = |thread: usize| free.iter().filter_map(move |core| core.get(thread));
        let order: Vec<CpuId> = (0..threads).flat_map(round).copied().collect();
        for (guest, cpu) in cores.iter().zip(order.iter().cycle()) {
            placed.push(Placed { vcpu: guest.vcpus[0], cpu: *cpu, why: Why::OwnCore });
        }
    }
    let mut users: BTreeMap<CpuId, usize> = BTreeMap::new();
    for place in &placed {
        *users.entry(place.cpu).or_default() += 1;
    }
    for place in &mut placed {
        if users[&place.cpu] > 1 {
            place.why = Why::Wrapped;
        }
    }
    let siblings = if smt { Siblings::Together } else { Siblings::None };
    Some(Placement { placed: sorted(placed), unplaced: Vec::new(), siblings })
}

/// Keeps what is held and still valid, and finds places for the rest: beside the guest sibling, on a
/// free core of the groups in use, on an idle sibling of the VM's own cores, on a free core elsewhere.
pub(super) fn extended(
    topology: &Topology,
    groups: &[Group],
    guest: &Guest,
    held: &BTreeMap<VcpuIndex, CpuId>,
    sharing: Sharing,
) -> Placement {
    let mut state = Extension::new(topology, groups, guest, held);
    let cores = guest_cores(&guest.vcpus);
    let smt = threads(&cores) > 1;
    let mut rest: Vec<(VcpuIndex, &GuestCore)> = cores
        .iter()
        .flat_map(|core| core.vcpus.iter().map(move |vcpu| (*vcpu, core)))
        .filter(|(vcpu, _)| !state.on.contains_key(vcpu))
        .collect();
    rest.sort_by_key(|(vcpu, _)| *vcpu);
    let mut unplaced = Vec::new();
    for (vcpu, core) in rest {
        if !(state.beside_sibling(vcpu, core)
            || state.own_core(vcpu, Reach::GroupsInUse, if smt { core.vcpus.len() } else { 1 })
            || state.idle_sibling(vcpu)
            || state.own_core(vcpu, Reach::Anywhere, 1)
            || (sharing == Sharing::Wrap && state.wrap(vcpu)))
        {
            unplaced.push(vcpu);
        }
    }
    let together = cores.iter().all(|core| {
        let mut on = core
            .vcpus
            .iter()
            .filter_map(|vcpu| topology.core_of(state.on.get(vcpu)?.cpu).map(|core| core.id));
        let first = on.next();
        on.all(|other| Some(other) == first)
    });
    let siblings = match (smt, together) {
        (false, _) => Siblings::None,
        (true, true) => Siblings::Together,
        (true, false) => Siblings::Apart,
    };
    Placement { placed: state.on.into_values().collect(), unplaced, siblings }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    GroupsInUse,
    Anywhere,
}

struct Extension<'a> {
    topology: &'a Topology,
    groups: &'a [Group],
    on: BTreeMap<VcpuIndex, Placed>,
    used: CpuSet,
}

impl<'a> Extension<'a> {
    fn new(
        topology: &'a Topology,
        groups: &'a [Group],
        guest: &Guest,
        held: &BTreeMap<VcpuIndex, CpuId>,
    ) -> Extension<'a> {
        let free: CpuSet = groups
            .iter()
            .flat_map(|group| &group.free)
            .flat_map(|core| core.cpus.iter().copied())
            .collect();
        let mut state = Extension { topology, groups, on: BTreeMap::new(), used: CpuSet::EMPTY };
        for vcpu in &guest.vcpus {
            if let Some(cpu) = held.get(&vcpu.index).filter(|cpu| free.contains(**cpu)) {
                state.put(vcpu.index, *cpu, Why::Held);
            }
        }
        state
    }

    fn put(&mut self, vcpu: VcpuIndex, cpu: CpuId, why: Why) {
        self.used.insert(cpu);
        self.on.insert(vcpu, Placed { vcpu, cpu, why });
    }

    fn beside_sibling(&mut self, vcpu: VcpuIndex, guest: &GuestCore) -> bool {
        let found = guest.vcpus.iter().find_map(|other| {
            let placed = self.on.get(other)?;
            let core = self.free_core_of(placed.cpu)?;
            core.iter().find(|cpu| !self.used.contains(**cpu)).map(|cpu| (*cpu, *other))
        });
        if let Some((cpu, other)) = found {
            self.put(vcpu, cpu, Why::SiblingOf(other));
        }
        found.is_some()
    }

    fn free_core_of(&self, cpu: CpuId) -> Option<&'a [CpuId]> {
        let cores = self.groups.iter().flat_map(|group| &group.free);
        cores.map(|core| core.cpus.as_slice()).find(|cpus| cpus.contains(&cpu))
    }

    fn own_core(&mut self, vcpu: VcpuIndex, reach: Reach, threads: usize) -> bool {
        let near: Vec<NodeId> = self
            .groups
            .iter()
            .filter(|group| group.cpus.intersects(&self.used))
            .filter_map(|group| group.node)
            .collect();
        let mut order: Vec<&Group> = self
            .groups
            .iter()
            .filter(|group| reach == Reach::Anywhere || group.cpus.intersects(&self.used))
            .collect();
        order.sort_by_key(|group| {
            let distance = match group.node {
                Some(node) if !near.contains(&node) => near
                    .iter()
                    .filter_map(|other| self.topology.distance(*other, node))
                    .min()
                    .unwrap_or(u32::MAX),
                _ => 0,
            };
            (distance, group.has_reserved, group.order)
        });
        let found = order.iter().flat_map(|group| &group.free).find(|core| {
            core.cpus.len() >= threads && core.cpus.iter().all(|cpu| !self.used.contains(*cpu))
        });
        let cpu = found.and_then(|core| core.cpus.first().copied());
        if let Some(cpu) = cpu {
            self.put(vcpu, cpu, Why::OwnCore);
        }
        cpu.is_some()
    }

    fn idle_sibling(&mut self, vcpu: VcpuIndex) -> bool {
        let found = self.on.values().find_map(|placed| {
            let idle =
                self.free_core_of(placed.cpu)?.iter().find(|cpu| !self.used.contains(**cpu))?;
            Some((*idle, placed.vcpu))
        });
        if let Some((cpu, beside)) = found {
            self.put(vcpu, cpu, Why::SecondThreadBeside(beside));
        }
        found.is_some()
    }

    /// Shares the CPU that has the fewest vCPUs of this VM.
    fn wrap(&mut self, vcpu: VcpuIndex) -> bool {
        let users = |cpu: CpuId| self.on.values().filter(|placed| placed.cpu == cpu).count();
        let cpu = self.used.iter().min_by_key(|cpu| users(*cpu));
        if let Some(cpu) = cpu {
            self.put(vcpu, cpu, Why::Wrapped);
        }
        cpu.is_some()
    }
}
