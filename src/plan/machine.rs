//! The machine as the planner sees it: *groups* of cores, and which of them are free.
//!
//! ```text
//!   group  = the CPUs of one kind behind one last-level cache
//!            (where that tells nothing: of one die, else node, else the whole machine)
//!   core   = SMT siblings; it goes to a VM whole, or not at all
//!   free   = none of its CPUs is reserved, shared, or another VM's
//! ```

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, NodeId};
use crate::topology::{Core, CoreKind, Topology};

/// An L3 this large, and [`LARGE_CACHE_RATIO`] times the smallest, is stacked cache (X3D) rather
/// than a product's ordinary unevenness: parts with 16 and 8 MiB L3s exist, and have none.
const LARGE_CACHE_BYTES: u64 = 64 << 20;
const LARGE_CACHE_RATIO: u64 = 2;

/// A core that may be given away, with the CPUs of it that may be used.
#[derive(Clone, Debug)]
pub(super) struct FreeCore {
    /// Usable CPUs, ascending.
    pub(super) cpus: Vec<CpuId>,
}

/// Cores of one kind behind one cache.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// Where its first core stands: groups are ordered by it.
    pub(super) order: usize,
    pub(super) node: Option<NodeId>,
    pub(super) kind: Option<CoreKind>,
    pub(super) large_cache: bool,
    /// Whether CPUs of it are reserved for the host.
    pub(super) has_reserved: bool,
    /// All its online CPUs, free or not.
    pub(super) cpus: CpuSet,
    pub(super) free: Vec<FreeCore>,
}

impl Group {
    /// Free CPUs in all.
    pub(super) fn free_cpus(&self) -> usize {
        self.free.iter().map(|core| core.cpus.len()).sum()
    }

    /// Free cores with at least that many usable CPUs.
    pub(super) fn free_cores_of(&self, threads: usize) -> usize {
        self.free.iter().filter(|core| core.cpus.len() >= threads).count()
    }
}

/// What decides where a core is grouped. The first that tells cores apart without making every
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

fn grouping(cores: &[Core]) -> fn(&Core) -> Option<Key> {
    for key in [by_llc, by_die, by_node] {
        let mut sizes: BTreeMap<Key, usize> = BTreeMap::new();
        let known = cores.iter().all(|core| {
            key(core).is_some_and(|key| {
                *sizes.entry(key).or_default() += 1;
                true
            })
        });
        let all_single = sizes.len() == cores.len() && cores.len() > 1;
        if known && !all_single {
            return key;
        }
    }
    |_| Some(Key::Machine)
}

/// Forms the groups. A core is free where none of its CPUs is in `blocked` and, with CPUs given by
/// hand (`only`), where at least one of them is given: then just those are usable.
pub(super) fn groups(
    topology: &Topology,
    reserved: &CpuSet,
    blocked: &CpuSet,
    only: Option<&CpuSet>,
) -> Vec<Group> {
    let key = grouping(&topology.cores);
    let smallest = topology.llcs.iter().filter_map(|llc| llc.size_bytes).min().unwrap_or(0);
    let mut places: BTreeMap<(Option<Key>, Option<CoreKind>), usize> = BTreeMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for (at, core) in topology.cores.iter().enumerate() {
        let place = *places.entry((key(core), core.kind)).or_insert_with(|| {
            let size = core.llc.and_then(|llc| topology.llcs.get(llc.0 as usize)?.size_bytes);
            groups.push(Group {
                order: at,
                node: core.node,
                kind: core.kind,
                large_cache: size.is_some_and(|size| {
                    size >= LARGE_CACHE_BYTES && size >= smallest.saturating_mul(LARGE_CACHE_RATIO)
                }),
                has_reserved: false,
                cpus: CpuSet::EMPTY,
                free: Vec::new(),
            });
            groups.len() - 1
        });
        let group = &mut groups[place];
        group.cpus |= core.cpus;
        group.has_reserved |= core.cpus.intersects(reserved);
        let usable = match only {
            Some(only) => core.cpus & *only,
            None => core.cpus,
        };
        if !usable.is_empty() && !core.cpus.intersects(blocked) {
            group.free.push(FreeCore { cpus: usable.iter().collect() });
        }
    }
    groups
}
