//! Which groups a VM's vCPUs go to: one where they fit, else the fewest and nearest.

use std::cmp::Reverse;

use super::devices::Far;
use super::machine::Group;
use super::memory::{Pull, Remote};
use crate::ids::NodeId;
use crate::topology::{CoreKind, Topology};

/// What a guest, or one of its NUMA nodes, needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) vcpus: usize,
    /// Cores, for each guest core to have its own.
    pub(super) cores: usize,
    /// How many vCPUs a core must take: more than one where guest siblings are to be together.
    pub(super) threads: usize,
    /// How many of the cores must take that many.
    pub(super) wide: usize,
}

/// What free cores have to give.
#[derive(Clone, Copy, Default)]
struct Room {
    cpus: usize,
    cores: usize,
    wide: usize,
}

impl Room {
    fn of(group: &Group<'_>, need: Need) -> Room {
        Room {
            cpus: group.free_cpus(),
            cores: group.free_cores(),
            wide: group.free_cores_of(need.threads),
        }
    }

    fn with(self, other: Room) -> Room {
        Room {
            cpus: self.cpus + other.cpus,
            cores: self.cores + other.cores,
            wide: self.wide + other.wide,
        }
    }

    /// With guest siblings every guest core needs a core; without, vCPUs may double up on the
    /// siblings of their own VM's cores.
    fn holds(self, need: Need) -> bool {
        if need.threads > 1 {
            self.cores >= need.cores && self.wide >= need.wide
        } else {
            self.cpus >= need.vcpus
        }
    }
}

/// How kinds of cores are mixed, in order of preference.
const KINDS: [&[Option<CoreKind>]; 3] = [
    &[None, Some(CoreKind::Performance)],
    &[Some(CoreKind::Efficiency)],
    &[None, Some(CoreKind::Performance), Some(CoreKind::Efficiency)],
];

