//! The machine as the planner sees it: *groups* of cores, and which of them are free.
//!
//! ```text
//!   group  = the CPUs of one kind behind one last-level cache, on one node
//!            (where caches say nothing: of one die, else node, else the whole machine)
//!   core   = SMT siblings; it goes to a VM whole, or not at all
//!   free   = none of its CPUs is reserved, shared, or another VM's
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use super::report::Placed;
use crate::cpuset::CpuSet;
use crate::ids::{CpuId, LlcId, NodeId, VcpuIndex};
use crate::topology::{Core, CoreKind, Topology};

/// An L3 this large, and [`LARGE_CACHE_RATIO`] times the smallest, is stacked cache (X3D) rather
/// than a product's ordinary unevenness: parts with 16 and 8 MiB L3s exist, and have none.
const LARGE_CACHE_BYTES: u64 = 64 << 20;
const LARGE_CACHE_RATIO: u64 = 2;
/// Ranks that differ by less than such a part of the best are taken for the same.
const RANK_STEPS: u32 = 20;

/// A core that may be given away. It borrows: a plan looks at every core of the machine and uses few.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreeCore<'a> {
    core: &'a Core,
    only: Option<&'a CpuSet>,
    /// How many of its CPUs are usable, from the first on.
    pub(super) threads: usize,
    /// How many others, which come before these, another guest node of this VM has.
    taken: usize,
}

impl FreeCore<'_> {
    /// The CPUs of it that are free, also those that are to be idle.
    pub(super) fn free(&self) -> CpuSet {
        self.only.map_or(self.core.cpus, |only| self.core.cpus & *only)
    }

    /// The CPUs of it that may be used.
    pub(super) fn usable(&self) -> CpuSet {
        let cpus = self.free();
        if self.threads == cpus.len() {
            return cpus;
        }
        cpus.iter().skip(self.taken).take(self.threads).collect()
    }

    /// Whether any of its CPUs, usable or not, is in the set.
    pub(super) fn intersects(&self, cpus: &CpuSet) -> bool {
        self.core.cpus.intersects(cpus)
    }

    /// The place after its last usable CPU.
    pub(super) fn end(&self) -> usize {
        self.taken + self.threads
    }

    /// Whether there is a usable CPU of that place among its siblings.
    pub(super) fn has_thread(&self, at: usize) -> bool {
        (self.taken..self.end()).contains(&at)
    }

    /// The usable CPU of that place among its siblings.
    pub(super) fn thread(&self, at: usize) -> Option<CpuId> {
        self.free().iter().nth(at).filter(|_| self.has_thread(at))
    }

    /// The first vCPU of another guest node that is on it.
    pub(super) fn first(&self, placed: &[Placed]) -> Option<VcpuIndex> {
        let is_here = |placed: &&Placed| self.core.cpus.contains(placed.cpu);
        if self.taken == 0 { None } else { placed.iter().find(is_here).map(|first| first.vcpu) }
    }

    /// Takes those of its CPUs that are used, which are its first. Returns whether some are left.
    fn take(&mut self, used: &CpuSet) -> bool {
        let more = (self.usable() & *used).len();
        self.taken += more;
        self.threads -= more;
        self.threads > 0
    }
}

/// A machine, and what is worked out of it once for all its plans.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// As it was read.
    pub topology: &'a Topology,
    /// All online CPUs.
    pub(super) online: CpuSet,
    /// Whether caches distinguish cores: each is known, and some cache has more than one core.
    pub(super) caches_group_cores: bool,
    places: Vec<Place>,
    /// Those of each place, with all their threads.
    cores: Vec<Vec<FreeCore<'a>>>,
}

/// Where a group is, and what it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Where its first core stands: groups are ordered by it.
    pub(super) order: usize,
    pub(super) node: Option<NodeId>,
    /// Its first core's.
    pub(super) llc: Option<LlcId>,
    pub(super) kind: Option<CoreKind>,
    pub(super) large_cache: bool,
    /// All its online CPUs, free or not.
    pub(super) cpus: CpuSet,
}

/// Cores of one kind behind one cache, on one node.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    place: &'a Place,
    /// Whether CPUs of it are reserved for the host.
    pub(super) has_reserved: bool,
    pub(super) free: Vec<FreeCore<'a>>,
    /// How many CPUs of the free cores others count on.
    pub(super) promised: usize,
}

