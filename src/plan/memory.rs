//! The guest's memory: vCPUs go where it is.
//!
//! ```text
//!   bound by QEMU (host-nodes)     it cannot move: each guest node's vCPUs go to its nodes
//!   not bound                      it counts where it lies, in eighths of the guest's size: a guest that has just
//!                                  started has touched too little of it to decide anything
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::report::Finding;
use super::{Plan, Request};
use crate::cpuset::CpuSet;
use crate::guest::{Guest, GuestMemory};
use crate::ids::{NodeId, VcpuIndex};
use crate::policy::CpuChoice;
use crate::topology::Topology;

const RULE: &str = "memory";
const MIB: u64 = 1 << 20;
/// Less than this, where it lies, decides nothing: QEMU itself has some 60 MiB.
const LIES_MIN: u64 = 128 * MIB;

/// How remote a node is from the memory: how many eighths of it are elsewhere, and how far the nearest piece is.
pub(super) type Remote = (u64, u32);

/// Where memory draws the vCPUs of a guest node to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pull {
    bytes: BTreeMap<NodeId, u64>,
    total: u64,
    is_bound: bool,
}

impl Pull {
    /// That of one guest node; `None`: of the whole guest.
    pub(super) fn of(request: &Request<'_>, guest_node: Option<u32>) -> Pull {
        Pull::from(&request.guest.memory, &request.surroundings.memory_on, guest_node)
    }

    fn from(memory: &[GuestMemory], lies: &BTreeMap<NodeId, u64>, guest_node: Option<u32>) -> Pull {
        let here = |piece: &&GuestMemory| guest_node.is_none() || piece.guest_node == guest_node;
        let mut pull = Pull::default();
        for piece in memory.iter().filter(here) {
            pull.total = pull.total.saturating_add(piece.bytes);
            for node in &piece.bound {
                let share = piece.bytes / piece.bound.len() as u64;
                *pull.bytes.entry(*node).or_default() += share;
                pull.is_bound = true;
            }
        }
        // Which part of it belongs to which guest node the host does not know.
        if !pull.is_bound && guest_node.is_none() && lies.values().sum::<u64>() >= LIES_MIN {
            pull.bytes.clone_from(lies);
            pull.total = pull.total.max(pull.bytes.values().sum());
        }
        pull
    }

    /// How remote the nearest nodes are, and how many these are.
    pub(super) fn nearest(&self, topology: &Topology) -> (Remote, usize) {
        let nodes = topology.nodes.iter().map(|node| self.remote(topology, Some(node.node)));
        let nearest = nodes.clone().min().unwrap_or_default();
        (nearest, nodes.filter(|remote| *remote == nearest).count())
    }

    /// How remote a node is; nothing is remote where nothing is known.
    pub(super) fn remote(&self, topology: &Topology, node: Option<NodeId>) -> Remote {
        let Some(node) = node else { return (0, 0) };
        let most = self.bytes.values().max().copied().unwrap_or(0);
        let eighths = |bytes: u64| bytes.saturating_mul(8).checked_div(self.total).unwrap_or(0);
        if eighths(most) == 0 {
            return (0, 0);
        }
        let here = self.bytes.get(&node).copied().unwrap_or(0);
        let far = |other: &NodeId| topology.distance(*other, node).unwrap_or(u32::MAX);
        let nearest = self.bytes.iter().filter(|(_, bytes)| **bytes == most).map(|(at, _)| far(at));
        let distance = if here == most { 0 } else { nearest.min().unwrap_or(0) };
        (8 - eighths(here).min(8), distance)
    }
}

/// The CPUs of the nodes that the guest's memory is bound to; `None`: it is not bound.
pub(super) fn bound_nodes(request: &Request<'_>) -> Option<CpuSet> {
    let bound = request.guest.memory.iter().flat_map(|piece| &piece.bound);
    let node = |at: &NodeId| request.machine.topology.nodes.iter().find(|node| node.node == *at);
    let cpus = bound.filter_map(node).fold(CpuSet::EMPTY, |all, node| all | node.cpus);
    (!cpus.is_empty()).then_some(cpus)
}

/// Where the guest's memory is, relative to its vCPUs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlacedMemory {
    /// The nodes that it is on, with commas between them.
    pub nodes: String,
    /// Whether QEMU has bound it.
    pub bound: bool,
    /// How much of it is on nodes of the vCPUs it belongs to.
    pub local_mib: u64,
    /// How much is on others.
    pub remote_mib: u64,
}

/// A guest node's memory and the nodes of its vCPUs.
struct Cell {
    guest_node: Option<u32>,
    pull: Pull,
    vcpus: BTreeSet<NodeId>,
}

impl Cell {
    fn local(&self) -> u64 {
        let here = self.pull.bytes.iter().filter(|(node, _)| self.vcpus.contains(node));
        here.map(|(_, bytes)| *bytes).sum()
    }

