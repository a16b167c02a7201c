//! The knob *vCPUs*: one host CPU for each, guest siblings on host siblings.
//!
//! ```text
//!   guest threads=2   guest core ─▶ host core, thread by thread; where cores are too few, as many so
//!                     as can be
//!   guest threads=1   vCPU ─▶ a core of its own, while there are any; then the second threads
//!   share             the same, round after round over the same CPUs
//!   guest nodes       one after the other; on what is left of a core, without siblings alone
//!   held              a vCPU that has a valid CPU keeps it; only new ones are placed (extension.rs)
//! ```

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::devices::{self, Far};
use super::groups::{self, Need};
use super::machine::{FreeCore, Group};
use super::memory::Pull;
use super::report::{Placed, Why};
use super::{Machine, Request, smt};
use crate::cpuset::CpuSet;
use crate::guest::{Guest, GuestVcpu};
use crate::ids::{CpuId, NodeId, VcpuIndex};
use crate::topology::{CoreKind, Topology};

/// Where the vCPUs went, and what had to give.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// By vCPU index.
    pub(super) placed: Vec<Placed>,
    /// vCPUs for which no CPU was left.
    pub(super) unplaced: Vec<VcpuIndex>,
    pub(super) siblings: Siblings,
    /// The CPUs over which all vCPUs float; none is placed then.
    pub(super) floats: Option<CpuSet>,
}

impl Placement {
    /// Whether a vCPU has no CPU, or siblings are apart.
    pub(super) fn falls_short(&self) -> bool {
        !self.unplaced.is_empty() || self.siblings == Siblings::Apart
    }
}

/// How well the vCPUs fit, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fit {
    /// Some have no CPU.
    Part,
    /// Some share a CPU.
    Wrapped,
    /// Each has its own.
    Whole,
}

impl Fit {
    /// Whether an attempt with this outcome is taken instead of an earlier one, which had more wishes.
    pub(super) fn beats(self, before: Fit) -> bool {
        // Where vCPUs are left over, what is placed may at least be placed well.
        self > before || (self == before && self != Fit::Wrapped)
    }
}

/// Whether guest siblings are on host siblings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Siblings {
    /// The guest has no SMT.
    #[default]
    None,
    /// Each guest core is on a host core, thread by thread.
    Together,
    /// Not all of them: the host has no cores to put them on.
    Apart,
}

/// The vCPUs of one guest core, by guest thread.
#[derive(Clone, Debug)]
pub(super) struct GuestCore {
    pub(super) node: Option<u32>,
    pub(super) vcpus: Vec<VcpuIndex>,
}

impl GuestCore {
    fn in_parts(&self, widest: usize) -> impl Iterator<Item = GuestCore> {
        let parts = self.vcpus.chunks(widest);
        parts.map(|vcpus| GuestCore { node: self.node, vcpus: vcpus.to_vec() })
    }
}

/// The guest's cores, in the order of their first vCPU.
pub(super) fn guest_cores(vcpus: &[GuestVcpu]) -> Vec<GuestCore> {
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

pub(super) fn threads(cores: &[GuestCore]) -> usize {
    cores.iter().map(|core| core.vcpus.len()).max().unwrap_or(1)
}

/// Whether guest cores are to be kept together, or their threads may go apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    GuestCores,
    Nothing,
}

/// Places every vCPU of a VM that holds nothing yet. `None`: the free cores do not hold them.
pub(super) fn fresh(request: &Request<'_>, groups: &[Group<'_>]) -> Option<Placement> {
    let Request { machine: Machine { topology, .. }, guest, .. } = *request;
    let cores = guest_cores(&guest.vcpus);
    let filled = smt::filled(&request.policy.vm, groups, &cores);
    let together = filled.as_ref().unwrap_or(&cores);
    let keeps: &[Keep] =
        if threads(together) > 1 { &[Keep::GuestCores, Keep::Nothing] } else { &[Keep::Nothing] };
    let by_node = cells(together);
    let mut placed = keeps.iter().find_map(|keep| {
        place(request, groups, &by_node, *keep).or_else(|| {
            // Guest node by guest node, a single vCPU may have taken the core that siblings need.
            let several = by_node.len() > 1;
            several.then(|| place(request, groups, &[together.iter().collect()], *keep)).flatten()
        })
    })?;
    if filled.is_some() {
        smt::say_why(&mut placed);
    }
    Some(Placement::of(topology, &cores, placed, Vec::new()))
}

