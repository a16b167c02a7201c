//! The knobs *emulator* and *iothreads*: the CPUs for QEMU's own work, away from its vCPUs.
//!
//! Both look for the same thing: housekeeping CPUs of another group, near the vCPUs. In order: another
//! group of the same node; the nearest node's; what is left behind the vCPUs' own cache, outside the
//! vCPUs' cores.

use std::cmp::Reverse;

use super::machine::Group;
use super::{Request, groups};
use crate::cpuset::CpuSet;
use crate::ids::NodeId;

/// Where the helpers went, relative to the vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Away {
    /// Behind another cache, on a node of the vCPUs.
    OtherGroupSameNode,
    /// Behind another cache, on another node.
    OtherNode,
    /// Behind the vCPUs' own cache: there is no other.
    SameGroup,
}

/// Chooses the CPUs. `pool` are the CPUs that may be used: housekeeping CPUs, or those of them that
/// `[host] shared` names. `None`: the pool is empty.
pub(super) fn choose(
    request: &Request<'_>,
    groups: &[Group<'_>],
    vcpus: &CpuSet,
    pool: &CpuSet,
) -> Option<(CpuSet, Away)> {
    let topology = request.machine.topology;
    let homes: Vec<NodeId> = groups
        .iter()
        .filter(|group| group.cpus.intersects(vcpus))
        .filter_map(|group| group.node)
        .collect();
    let unknown = homes.is_empty();
    // Groups of two kinds or nodes behind one cache (P and E cores, sub-NUMA clusters) are one place
    // here: what counts is the cache, so the pool behind a cache is joined before it is judged.
    let caches = request.machine.caches_group_cores;
    let behind = |at: usize| {
        let llc = groups[at].llc.filter(|_| caches);
        let llc = llc.and_then(|llc| topology.llcs.get(llc.0 as usize));
        llc.map_or(&groups[at].cpus, |llc| &llc.cpus)
    };
    let distance = |group: &Group<'_>| groups::distance(topology, group.node, &homes);
    let rank = |at: usize| (distance(&groups[at]), !groups[at].has_reserved);
    let away: Vec<_> = (0..groups.len())
        .filter(|at| !behind(*at).intersects(vcpus) && behind(*at).intersects(pool))
        .map(|at| (rank(at), at))
        .collect();
    if let Some((best, _)) = away.iter().min() {
        let nearest = away.iter().filter(|(rank, _)| rank == best).map(|(_, at)| *at);
        let widest =
            nearest.max_by_key(|at| ((*behind(*at) & *pool).len(), Reverse(groups[*at].order)));
        let at = widest?;
        let same = unknown || groups[at].node.is_none_or(|node| homes.contains(&node));
        let away = if same { Away::OtherGroupSameNode } else { Away::OtherNode };
        return Some((*behind(at) & *pool, away));
    }
    // The siblings of the vCPUs' CPUs are the last resort, and the vCPUs' own nodes come first.
    let near = groups
        .iter()
        .filter(|group| distance(group) == 0)
        .fold(CpuSet::EMPTY, |all, group| all | group.cpus);
    let outside = *pool - request.machine.whole_cores(vcpus);
    let best = [outside & near, outside, *pool].into_iter().find(|cpus| !cpus.is_empty());
    best.map(|cpus| (cpus, Away::SameGroup))
}
