//! The knobs *emulator* and *iothreads*: the CPUs for QEMU's own work, away from its vCPUs.
//!
//! Both look for the same thing: housekeeping CPUs of another group, near the vCPUs. In order: another
//! group of the same node; the nearest node's; what is left behind the vCPUs' own cache.

use std::cmp::Reverse;

use super::machine::Group;
use crate::cpuset::CpuSet;
use crate::ids::NodeId;
use crate::topology::Topology;

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
    topology: &Topology,
    groups: &[Group],
    vcpus: &CpuSet,
    pool: &CpuSet,
) -> Option<(CpuSet, Away)> {
    let homes: Vec<NodeId> = groups
        .iter()
        .filter(|group| group.cpus.intersects(vcpus))
        .filter_map(|group| group.node)
        .collect();
    let unknown = homes.is_empty();
    let distance = |node: Option<NodeId>| match node {
        Some(node) if !homes.contains(&node) => {
            homes.iter().filter_map(|home| topology.distance(*home, node)).min().unwrap_or(u32::MAX)
        }
        _ => 0,
    };
    // Groups of two kinds behind one cache (P and E cores) are one place here: what counts is the
    // cache, so the pool behind a cache is joined before it is judged.
    let behind = |group: &Group| {
        let first = group.cpus.first().and_then(|cpu| topology.cpu(cpu)).and_then(|cpu| cpu.llc);
        let joined = topology.llcs.iter().find(|llc| Some(llc.llc) == first).map(|llc| llc.cpus);
        match joined {
            Some(cpus) if group.cpus.is_subset(&cpus) && cpus.len() > group.cpus.len() => cpus,
            _ => group.cpus,
        }
    };
    let away = groups
        .iter()
        .map(|group| (group, behind(group)))
        .filter(|(_, cpus)| !cpus.intersects(vcpus) && cpus.intersects(pool))
        .min_by_key(|(group, cpus)| {
            let here = (*cpus & *pool).len();
            (distance(group.node), !group.has_reserved, Reverse(here), group.order)
        });
    if let Some((group, cpus)) = away {
        let same = unknown || group.node.is_none_or(|node| homes.contains(&node));
        let away = if same { Away::OtherGroupSameNode } else { Away::OtherNode };
        return Some((cpus & *pool, away));
    }
    if pool.is_empty() { None } else { Some((*pool, Away::SameGroup)) }
}