impl Deref for Group<'_> {
    type Target = Place;

    fn deref(&self) -> &Place {
        self.place
    }
}

impl Group<'_> {
    /// Puts the cores last whose CPUs others count on, for what is first is taken first.
    pub(super) fn spare(&mut self, promised: &CpuSet) {
        let lost = |free: &FreeCore<'_>| (free.core.cpus & *promised).len();
        self.free.sort_by_key(lost);
        self.promised = self.free.iter().map(lost).sum();
    }

    /// Takes CPUs that another guest node of the VM has. What that leaves of a core is used last.
    pub(super) fn take(&mut self, used: &CpuSet) {
        self.free.retain_mut(|core| core.take(used));
        self.free.sort_by_key(|core| core.taken > 0);
    }

    /// Free cores that no other guest node of the VM is on.
    pub(super) fn free_cores(&self) -> usize {
        self.free.iter().filter(|core| core.taken == 0).count()
    }

    /// Free CPUs in all.
    pub(super) fn free_cpus(&self) -> usize {
        self.free.iter().map(|core| core.threads).sum()
    }

    /// Free cores with at least that many usable CPUs.
    pub(super) fn free_cores_of(&self, threads: usize) -> usize {
        self.free.iter().filter(|core| core.threads >= threads).count()
    }
}

/// Every CPU that the groups have to give.
pub(super) fn free_cpus(groups: &[Group<'_>]) -> CpuSet {
    let cores = groups.iter().flat_map(|group| &group.free);
    cores.fold(CpuSet::EMPTY, |all, core| all | core.usable())
}

/// What decides where a core is grouped. The first that distinguishes cores without making every
/// core a group of its own is used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Llc(u32),
    Die(Option<u32>, Option<u32>),
    Node(u32),
    Machine,
}

fn by_llc(core: &Core) -> Option<Key> {
    core.llc.map(|llc| Key::Llc(llc.0))
}

fn by_die(core: &Core) -> Option<Key> {
    core.die.map(|die| Key::Die(core.package, Some(die)))
}

fn by_node(core: &Core) -> Option<Key> {
    core.node.map(|node| Key::Node(node.0))
}

fn caches_group_cores(topology: &Topology) -> bool {
    let cores = &topology.cores;
    // LLC ids are dense, so as many caches as cores means one for each.
    cores.iter().all(|core| core.llc.is_some())
        && (topology.llcs.len() < cores.len() || cores.len() == 1)
}

fn grouping(topology: &Topology) -> fn(&Core) -> Option<Key> {
    if caches_group_cores(topology) {
        return by_llc;
    }
    let cores = &topology.cores;
    for key in [by_die, by_node] {
        let keys: Option<BTreeSet<Key>> = cores.iter().map(key).collect();
        if keys.is_some_and(|keys| keys.len() < cores.len() || cores.len() == 1) {
            return key;
        }
    }
    |_| Some(Key::Machine)
}

