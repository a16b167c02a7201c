//! A case in bit masks, and the score of a placement: the rules' outcomes, worked out anew from the facts.

use std::collections::BTreeMap;

use qmpin::cpuset::CpuSet;
use qmpin::ids::{CpuId, NodeId};
use qmpin::plan::Plan;
use qmpin::topology::{CoreKind, Topology};

use super::cases::Case;

/// A set of CPUs, by their places in [`Ground::cpus`].
pub(super) type Mask = u16;

/// The rules in words, as the fields of [`Score`].
pub(super) const RULES: [&str; 19] = [
    "promises, the narrowest",
    "promises, the next",
    "promises, the widest",
    "isolated",
    "siblings",
    "memory",
    "kinds",
    "nodes",
    "caches",
    "own core",
    "stacked cache",
    "largest cache",
    "host's caches",
    "apart",
    "left over",
    "crowding",
    "small cores",
    "fullest cache",
    "displaced",
];

/// How badly a placement keeps the rules, the most important first: less is better. See the table in `exhaustive.rs`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Score {
    promises: [u32; 3],
    isolated: u32,
    siblings: u32,
    memory: u32,
    kinds: u32,
    nodes: u32,
    caches: u32,
    own_core: u32,
    stacked: u32,
    largest: u32,
    host: u32,
    apart: u32,
    left: u32,
    crowding: u32,
    small: u32,
    fullest: u32,
    displaced: u32,
}

impl Score {
    fn all(&self) -> [u32; RULES.len()] {
        let Score { promises: [first, second, third], isolated, siblings, memory, .. } = *self;
        let Score { kinds, nodes, caches, own_core, stacked, largest, host, apart, left, .. } =
            *self;
        let Score { crowding, small, fullest, displaced, .. } = *self;
        [
            first, second, third, isolated, siblings, memory, kinds, nodes, caches, own_core,
            stacked, largest, host, apart, left, crowding, small, fullest, displaced,
        ]
    }

    /// The place in [`RULES`] of the first rule in which two scores differ.
    pub(super) fn first_difference(&self, other: &Score) -> Option<usize> {
        self.all().iter().zip(other.all()).position(|(one, other)| *one != other)
    }
}

/// How remote a node is from memory: how many eighths of it are elsewhere. Between two nodes, distance decides nothing.
type Remote = u32;

/// A guest core: on which guest node it is, and how many vCPUs it has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestCore {
    pub(super) node: usize,
    pub(super) vcpus: u32,
}

/// A promise that can be broken.
struct Soft {
    /// Its place among the numbers of CPUs that promises have.
    rank: usize,
    cpus: Mask,
}

/// A case, as the rules see it.
pub(super) struct Ground {
    /// Core by core, thread by thread.
    pub(super) cpus: Vec<CpuId>,
    pub(super) cores: Vec<Mask>,
    /// What the VM may have at all.
    pub(super) free: Mask,
    pub(super) guest: Vec<GuestCore>,
    /// Whether the guest has siblings.
    is_smt: bool,
    soft: Vec<Soft>,
    /// `None`: there are none, or none near memory that is bound.
    isolated: Option<Mask>,
    /// For each guest node, how remote each host node is.
    remote: Vec<Vec<Remote>>,
    small: Mask,
    nodes: Vec<Mask>,
    caches: Vec<Mask>,
    /// `None`: caches are alike.
    stacked: Option<Mask>,
    /// Cores of one kind behind one cache on one node.
    groups: Vec<Mask>,
    reserved: Mask,
}

fn bits(mask: Mask) -> u32 {
    mask.count_ones()
}

/// How many there are, as a score.
fn count<T>(all: impl Iterator<Item = T>) -> u32 {
    u32::try_from(all.count()).expect("few")
}

fn union(masks: impl IntoIterator<Item = Mask>) -> Mask {
    masks.into_iter().fold(0, |all, mask| all | mask)
}

fn whole(cores: &[Mask], cpus: Mask) -> Mask {
    cpus | union(cores.iter().copied().filter(|core| core & cpus != 0))
}

fn mask(cpus: &[CpuId], set: &CpuSet) -> Mask {
    union((0..cpus.len()).filter(|at| set.contains(cpus[*at])).map(|at| 1 << at))
}