impl Placement {
    pub(super) fn of(
        topology: &Topology,
        cores: &[GuestCore],
        mut placed: Vec<Placed>,
        unplaced: Vec<VcpuIndex>,
    ) -> Placement {
        placed.sort_unstable_by_key(|placed| placed.vcpu);
        let mut placement = Placement { placed, unplaced, ..Placement::default() };
        if threads(cores) > 1 {
            let together = cores.iter().all(|core| placement.is_together(topology, core));
            placement.siblings = if together { Siblings::Together } else { Siblings::Apart };
        }
        placement
    }

    /// How well the vCPUs fit.
    pub(super) fn fit(&self) -> Fit {
        if !self.unplaced.is_empty() {
            Fit::Part
        } else if self.placed.iter().any(|placed| placed.why == Why::Wrapped) {
            Fit::Wrapped
        } else {
            Fit::Whole
        }
    }

    /// The CPU of a vCPU, if it is placed.
    pub(super) fn cpu(&self, vcpu: VcpuIndex) -> Option<CpuId> {
        let at = self.placed.binary_search_by_key(&vcpu, |placed| placed.vcpu).ok()?;
        Some(self.placed[at].cpu)
    }

    /// Where a vCPU may run, if it is placed.
    pub(super) fn cpus(&self, vcpu: VcpuIndex) -> Option<CpuSet> {
        self.floats.or_else(|| self.cpu(vcpu).map(CpuSet::single))
    }

    /// All CPUs that have vCPUs.
    pub(super) fn used(&self) -> CpuSet {
        self.floats.unwrap_or_else(|| self.placed.iter().map(|placed| placed.cpu).collect())
    }

    /// How many vCPUs are on each CPU that has any.
    pub(super) fn users(&self) -> BTreeMap<CpuId, usize> {
        let mut users = BTreeMap::new();
        for placed in &self.placed {
            *users.entry(placed.cpu).or_default() += 1;
        }
        users
    }

    /// Whether a guest core is on one host core, each vCPU on a CPU of its own.
    fn is_together(&self, topology: &Topology, core: &GuestCore) -> bool {
        let on: CpuSet = core.vcpus.iter().filter_map(|vcpu| self.cpu(*vcpu)).collect();
        let host = on.first().and_then(|cpu| topology.core_of(cpu));
        on.len() == core.vcpus.len() && host.is_some_and(|host| on.is_subset(&host.cpus))
    }
}

/// The guest's cores by guest NUMA node; a guest without has one.
fn cells(cores: &[GuestCore]) -> Vec<Vec<&GuestCore>> {
    let mut by_node: BTreeMap<Option<u32>, Vec<&GuestCore>> = BTreeMap::new();
    for core in cores {
        by_node.entry(core.node).or_default().push(core);
    }
    by_node.into_values().collect()
}

/// The vCPUs of one guest node, or of the whole guest, and what they need.
struct Cell<'a> {
    cores: &'a [&'a GuestCore],
    threads: usize,
    need: Need,
    pull: Pull,
}

impl<'a> Cell<'a> {
    fn of(cores: &'a [&'a GuestCore], keep: Keep, pull: Pull) -> Cell<'a> {
        let threads = cores.iter().map(|core| core.vcpus.len()).max().unwrap_or(1);
        let need = Need {
            vcpus: cores.iter().map(|core| core.vcpus.len()).sum(),
            cores: cores.len(),
            threads: if keep == Keep::GuestCores { threads } else { 1 },
            wide: cores.iter().filter(|core| core.vcpus.len() > 1).count(),
        };
        Cell { cores, threads, need, pull }
    }

    /// Whether it does not fit near its memory, and how many nodes are near: the least of both is placed first.
    fn choice(&self, topology: &Topology, groups: &[Group<'_>]) -> (bool, usize) {
        let (nearest, nodes) = self.pull.nearest(topology);
        let alone =
            groups::choose(topology, groups, self.need, &[], &self.pull, &|_| Far::default());
        let is_near = |at: usize| self.pull.remote(topology, groups[at].node) == nearest;
        (!alone.is_some_and(|chosen| chosen.into_iter().all(is_near)), nodes)
    }
}

