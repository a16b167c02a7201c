//! The machine as the planner sees it: *groups* of cores, and which of them are free.
//!
//! ```text
//!   group  = the CPUs of one kind behind one last-level cache, on one node
//!            (where caches say nothing: of one die, else node, else the whole machine)
//!   core   = SMT siblings; it goes to a VM whole, or not at all
//!   free   = none of its CPUs is reserved, shared, or another VM's
//! ```

use std::collections::BTreeSet;

use super::Request;
use crate::cpuset::CpuSet;
use crate::ids::{CpuId, LlcId, NodeId};
use crate::topology::{Core, CoreKind, Topology};

/// An L3 this large, and [`LARGE_CACHE_RATIO`] times the smallest, is stacked cache (X3D) rather
/// than a product's ordinary unevenness: parts with 16 and 8 MiB L3s exist, and have none.
const LARGE_CACHE_BYTES: u64 = 64 << 20;
const LARGE_CACHE_RATIO: u64 = 2;

/// A core that may be given away. It borrows: a plan looks at every core of the machine and uses few.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreeCore<'a> {
    core: &'a Core,
    only: Option<&'a CpuSet>,
    /// How many of its CPUs are usable.
    pub(super) threads: usize,
}

impl FreeCore<'_> {
    /// The CPUs of it that may be used.
    pub(super) fn usable(&self) -> CpuSet {
        self.only.map_or(self.core.cpus, |only| self.core.cpus & *only)
    }

    /// The usable CPU of that place among its siblings.
    pub(super) fn thread(&self, at: usize) -> Option<CpuId> {
        self.usable().iter().nth(at)
    }
}

/// Cores of one kind behind one cache, on one node.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    /// Where its first core stands: groups are ordered by it.
    pub(super) order: usize,
    pub(super) node: Option<NodeId>,
    /// Its first core's.
    pub(super) llc: Option<LlcId>,
    pub(super) kind: Option<CoreKind>,
    pub(super) large_cache: bool,
    /// Whether CPUs of it are reserved for the host.
    pub(super) has_reserved: bool,
    /// All its online CPUs, free or not.
    pub(super) cpus: CpuSet,
    pub(super) free: Vec<FreeCore<'a>>,
}

impl Group<'_> {
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

/// The set with every core it touches made whole.
pub(super) fn whole_cores(request: &Request<'_>, cpus: &CpuSet) -> CpuSet {
    let cores = cpus.iter().filter_map(|cpu| request.topology.core_of(cpu));
    cores.fold(*cpus, |all, core| all | core.cpus)
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

/// Whether caches distinguish cores: each is known, and some cache has more than one core.
pub(super) fn caches_group_cores(topology: &Topology) -> bool {
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

/// Forms the groups. A core is free where none of its CPUs is in `blocked` and, with CPUs given by
/// hand (`only`), where at least one of them is given: then just those are usable.
pub(super) fn groups<'a>(
    topology: &'a Topology,
    reserved: &CpuSet,
    blocked: &CpuSet,
    only: Option<&'a CpuSet>,
) -> Vec<Group<'a>> {
    let key = grouping(topology);
    let smallest = topology.llcs.iter().filter_map(|llc| llc.size_bytes).min().unwrap_or(0);
    let mut groups: Vec<Group<'a>> = Vec::with_capacity(topology.llcs.len());
    // Sorted by what makes a group. Ids are dense in the order of cores, so a new one is mostly the
    // last, and mates mostly follow each other.
    let mut places: Vec<(_, usize)> = Vec::with_capacity(topology.llcs.len());
    let mut last = None;
    for (at, core) in topology.cores.iter().enumerate() {
        // A cache may reach over nodes (sub-NUMA clustering); a group does not.
        let here = (key(core), core.node, core.kind);
        let known = match last {
            Some((before, place)) if before == here => Ok(place),
            _ => match places.binary_search_by_key(&here, |(other, _)| *other) {
                Ok(found) => Ok(places[found].1),
                Err(slot) => Err(slot),
            },
        };
        let place = known.unwrap_or_else(|slot| {
            let size = core.llc.and_then(|llc| topology.llcs.get(llc.0 as usize)?.size_bytes);
            groups.push(Group {
                order: at,
                node: core.node,
                llc: core.llc,
                kind: core.kind,
                large_cache: size.is_some_and(|size| {
                    size >= LARGE_CACHE_BYTES && size >= smallest.saturating_mul(LARGE_CACHE_RATIO)
                }),
                has_reserved: false,
                cpus: CpuSet::EMPTY,
                free: Vec::new(),
            });
            places.insert(slot, (here, groups.len() - 1));
            groups.len() - 1
        });
        last = Some((here, place));
        let group = &mut groups[place];
        group.cpus |= core.cpus;
        if core.cpus.intersects(blocked) {
            continue;
        }
        let threads = only.map_or_else(|| core.cpus.len(), |only| (core.cpus & *only).len());
        if threads > 0 {
            group.free.push(FreeCore { core, only, threads });
        }
    }
    for group in &mut groups {
        group.has_reserved = group.cpus.intersects(reserved);
    }
    groups
}