    fn all(&self) -> u64 {
        self.pull.bytes.values().sum()
    }
}

fn cells(request: &Request<'_>, plan: &Plan) -> Vec<Cell> {
    let on = |vcpu| plan.vcpu(vcpu).unwrap_or_default();
    let Request { machine, guest, surroundings, .. } = request;
    cells_of(machine.topology, guest, &surroundings.memory_on, &on)
}

/// What is to be said of a guest's memory while its vCPUs may run there: a sentence, and the sums. `lies` are bytes by
/// node. `None`: it is not known, or makes no difference.
#[must_use]
pub fn memory_seen(
    topology: &Topology,
    guest: &Guest,
    lies: &BTreeMap<NodeId, u64>,
    on: &dyn Fn(VcpuIndex) -> CpuSet,
) -> Option<(String, PlacedMemory)> {
    let cells = cells_of(topology, guest, lies, on);
    let several = cells.len() > 1;
    let parts: Vec<String> = cells.iter().map(|cell| in_words(cell, several)).collect();
    Some((parts.join("; "), sums(&cells)?))
}

fn cells_of(
    topology: &Topology,
    guest: &Guest,
    lies: &BTreeMap<NodeId, u64>,
    on: &dyn Fn(VcpuIndex) -> CpuSet,
) -> Vec<Cell> {
    if topology.nodes.iter().filter(|node| !node.cpus.is_empty()).count() < 2 {
        return Vec::new();
    }
    let mut nodes: BTreeMap<Option<u32>, CpuSet> = BTreeMap::new();
    for vcpu in &guest.vcpus {
        let cpus = on(vcpu.index);
        *nodes.entry(vcpu.node).or_default() |= cpus;
    }
    let several = nodes.len() > 1;
    let node_of = |cpu| topology.cpu(cpu)?.node;
    nodes
        .into_iter()
        .map(|(guest_node, cpus)| Cell {
            guest_node,
            pull: Pull::from(&guest.memory, lies, guest_node.filter(|_| several)),
            vcpus: cpus.iter().filter_map(node_of).collect(),
        })
        .filter(|cell| !cell.pull.bytes.is_empty() && !cell.vcpus.is_empty())
        .collect()
}

/// Sums it up for the whole guest.
pub(super) fn placed(request: &Request<'_>, plan: &Plan) -> Option<PlacedMemory> {
    sums(&cells(request, plan))
}

fn sums(cells: &[Cell]) -> Option<PlacedMemory> {
    let first = cells.first()?;
    let nodes: BTreeSet<NodeId> =
        cells.iter().flat_map(|cell| cell.pull.bytes.keys()).copied().collect();
    let local: u64 = cells.iter().map(Cell::local).sum();
    let all: u64 = cells.iter().map(Cell::all).sum();
    Some(PlacedMemory {
        nodes: names(&nodes),
        bound: first.pull.is_bound,
        local_mib: local / MIB,
        remote_mib: (all - local) / MIB,
    })
}

/// How much of each guest node's memory is near its vCPUs, and what is in the way where not all of it is.
pub(super) fn finding(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    let cells = cells(request, plan);
    if cells.is_empty() {
        return None;
    }
    let several = cells.len() > 1;
    let parts: Vec<String> = cells.iter().map(|cell| in_words(cell, several)).collect();
    // Some pages of QEMU itself are anywhere.
    let is_remote = |cell: &Cell| (cell.all() - cell.local()).saturating_mul(8) > cell.pull.total;
    if !cells.iter().any(is_remote) {
        return Some(Finding::met(RULE, parts.join("; ")));
    }
    let vm = &request.policy.vm;
    let why = if vm.vcpus.value != CpuChoice::Auto {
        format!("the CPUs are given by hand ({})", vm.vcpus.origin)
    } else if request.held.is_empty() {
        "the memory's nodes do not hold this VM beside what others have".to_owned()
    } else {
        "the vCPUs were there before; detach and attach the VM, if it fits there now".to_owned()
    };
    Some(Finding::degraded(RULE, format!("{}: {why}", parts.join("; "))))
}

fn in_words(cell: &Cell, several: bool) -> String {
    let of = match cell.guest_node {
        Some(node) if several => format!("guest node {node}"),
        _ => "guest memory".to_owned(),
    };
    let bound = if cell.pull.is_bound { "bound to" } else { "on" };
    let on: BTreeSet<NodeId> = cell.pull.bytes.keys().copied().collect();
    let (local, remote) = (cell.local() / MIB, (cell.all() - cell.local()) / MIB);
    format!(
        "{local} MiB of {of} local, {remote} MiB remote: {bound} node {}, vCPUs on node {}",
        names(&on),
        names(&cell.vcpus)
    )
}

fn names(nodes: &BTreeSet<NodeId>) -> String {
    let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    names.join(",")
}
