//! Which groups a VM's vCPUs go to: one where they fit, else the fewest and nearest.

use std::cmp::Reverse;

use super::machine::Group;
use crate::ids::NodeId;
use crate::topology::{CoreKind, Topology};

/// What a guest, or one of its NUMA nodes, needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) vcpus: usize,
    /// Guest cores.
    pub(super) cores: usize,
    /// The most vCPUs that one guest core has.
    pub(super) threads: usize,
}

impl Need {
    /// Whether free cores and CPUs of these numbers hold it. With guest siblings every guest core
    /// needs a core; without, vCPUs may double up on the siblings of their own VM's cores.
    fn fits(self, cores: usize, cpus: usize) -> bool {
        if self.threads > 1 { cores >= self.cores } else { cpus >= self.vcpus }
    }

    fn fits_group(self, group: &Group) -> bool {
        self.fits(group.free_cores_of(self.threads), group.free_cpus())
    }
}

/// How kinds of cores are mixed, in order of preference.
const KINDS: [&[Option<CoreKind>]; 3] = [
    &[None, Some(CoreKind::Performance)],
    &[Some(CoreKind::Efficiency)],
    &[None, Some(CoreKind::Performance), Some(CoreKind::Efficiency)],
];

/// The groups to use, in the order to fill them, as places in `groups`. `None`: all together do not
/// hold it. `near` are nodes already in use by this VM: they come first.
pub(super) fn choose(
    topology: &Topology,
    groups: &[Group],
    need: Need,
    near: &[NodeId],
) -> Option<Vec<usize>> {
    for kinds in KINDS {
        let able: Vec<usize> = (0..groups.len())
            .filter(|at| kinds.contains(&groups[*at].kind) && !groups[*at].free.is_empty())
            .collect();
        let chosen = one(topology, groups, &able, need, near)
            .map(|at| vec![at])
            .or_else(|| several(topology, groups, &able, need, near));
        if chosen.is_some() {
            return chosen;
        }
    }
    None
}

/// How far a group is from the nodes in use: 0 for one of them, or where there are none yet.
fn remoteness(topology: &Topology, node: Option<NodeId>, near: &[NodeId]) -> u32 {
    let Some(node) = node else { return 0 };
    if near.is_empty() || near.contains(&node) {
        return 0;
    }
    let distances = near.iter().filter_map(|other| topology.distance(*other, node));
    distances.min().unwrap_or(u32::MAX)
}

/// The best single group. In order: near; stacked cache; a core for each vCPU; away from the host's
/// reserved CPUs; the fewest cores left over; the first.
fn one(
    topology: &Topology,
    groups: &[Group],
    able: &[usize],
    need: Need,
    near: &[NodeId],
) -> Option<usize> {
    able.iter().copied().filter(|at| need.fits_group(&groups[*at])).min_by_key(|at| {
        let group = &groups[*at];
        (
            remoteness(topology, group.node, near),
            Reverse(group.large_cache),
            Reverse(group.free.len() >= need.cores),
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
    groups: &[Group],
    able: &[usize],
    need: Need,
    near: &[NodeId],
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
            Some(((remoteness(topology, *node, near), chosen.len(), reserved, left, *node), chosen))
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
        (Reverse(remoteness(topology, *node, near)), free, Reverse(*node))
    })?;
    let start: Vec<NodeId> = start.into_iter().collect();
    nodes.sort_by_key(|node| (remoteness(topology, *node, &start), *node));
    let mut here = Vec::new();
    for node in nodes {
        here.extend(able.iter().copied().filter(|at| groups[*at].node == node));
        if let Some(chosen) = fewest(groups, here.clone(), need) {
            return Some(chosen);
        }
    }
    None
}

/// The largest groups first until the rest fits into one; for that, the tightest.
fn fewest(groups: &[Group], mut here: Vec<usize>, need: Need) -> Option<Vec<usize>> {
    here.sort_by_key(|at| (Reverse(groups[*at].free_cores_of(need.threads)), groups[*at].order));
    let (mut cores, mut cpus) = (0, 0);
    let mut chosen = Vec::new();
    while !here.is_empty() {
        let closes = |at: &usize| {
            let group = &groups[*at];
            need.fits(cores + group.free_cores_of(need.threads), cpus + group.free_cpus())
        };
        let last = here.iter().copied().filter(closes).min_by_key(|at| {
            let group = &groups[*at];
            (group.has_reserved, group.free.len(), group.order)
        });
        if let Some(last) = last {
            chosen.push(last);
            chosen.sort_by_key(|at| groups[*at].order);
            return Some(chosen);
        }
        let largest = here.remove(0);
        cores += groups[largest].free_cores_of(need.threads);
        cpus += groups[largest].free_cpus();
        chosen.push(largest);
    }
    None
}