/// Places guest node by guest node.
fn place(
    request: &Request<'_>,
    groups: &[Group<'_>],
    cells: &[Vec<&GuestCore>],
    keep: Keep,
) -> Option<Vec<Placed>> {
    let topology = request.machine.topology;
    let mut groups = Cow::Borrowed(groups);
    let mut elsewhere: Vec<NodeId> = Vec::new();
    let mut placed = Vec::new();
    let several = cells.len() > 1;
    let mut cells: Vec<Cell<'_>> = cells
        .iter()
        .map(|cores| {
            let node = cores.first().and_then(|core| core.node).filter(|_| several);
            Cell::of(cores, keep, Pull::of(request, node))
        })
        .collect();
    if several {
        cells.sort_by_cached_key(|cell| cell.choice(topology, &groups));
    }
    for (at, Cell { cores, threads, need, pull }) in cells.iter().enumerate() {
        // Which part of the guest has the devices is not known: the first goes near them.
        let far = |node| if at == 0 { devices::far(request, node) } else { Far::default() };
        let chosen = groups::choose(topology, &groups, *need, &elsewhere, pull, &far)?;
        elsewhere.extend(chosen.iter().filter_map(|at| groups[*at].node));
        let host = chosen.iter().map(|at| &groups[*at]);
        if need.threads > 1 {
            fill_cores(host.flat_map(|group| &group.free), cores, need.threads, &mut placed);
        } else if *threads > 1 {
            fill_mixed(host.flat_map(|group| &group.free), cores.iter().copied(), &mut placed);
        } else {
            let host: Vec<&Group<'_>> = host.collect();
            fill_threads(&host, cores, &mut placed);
        }
        if at + 1 < cells.len() {
            let used: CpuSet = placed.iter().map(|placed| placed.cpu).collect();
            for group in groups.to_mut() {
                match keep {
                    Keep::GuestCores => {
                        group.free.retain(|core| !core.usable().intersects(&used));
                    }
                    Keep::Nothing => group.take(&used),
                }
            }
        }
    }
    Some(placed)
}

/// Guest core by guest core onto a core each. A guest core that has one vCPU (an odd number of them)
/// takes a core that is too narrow for others, where wide ones are scarce.
fn fill_cores<'a>(
    host: impl Iterator<Item = &'a FreeCore<'a>>,
    cell: &[&GuestCore],
    threads: usize,
    placed: &mut Vec<Placed>,
) {
    let mut host: Vec<&FreeCore<'_>> = host.collect();
    let wide = |core: &&FreeCore<'_>| core.threads >= threads;
    let scarce = host.iter().copied().filter(|core| wide(core)).count() < cell.len();
    for guest in cell {
        let single = guest.vcpus.len() == 1;
        let at = match host.iter().position(|core| wide(core) != (single && scarce)) {
            Some(at) => at,
            None if single && !host.is_empty() => 0,
            None => return,
        };
        let core = host.remove(at);
        let first = guest.vcpus[0];
        for (vcpu, cpu) in guest.vcpus.iter().zip(core.usable().iter()) {
            let why = if *vcpu == first { Why::OwnCore } else { Why::SiblingOf(first) };
            placed.push(Placed { vcpu: *vcpu, cpu, why });
        }
    }
}