impl Ground {
    pub(super) fn of(case: &Case) -> Ground {
        let topology = &case.topology;
        let cpus: Vec<CpuId> = topology.cores.iter().flat_map(|core| core.cpus.iter()).collect();
        assert!(cpus.len() <= Mask::BITS as usize, "{case}");
        let mask = |set: &CpuSet| mask(&cpus, set);
        let cores: Vec<Mask> = topology.cores.iter().map(|core| mask(&core.cpus)).collect();
        let (free, reserved) = to_be_had(case, &cores, &mask);
        let guest = guest_cores(case);
        let guest_nodes = 1 + guest.iter().map(|core| core.node).max().unwrap_or(0);
        let with_cpus = topology.nodes.iter().filter(|node| !node.cpus.is_empty());
        let (ids, nodes): (Vec<NodeId>, Vec<Mask>) =
            with_cpus.map(|node| (node.node, mask(&node.cpus))).unzip();
        let remote = (0..guest_nodes)
            .map(|at| {
                let memory = Memory::of(case, (guest_nodes > 1).then_some(at));
                ids.iter().map(|node| memory.remote(*node)).collect()
            })
            .collect();
        let mut widths: Vec<usize> = Vec::new();
        let promises = &case.surroundings.promises;
        widths.extend(promises.soft().map(|promise| promise.cpus.len()));
        widths.sort_unstable();
        widths.dedup();
        let rank = |cpus: &CpuSet| widths.binary_search(&cpus.len()).expect("known");
        let soft = promises.soft();
        let soft = soft.map(|soft| Soft { rank: rank(&soft.cpus), cpus: mask(&soft.cpus) });
        let bound = case.guest.memory.iter().flat_map(|piece| &piece.bound);
        let near = bound.filter_map(|node| ids.iter().position(|id| id == node));
        let near = union(near.map(|at| nodes[at]));
        let isolated = mask(&promises.isolated) & if near == 0 { Mask::MAX } else { near };
        let is_small = |kind| kind == Some(CoreKind::Efficiency);
        let small = topology.cores.iter().zip(&cores).filter(|(core, _)| is_small(core.kind));
        let small = union(small.map(|(_, cpus)| *cpus));
        // Where each core has a cache of its own, or none is known, packages take the place of caches.
        let caches_tell =
            !topology.llcs.is_empty() && (topology.llcs.len() < cores.len() || cores.len() == 1);
        let caches: Vec<Mask> = if caches_tell {
            topology.llcs.iter().map(|llc| mask(&llc.cpus)).collect()
        } else {
            let mut packages: BTreeMap<Option<u32>, Mask> = BTreeMap::new();
            for (core, cpus) in topology.cores.iter().zip(&cores) {
                *packages.entry(core.package).or_default() |= cpus;
            }
            packages.into_values().collect()
        };
        let groups = caches.iter().flat_map(|cache| {
            nodes.iter().flat_map(move |node| [cache & node & small, cache & node & !small])
        });
        Ground {
            groups: groups.filter(|group| *group != 0).collect(),
            stacked: stacked(topology).filter(|_| caches_tell).map(|set| mask(&set)),
            soft: soft.collect(),
            isolated: (isolated != 0).then_some(isolated),
            is_smt: guest.iter().any(|core| core.vcpus > 1),
            cpus,
            cores,
            free,
            guest,
            remote,
            small,
            nodes,
            caches,
            reserved,
        }
    }

    pub(super) fn mask(&self, set: &CpuSet) -> Mask {
        mask(&self.cpus, set)
    }

    /// The CPUs of a mask by their numbers.
    pub(super) fn cpulist(&self, mask: Mask) -> CpuSet {
        (0..self.cpus.len()).filter(|at| mask >> at & 1 != 0).map(|at| self.cpus[at]).collect()
    }

    /// The CPUs of each guest core in a plan.
    pub(super) fn placed(&self, case: &Case, plan: &Plan) -> Vec<Mask> {
        let mut on: BTreeMap<_, Mask> = BTreeMap::new();
        for vcpu in &case.guest.vcpus {
            let cpus = plan.vcpu(vcpu.index).expect("every vCPU is in a plan");
            assert_eq!(cpus.len(), 1, "vCPU {} is on {cpus}\n{case}", vcpu.index);
            *on.entry((vcpu.node, vcpu.core)).or_default() |= self.mask(&cpus);
        }
        on.into_values().collect()
    }