/// Of cores behind one cache, those that the processor prefers come first. A small difference is none: ranks of the
/// kernel's change while the machine runs.
fn best_first(cores: &mut [FreeCore<'_>]) {
    let best = cores.iter().filter_map(|free| free.core.rank).max().unwrap_or(0);
    let step = (best / RANK_STEPS).max(1);
    // One that is not known is no worse than the best.
    cores.sort_by_key(|free| free.core.rank.map_or(0, |rank| (best - rank) / step));
}

impl<'a> Machine<'a> {
    /// Forms the groups of a machine.
    #[must_use]
    pub fn of(topology: &'a Topology) -> Machine<'a> {
        let key = grouping(topology);
        let caches_group_cores = caches_group_cores(topology);
        let smallest = topology.llcs.iter().filter_map(|llc| llc.size_bytes).min().unwrap_or(0);
        let (mut places, mut cores): (Vec<Place>, Vec<Vec<FreeCore<'_>>>) = Default::default();
        let mut known = BTreeMap::new();
        for (order, core) in topology.cores.iter().enumerate() {
            // A cache may reach over nodes (sub-NUMA clustering); a group does not.
            let here = (key(core), core.node, core.kind);
            let at = *known.entry(here).or_insert_with(|| {
                let llc = core.llc.filter(|_| caches_group_cores);
                let size = llc.and_then(|llc| topology.llcs.get(llc.0 as usize)?.size_bytes);
                places.push(Place {
                    order,
                    node: core.node,
                    llc: core.llc,
                    kind: core.kind,
                    large_cache: size.is_some_and(|size| {
                        size >= LARGE_CACHE_BYTES
                            && size >= smallest.saturating_mul(LARGE_CACHE_RATIO)
                    }),
                    cpus: CpuSet::EMPTY,
                });
                cores.push(Vec::new());
                places.len() - 1
            });
            places[at].cpus |= core.cpus;
            cores[at].push(FreeCore { core, only: None, threads: core.cpus.len(), taken: 0 });
        }
        for cores in &mut cores {
            best_first(cores);
        }
        Machine { topology, online: topology.online(), caches_group_cores, places, cores }
    }

    /// The set with every core it touches made whole.
    pub(super) fn whole_cores(&self, cpus: &CpuSet) -> CpuSet {
        let mut whole = *cpus;
        if cpus.len() <= self.places.len() {
            let cores = cpus.iter().filter_map(|cpu| self.topology.core_of(cpu));
            cores.for_each(|core| whole |= core.cpus);
            return whole;
        }
        for (place, cores) in self.places.iter().zip(&self.cores) {
            // Most groups are another's as a whole, or not at all.
            if place.cpus.intersects(cpus) && !place.cpus.is_subset(cpus) {
                let touched = cores.iter().filter(|free| free.core.cpus.intersects(cpus));
                touched.for_each(|free| whole |= free.core.cpus);
            }
        }
        whole
    }

    /// The groups with the cores that are free: none of its CPUs is in `blocked` and, with CPUs given by hand (`only`),
    /// at least one of them is given: then just those are usable.
    pub(super) fn groups<'b>(
        &'b self,
        reserved: &CpuSet,
        blocked: &CpuSet,
        only: Option<&'b CpuSet>,
    ) -> Vec<Group<'b>> {
        let usable = |free: &FreeCore<'b>| {
            let threads = only.map_or(free.threads, |only| (free.core.cpus & *only).len());
            (threads > 0).then_some(FreeCore { only, threads, ..*free })
        };
        let group = |(place, cores): (&'b Place, &'b Vec<FreeCore<'a>>)| {
            let free = if place.cpus.is_subset(blocked) {
                Vec::new()
            } else if !place.cpus.intersects(blocked) && only.is_none() {
                cores.clone()
            } else {
                let free = cores.iter().filter(|free| !free.core.cpus.intersects(blocked));
                free.filter_map(usable).collect()
            };
            Group { place, has_reserved: place.cpus.intersects(reserved), free, promised: 0 }
        };
        self.places.iter().zip(&self.cores).map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::CoreId;

    #[test]
    fn cores_that_the_processor_prefers_come_first_and_a_small_difference_is_none() {
        let ordered = |ranks: [Option<u32>; 4]| -> Vec<usize> {
            let core = |(at, rank): (u32, Option<u32>)| Core {
                id: CoreId(at),
                cpus: CpuId::from_index(at as usize).map(CpuSet::single).unwrap_or_default(),
                llc: Some(LlcId(0)),
                node: None,
                package: None,
                die: None,
                kind: None,
                rank,
            };
            let cores: Vec<Core> = (0..).zip(ranks).map(core).collect();
            let topology = Topology { cores, ..Topology::default() };
            let machine = Machine::of(&topology);
            let groups = machine.groups(&CpuSet::EMPTY, &CpuSet::EMPTY, None);
            let first = |core: &FreeCore<'_>| core.thread(0).map(CpuId::index);
            groups.iter().flat_map(|group| &group.free).filter_map(first).collect()
        };
        assert_eq!(ordered([None; 4]), [0, 1, 2, 3]);
        assert_eq!(ordered([Some(166), Some(231), Some(226), Some(196)]), [1, 2, 3, 0]);
        assert_eq!(ordered([Some(226), Some(231), None, Some(1)]), [0, 1, 2, 3]);
        assert_eq!(ordered([Some(0), Some(0), Some(3), Some(0)]), [2, 0, 1, 3]);
    }
}