/// The groups to use, in the order to fill them, as places in `groups`. `None`: all together do not
/// hold it. Groups near the memory of `pull` come first, of these the ones that are not `far`, others only
/// where those do not hold it; then
/// the kinds of cores count, and then nodes. `elsewhere` are the nodes that other NUMA nodes of this
/// guest have: who gives a guest nodes wants them on different ones, as near as can be.
pub(super) fn choose(
    topology: &Topology,
    groups: &[Group<'_>],
    need: Need,
    elsewhere: &[NodeId],
    pull: &Pull,
    far: &dyn Fn(Option<NodeId>) -> Far,
) -> Option<Vec<usize>> {
    let remote = |at: usize| (pull.remote(topology, groups[at].node), far(groups[at].node));
    let mut all: Vec<((Remote, Far), usize)> = (0..groups.len())
        .filter(|at| !groups[*at].free.is_empty())
        .map(|at| (remote(at), at))
        .collect();
    all.sort_unstable();
    let mut ends: Vec<usize> = (1..all.len()).filter(|at| all[*at].0 != all[*at - 1].0).collect();
    ends.push(all.len());
    let in_a_node = |able: &[usize]| {
        let one = one(topology, groups, able, need, elsewhere).map(|at| vec![at]);
        one.or_else(|| within(topology, groups, able, need, elsewhere))
    };
    for end in ends {
        for kinds in KINDS {
            let near = all[..end].iter().map(|(_, at)| *at);
            let mut able: Vec<usize> =
                near.filter(|at| kinds.contains(&groups[*at].kind)).collect();
            able.sort_unstable();
            let is_apart = |at: &usize| !remoteness(topology, groups[*at].node, elsewhere).0;
            let apart: Vec<usize> = able.iter().copied().filter(is_apart).collect();
            let chosen = in_a_node(&apart)
                .or_else(|| if apart == able { None } else { in_a_node(&able) })
                .or_else(|| across(topology, groups, &able, need, elsewhere));
            if chosen.is_some() {
                return chosen;
            }
        }
    }
    None
}

/// How far a node is from those in `from`: 0 for one of them, or where there are none.
pub(super) fn distance(topology: &Topology, node: Option<NodeId>, from: &[NodeId]) -> u32 {
    let Some(node) = node else { return 0 };
    if from.is_empty() || from.contains(&node) {
        return 0;
    }
    let distances = from.iter().filter_map(|other| topology.distance(*other, node));
    distances.min().unwrap_or(u32::MAX)
}

/// Whether a node has another part of the guest, and how far it is from the nearest that has.
fn remoteness(topology: &Topology, node: Option<NodeId>, elsewhere: &[NodeId]) -> (bool, u32) {
    let taken = node.is_some_and(|node| elsewhere.contains(&node));
    (taken, distance(topology, node, elsewhere))
}

/// The best single group. In order: another node than the guest's other nodes, and near; a core for
/// each vCPU; stacked cache; away from the host's reserved CPUs; the fewest cores left over; the
/// fewest CPUs that others count on; the first.
fn one(
    topology: &Topology,
    groups: &[Group<'_>],
    able: &[usize],
    need: Need,
    elsewhere: &[NodeId],
) -> Option<usize> {
    able.iter().copied().filter(|at| Room::of(&groups[*at], need).holds(need)).min_by_key(|at| {
        let group = &groups[*at];
        (
            remoteness(topology, group.node, elsewhere),
            Reverse(group.free_cores() >= need.cores),
            Reverse(group.large_cache),
            group.has_reserved,
            left_over(group, need, Room::default()),
            group.promised,
            group.order,
        )
    })
}

/// How many cores of a group are left over where it takes what other groups (`room`) do not hold. Of
/// groups that leave as many, one with more cores comes first: fewer vCPUs share a core.
fn left_over(group: &Group<'_>, need: Need, room: Room) -> (usize, Reverse<usize>) {
    let takes = if need.threads > 1 {
        need.cores.saturating_sub(room.cores)
    } else {
        need.vcpus.saturating_sub(room.cpus)
    };
    let cores = group.free_cores();
    (cores.saturating_sub(takes), Reverse(cores))
}

/// The nodes of these groups.
fn nodes_of(groups: &[Group<'_>], able: &[usize]) -> Vec<Option<NodeId>> {
    let mut nodes: Vec<Option<NodeId>> = able.iter().map(|at| groups[*at].node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

/// Those of these groups that are on a node.
fn on_node(groups: &[Group<'_>], able: &[usize], node: Option<NodeId>) -> Vec<usize> {
    able.iter().copied().filter(|at| groups[*at].node == node).collect()
}

/// The fewest groups of one node that hold it together; of as many, those with stacked cache alone.
fn within(
    topology: &Topology,
    groups: &[Group<'_>],
    able: &[usize],
    need: Need,
    elsewhere: &[NodeId],
) -> Option<Vec<usize>> {
    let of = |node: Option<NodeId>| {
        let here = on_node(groups, able, node);
        let large = here.iter().copied().filter(|at| groups[*at].large_cache).collect();
        let chosen = fewest(groups, here, need)?;
        let large = fewest(groups, large, need).filter(|large| large.len() == chosen.len());
        let chosen = large.unwrap_or(chosen);
        let reserved = chosen.iter().any(|at| groups[*at].has_reserved);
        let left: usize = chosen.iter().map(|at| groups[*at].free_cores()).sum();
        let remote = remoteness(topology, node, elsewhere);
        Some(((remote, chosen.len(), reserved, left, node), chosen))
    };
    let each = nodes_of(groups, able).into_iter().filter_map(of);
    each.min_by_key(|(score, _)| *score).map(|(_, chosen)| chosen)
}

/// The fewest groups that hold it together, over the nearest nodes.
fn across(
    topology: &Topology,
    groups: &[Group<'_>],
    able: &[usize],
    need: Need,
    elsewhere: &[NodeId],
) -> Option<Vec<usize>> {
    let mut nodes = nodes_of(groups, able);
    let start = nodes.iter().copied().max_by_key(|node| {
        let here = on_node(groups, able, *node);
        let free: usize = here.into_iter().map(|at| groups[at].free_cpus()).sum();
        (Reverse(remoteness(topology, *node, elsewhere)), free, Reverse(*node))
    })?;
    let start: Vec<NodeId> = start.into_iter().collect();
    nodes.sort_by_key(|node| (distance(topology, *node, &start), *node));
    let mut here = Vec::new();
    for node in nodes {
        here.extend(on_node(groups, able, node));
        if let Some(chosen) = fewest(groups, here.clone(), need) {
            return Some(chosen);
        }
    }
    None
}

/// Fast cores first, the largest groups first, until the rest fits into one; for that, one behind a
/// cache that is in use already, else the tightest. They are filled in this order, so that most vCPUs
/// are behind one cache.
fn fewest(groups: &[Group<'_>], mut here: Vec<usize>, need: Need) -> Option<Vec<usize>> {
    here.sort_by_key(|at| {
        let room = Room::of(&groups[*at], need);
        let size = if need.threads > 1 { room.wide } else { room.cpus };
        let small = groups[*at].kind == Some(CoreKind::Efficiency);
        let Group { has_reserved, promised, .. } = groups[*at];
        (small, Reverse(size), Reverse(room.cores), has_reserved, promised, groups[*at].order)
    });
    let mut room = Room::default();
    let mut chosen = Vec::new();
    while !here.is_empty() {
        let closes = |at: &usize| room.with(Room::of(&groups[*at], need)).holds(need);
        let last = here.iter().copied().filter(closes).min_by_key(|at| {
            let group = &groups[*at];
            let is_new = !chosen.iter().any(|at: &usize| groups[*at].llc == group.llc);
            let left = left_over(group, need, room);
            (is_new, group.has_reserved, left, group.promised, group.order)
        });
        if let Some(last) = last {
            chosen.push(last);
            return Some(chosen);
        }
        let largest = here.remove(0);
        room = room.with(Room::of(&groups[largest], need));
        chosen.push(largest);
    }
    None
}
