//! Devices that are passed through: a VM goes to the node of its own, and one without keeps away from those of others.
//!
//! ```text
//!   has devices    the nearest to its GPU, then to its NVMe, to its network device, to any other
//!   has none       a node where none are set aside for VMs (bound to vfio-pci), while there is one
//! ```
//!
//! Memory that is bound, or lies somewhere, counts for more.

use std::collections::BTreeSet;

use super::report::Finding;
use super::{Plan, Request, memory};
use crate::devices::{Device, DeviceKind};
use crate::ids::NodeId;
use crate::policy::CpuChoice;
use crate::wording::listed;

const RULE: &str = "devices";

/// How far a node is from the nearest device of each kind.
pub(super) type Far = [u32; DeviceKind::ALL.len()];

/// How far a node is from the VM's devices, or, where it has none, whether it is one to keep away from.
pub(super) fn far(request: &Request<'_>, node: Option<NodeId>) -> Far {
    let mut far = Far::default();
    let around = request.surroundings;
    let is_wanted = !(around.devices.is_empty() && around.set_aside.is_empty());
    let Some(node) = node.filter(|_| is_wanted && has_choice(request)) else { return far };
    let mut own = own(request).peekable();
    if own.peek().is_none() {
        far[0] = u32::from(request.surroundings.set_aside.contains(&node));
        return far;
    }
    let topology = request.machine.topology;
    let own: Vec<(DeviceKind, NodeId)> = own.map(|(device, at)| (device.kind, at)).collect();
    for (kind, far) in DeviceKind::ALL.into_iter().zip(&mut far) {
        let of_kind = own.iter().filter(|(other, _)| *other == kind);
        let apart = |at: NodeId| topology.distance(at, node).unwrap_or(u32::MAX);
        let distance = |at: NodeId| if at == node { 0 } else { apart(at) };
        *far = of_kind.map(|(_, at)| distance(*at)).min().unwrap_or(0);
    }
    far
}

/// The VM's devices of which the node is known.
fn own<'a>(request: &Request<'a>) -> impl Iterator<Item = (&'a Device, NodeId)> {
    request.surroundings.devices.iter().filter_map(|device| Some((device, device.node?)))
}

/// Whether the host has several nodes with CPUs, not all of which have devices set aside.
fn has_choice(request: &Request<'_>) -> bool {
    let mut nodes = request.machine.topology.nodes.iter().filter(|node| !node.cpus.is_empty());
    let Some(first) = nodes.next() else { return false };
    let Some(second) = nodes.next() else { return false };
    let has_own = own(request).next().is_some();
    let is_free = |node: NodeId| !request.surroundings.set_aside.contains(&node);
    has_own || [first, second].into_iter().chain(nodes).any(|node| is_free(node.node))
}

/// Whether the vCPUs are near the devices, or away from those of others.
pub(super) fn finding(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    if !has_choice(request) {
        return None;
    }
    let topology = request.machine.topology;
    let cpus = plan.vcpus.iter().flat_map(|planned| planned.cpus.iter().collect::<Vec<_>>());
    let vcpus: BTreeSet<NodeId> = cpus.filter_map(|cpu| topology.cpu(cpu)?.node).collect();
    if vcpus.is_empty() {
        return None;
    }
    let nodes: Vec<String> = vcpus.iter().map(ToString::to_string).collect();
    let on = format!("node {}", nodes.join(", "));
    if own(request).next().is_none() {
        let near: Vec<String> =
            vcpus.intersection(&request.surroundings.set_aside).map(ToString::to_string).collect();
        return (!near.is_empty()).then(|| {
            let why = why(request, "on other nodes");
            let near = near.join(", ");
            Finding::degraded(
                RULE,
                format!("vCPUs on node {near}, where devices for other VMs are: {why}"),
            )
        });
    }
    let words = |(device, node): (&Device, NodeId)| {
        format!("{} {} on node {node}", device.kind, device.address)
    };
    let (near, far): (Vec<_>, Vec<_>) = own(request).partition(|(_, node)| vcpus.contains(node));
    Some(if far.is_empty() {
        let near: Vec<String> = near.into_iter().map(words).collect();
        Finding::met(RULE, format!("{}, as the vCPUs", listed(&near, 3, ", ")))
    } else {
        let far: Vec<String> = far.into_iter().map(words).collect();
        let far = listed(&far, 3, ", ");
        let why = why(request, "there");
        Finding::degraded(RULE, format!("{far}, and the vCPUs on {on}: {why}"))
    })
}

fn why(request: &Request<'_>, place: &str) -> String {
    let vm = &request.policy.vm;
    if vm.vcpus.value != CpuChoice::Auto {
        format!("the CPUs are given by hand ({})", vm.vcpus.origin)
    } else if memory::bound_nodes(request).is_some() {
        "they are where the guest's memory is bound".to_owned()
    } else if !request.held.is_empty() {
        "they were there before; detach and attach the VM to move them".to_owned()
    } else if own(request).map(|(_, node)| node).collect::<BTreeSet<_>>().len() > 1 {
        "its devices are on several nodes".to_owned()
    } else {
        format!("the VM does not fit {place}, or its memory decides")
    }
}