/// vCPU by vCPU: first the cores of all chosen groups, then their second threads. Neighbouring
/// vCPUs stay behind one cache: how many each group takes is settled first, then who.
fn fill_threads(host: &[&Group<'_>], cell: &[&GuestCore], placed: &mut Vec<Placed>) {
    let mut left = cell.len();
    let mut takes = vec![0; host.len()];
    let cores = host.iter().flat_map(|group| &group.free);
    let rounds = 0..cores.map(FreeCore::end).max().unwrap_or(0);
    for round in rounds.clone() {
        for (take, group) in takes.iter_mut().zip(host) {
            let more = group.free.iter().filter(|core| core.has_thread(round)).take(left).count();
            *take += more;
            left -= more;
        }
        if left == 0 {
            break;
        }
    }
    let mut rest = cell.iter().map(|core| core.vcpus[0]);
    for (take, group) in takes.into_iter().zip(host) {
        let mut on: Vec<Option<VcpuIndex>> =
            group.free.iter().map(|core| core.first(placed)).collect();
        let mut taken = 0;
        'group: for round in rounds.clone() {
            for (core, first) in group.free.iter().zip(&mut on) {
                if taken == take {
                    break 'group;
                }
                let Some(cpu) = core.thread(round) else { continue };
                let Some(vcpu) = rest.next() else { break 'group };
                let why = first.map_or(Why::OwnCore, Why::SecondThreadBeside);
                first.get_or_insert(vcpu);
                placed.push(Placed { vcpu, cpu, why });
                taken += 1;
            }
        }
    }
}

/// A host core that fills up.
struct Filling {
    left: Vec<CpuId>,
    first: Option<VcpuIndex>,
}

impl Filling {
    fn take(&mut self, vcpu: VcpuIndex, sibling: Option<VcpuIndex>) -> Placed {
        let why = match (sibling, self.first) {
            (Some(sibling), _) => Why::SiblingOf(sibling),
            (None, Some(first)) => Why::SecondThreadBeside(first),
            (None, None) => Why::OwnCore,
        };
        self.first.get_or_insert(vcpu);
        Placed { vcpu, cpu: self.left.remove(0), why }
    }
}

/// As many guest cores as can be onto a host core each, an untouched one first; the vCPUs of the
/// others wherever a CPU is left. Returns what found none.
fn fill_mixed<'a>(
    host: impl Iterator<Item = &'a FreeCore<'a>>,
    cell: impl Iterator<Item = &'a GuestCore>,
    placed: &mut Vec<Placed>,
) -> Vec<GuestCore> {
    let filling = |core: &FreeCore<'_>| Filling {
        left: core.usable().iter().collect(),
        first: core.first(placed),
    };
    let mut host: Vec<Filling> = host.map(filling).collect();
    let place_for = |host: &[Filling], threads: usize| {
        let able = |core: &Filling| core.left.len() >= threads;
        let untouched = host.iter().position(|core| core.first.is_none() && able(core));
        untouched.or_else(|| host.iter().position(able))
    };
    // A guest core wider than any core here is in parts of which each is together.
    let widest = host.iter().map(|core| core.left.len()).max().unwrap_or(1).max(1);
    let mut apart: Vec<GuestCore> = Vec::new();
    for guest in cell.flat_map(|guest| guest.in_parts(widest)) {
        let at = if guest.vcpus.len() > 1 { place_for(&host, guest.vcpus.len()) } else { None };
        let Some(at) = at else {
            apart.push(guest);
            continue;
        };
        let mut sibling = None;
        for vcpu in &guest.vcpus {
            placed.push(host[at].take(*vcpu, sibling));
            sibling = Some(guest.vcpus[0]);
        }
    }
    let mut rest = Vec::new();
    for mut guest in apart {
        let mut seated = 0;
        while let Some(vcpu) = guest.vcpus.get(seated)
            && let Some(at) = place_for(&host, 1)
        {
            placed.push(host[at].take(*vcpu, None));
            seated += 1;
        }
        guest.vcpus.drain(..seated);
        if !guest.vcpus.is_empty() {
            rest.push(guest);
        }
    }
    rest
}

/// Places more vCPUs than there are CPUs, around and around. `None`: there is no free CPU at all.
pub(super) fn wrapped(
    topology: &Topology,
    groups: &[Group<'_>],
    guest: &Guest,
) -> Option<Placement> {
    let cores = guest_cores(&guest.vcpus);
    let mut order: Vec<&Group<'_>> = groups.iter().collect();
    order.sort_by_key(|group| (group.kind == Some(CoreKind::Efficiency), group.order));
    if order.iter().all(|group| group.free.is_empty()) {
        return None;
    }
    let mut placed = Vec::new();
    let mut rest = cores.clone();
    while !rest.is_empty() {
        rest = fill_mixed(order.iter().flat_map(|group| &group.free), rest.iter(), &mut placed);
    }
    let mut placement = Placement::of(topology, &cores, placed, Vec::new());
    let users = placement.users();
    for place in placement.placed.iter_mut().filter(|place| users[&place.cpu] > 1) {
        place.why = Why::Wrapped;
    }
    Some(placement)
}