    /// What of a CPU matters to any rule, apart from the core that it is on.
    pub(super) fn signs(&self, at: usize) -> u32 {
        let masks = [self.free, self.isolated.unwrap_or(0)];
        let masks = masks.into_iter().chain(self.soft.iter().map(|soft| soft.cpus));
        masks.fold(0, |all, mask| all << 1 | u32::from(mask >> at & 1))
    }

    /// What of a core matters to any rule, apart from its CPUs.
    pub(super) fn place(&self, core: Mask) -> (Option<usize>, bool) {
        let group = self.groups.iter().position(|group| group & core != 0);
        (group, core & self.reserved != 0)
    }

    /// The score where `on` has the CPUs of each guest core.
    pub(super) fn score(&self, on: &[Mask]) -> Score {
        let mut score = Score::default();
        let used = union(on.iter().copied());
        let taken = whole(&self.cores, used);
        let (broken, kept): (Vec<&Soft>, _) =
            self.soft.iter().partition(|soft| soft.cpus & taken != 0);
        for soft in &broken {
            score.promises[soft.rank] += 1;
        }
        score.displaced = bits(union(broken.iter().map(|soft| soft.cpus)) & taken);
        // The CPUs that there are for a VM that keeps so many promises.
        let mut pool = self.free & !whole(&self.cores, union(kept.iter().map(|soft| soft.cpus)));
        if let Some(isolated) = self.isolated {
            score.isolated = u32::from(used & !isolated != 0);
            pool &= if score.isolated == 0 { isolated } else { Mask::MAX };
        }
        if self.is_smt {
            let home = |cpus: &Mask| self.cores.iter().position(|core| cpus & !core == 0);
            let mut homes: Vec<usize> = on.iter().filter_map(home).collect();
            score.apart = count(on.iter()) - count(homes.iter());
            homes.sort_unstable();
            homes.dedup();
            score.siblings = u32::from(homes.len() < on.len());
        }
        let cells: Vec<Mask> = (0..self.remote.len())
            .map(|node| {
                let here = self.guest.iter().zip(on).filter(|(core, _)| core.node == node);
                union(here.map(|(_, cpus)| *cpus))
            })
            .collect();
        for (at, cell) in cells.iter().enumerate() {
            self.score_guest_node(*cell, &self.remote[at], pool, &mut score);
        }
        if let [one, other] = *cells
            && self.nodes.len() > 1
        {
            let both = |node: &&Mask| *node & one != 0 && *node & other != 0;
            score.nodes += count(self.nodes.iter().filter(both));
        }
        let on_cores = || self.cores.iter().map(|core| bits(core & used));
        score.own_core = u32::from(!self.is_smt && on_cores().any(|vcpus| vcpus > 1));
        score.crowding = on_cores().map(|vcpus| vcpus * vcpus).sum();
        score.small = bits(used & self.small);
        let [there, back] = [false, true].map(|is_reversed| self.left(&cells, pool, is_reversed));
        score.left = there.min(back);
        score
    }

    /// Adds what is of one guest node alone.
    fn score_guest_node(&self, cpus: Mask, remote: &[Remote], pool: Mask, score: &mut Score) {
        let on_node = self.nodes.iter().zip(remote).filter(|(node, _)| *node & cpus != 0);
        score.memory += on_node.clone().map(|(_, remote)| *remote).max().unwrap_or(0);
        score.nodes += count(on_node).saturating_sub(1);
        score.kinds += match (cpus & !self.small != 0, cpus & self.small != 0) {
            (_, false) => 0,
            (false, true) => 1,
            (true, true) => 2,
        };
        let in_use = self.caches.iter().copied().filter(|cache| cache & cpus != 0);
        score.caches += count(in_use.clone());
        score.stacked += u32::from(self.stacked.is_some_and(|stacked| cpus & !stacked != 0));
        let room = |cache: Mask| {
            let threads = self.cores.iter().map(|core| bits(core & cache & pool));
            // Siblings that are together take two threads of a core, and no more.
            let pairs = threads.clone().filter(|threads| *threads > 1).map(|_| 2).sum();
            if self.is_smt && score.siblings == 0 { pairs } else { threads.sum::<u32>() }
        };
        let largest = in_use.clone().map(room).max().unwrap_or(0);
        score.largest += bits(cpus).saturating_sub(largest);
        score.fullest += bits(cpus) - in_use.map(|cache| bits(cache & cpus)).max().unwrap_or(0);
        let host = self.groups.iter().filter(|group| *group & self.reserved != 0);
        score.host += u32::from(union(host.copied()) & cpus != 0);
    }

