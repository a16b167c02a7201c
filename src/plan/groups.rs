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
            cores: group.free.len(),
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
/// hold it. Groups near the memory of `pull` come first, of these the ones that are not `far`, others only where those do not
/// hold it.
/// `elsewhere` are the nodes that other NUMA nodes of this guest have: who gives a guest nodes wants
/// them on different ones, as near as can be.
pub(super) fn choose(
    topology: &Topology,
    groups: &[Group<'_>],
    need: Need,
    elsewhere: &[NodeId],
    pull: &Pull,
    far: &dyn Fn(Option<NodeId>) -> Far,
) -> Option<Vec<usize>> {
    for kinds in KINDS {
        let able = |at: &usize| kinds.contains(&groups[*at].kind) && !groups[*at].free.is_empty();
        let remote = |at: usize| (pull.remote(topology, groups[at].node), far(groups[at].node));
        let mut able: Vec<((Remote, Far), usize)> =
            (0..groups.len()).filter(able).map(|at| (remote(at), at)).collect();
        able.sort_unstable();
        let mut ends: Vec<usize> =
            (1..able.len()).filter(|at| able[*at].0 != able[*at - 1].0).collect();
        ends.push(able.len());
        for end in ends {
            let mut near: Vec<usize> = able[..end].iter().map(|(_, at)| *at).collect();
            near.sort_unstable();
            let chosen = one(topology, groups, &near, need, elsewhere)
                .map(|at| vec![at])
                .or_else(|| several(topology, groups, &near, need, elsewhere));
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
/// first.
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
            Reverse(group.free.len() >= need.cores),
            Reverse(group.large_cache),
            group.has_reserved,
            group.free.len(),
            group.order,
        )
    })
}

/// The fewest groups that hold it together: within one node where a node holds it, else over the
/// nearest nodes.
fn several(
    topology: &Topology,
    groups: &[Group<'_>],
    able: &[usize],
    need: Need,
    elsewhere: &[NodeId],
) -> Option<Vec<usize>> {
    let mut nodes: Vec<Option<NodeId>> = able.iter().map(|at| groups[*at].node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let within = nodes
        .iter()
        .filter_map(|node| {
            let here: Vec<usize> =
                able.iter().copied().filter(|at| groups[*at].node == *node).collect();
            let chosen = fewest(groups, here, need)?;
            let reserved = chosen.iter().any(|at| groups[*at].has_reserved);
            let left: usize = chosen.iter().map(|at| groups[*at].free.len()).sum();
            let remote = remoteness(topology, *node, elsewhere);
            Some(((remote, chosen.len(), reserved, left, *node), chosen))
        })
        .min_by_key(|(score, _)| *score);
    if let Some((_, chosen)) = within {
        return Some(chosen);
    }
    let start = nodes.iter().copied().max_by_key(|node| {
        let free: usize = able
            .iter()
            .filter(|at| groups[**at].node == *node)
            .map(|at| groups[*at].free_cpus())
            .sum();
        (Reverse(remoteness(topology, *node, elsewhere)), free, Reverse(*node))
    })?;
    let start: Vec<NodeId> = start.into_iter().collect();
    nodes.sort_by_key(|node| (distance(topology, *node, &start), *node));
    let mut here = Vec::new();
    for node in nodes {
        here.extend(able.iter().copied().filter(|at| groups[*at].node == node));
        if let Some(chosen) = fewest(groups, here.clone(), need) {
            return Some(chosen);
        }
    }
    None
}

/// Fast cores first, the largest groups first, until the rest fits into one; for that, the tightest. They are filled in
/// this order, so that most vCPUs are behind one cache.
fn fewest(groups: &[Group<'_>], mut here: Vec<usize>, need: Need) -> Option<Vec<usize>> {
    here.sort_by_key(|at| {
        let room = Room::of(&groups[*at], need);
        let size = if need.threads > 1 { room.wide } else { room.cpus };
        let small = groups[*at].kind == Some(CoreKind::Efficiency);
        (small, Reverse(size), Reverse(room.cores), groups[*at].order)
    });
    let mut room = Room::default();
    let mut chosen = Vec::new();
    while !here.is_empty() {
        let closes = |at: &usize| room.with(Room::of(&groups[*at], need)).holds(need);
        let last = here.iter().copied().filter(closes).min_by_key(|at| {
            let group = &groups[*at];
            (group.has_reserved, group.free.len(), group.order)
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