    /// How many cores of `pool` stay free in the groups used, guest node by guest node.
    fn left(&self, cells: &[Mask], pool: Mask, is_reversed: bool) -> u32 {
        let (mut before, mut left) = (0, 0);
        for at in 0..cells.len() {
            let cell = cells[if is_reversed { cells.len() - 1 - at } else { at }];
            before |= cell;
            let groups = union(self.groups.iter().copied().filter(|group| group & cell != 0));
            let is_left = |core: &&Mask| *core & groups & pool != 0 && *core & before == 0;
            left += count(self.cores.iter().filter(is_left));
        }
        left
    }
}

/// The CPUs that the VM may have at all, and the host's.
fn to_be_had(case: &Case, cores: &[Mask], mask: &impl Fn(&CpuSet) -> Mask) -> (Mask, Mask) {
    let hard = mask(&case.surroundings.promises.hard());
    let taken = whole(cores, mask(&case.neighbours.exclusive()) | hard);
    let reserved = case.policy.host.reserved.value.cpus();
    let mut reserved = reserved.map_or(cores[0], |cpus| mask(&cpus));
    if reserved & !taken == 0 {
        // The host needs a core, where others have all of its own.
        let left = cores.iter().find(|core| *core & taken == 0);
        reserved = left.copied().unwrap_or(reserved);
    }
    let mut free = mask(&case.topology.online()) & !whole(cores, taken | reserved);
    if let Some(allowed) = &case.surroundings.allowed {
        let allowed = mask(&allowed.cpus);
        if allowed & !taken & reserved == 0 {
            // Its helpers need a core, where it is allowed none of the host's.
            let kept = cores.iter().find(|core| *core & allowed & !taken != 0);
            free &= !kept.copied().unwrap_or(0);
        }
        free &= allowed;
    }
    (free, reserved)
}

fn guest_cores(case: &Case) -> Vec<GuestCore> {
    let mut cores: BTreeMap<_, GuestCore> = BTreeMap::new();
    for vcpu in &case.guest.vcpus {
        let node = vcpu.node.map_or(0, |node| node as usize);
        let core = cores.entry((vcpu.node, vcpu.core)).or_insert(GuestCore { node, vcpus: 0 });
        core.vcpus += 1;
    }
    cores.into_values().collect()
}

/// The CPUs behind stacked cache, where some are and others are not: 64 MiB or more, and twice the smallest.
fn stacked(topology: &Topology) -> Option<CpuSet> {
    let sizes = || topology.llcs.iter().filter_map(|llc| llc.size_bytes);
    let enough = (64 << 20).max(2 * sizes().min()?);
    let large = topology.llcs.iter().filter(|llc| llc.size_bytes >= Some(enough));
    let large = large.fold(CpuSet::EMPTY, |all, llc| all | llc.cpus);
    (!large.is_empty() && large != topology.online()).then_some(large)
}

/// Where the memory of a guest node is, or of the whole guest.
struct Memory {
    bytes: BTreeMap<NodeId, u64>,
    total: u64,
}

impl Memory {
    fn of(case: &Case, guest_node: Option<usize>) -> Memory {
        let mut memory = Memory { bytes: BTreeMap::new(), total: 0 };
        let of_node = |node: Option<u32>| node.map(|node| node as usize) == guest_node;
        let pieces = case.guest.memory.iter();
        for piece in pieces.filter(|piece| guest_node.is_none() || of_node(piece.guest_node)) {
            memory.total += piece.bytes;
            for node in &piece.bound {
                let bytes = piece.bytes / piece.bound.len() as u64;
                *memory.bytes.entry(*node).or_default() += bytes;
            }
        }
        // What lies somewhere without being bound is known of the whole guest alone.
        let lies = &case.surroundings.memory_on;
        let in_all: u64 = lies.values().sum();
        if memory.bytes.is_empty() && guest_node.is_none() && in_all >= 128 << 20 {
            memory.bytes.clone_from(lies);
            memory.total = memory.total.max(in_all);
        }
        memory
    }

    fn remote(&self, node: NodeId) -> Remote {
        let eighths = |bytes: u64| (bytes * 8).checked_div(self.total).unwrap_or(0).min(8);
        if self.bytes.values().all(|bytes| eighths(*bytes) == 0) {
            return 0;
        }
        let here = self.bytes.get(&node).copied().unwrap_or(0);
        u32::try_from(8 - eighths(here)).expect("at most 8")
    }
}
