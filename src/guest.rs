//! What a VM is: its vCPUs and iothreads as QEMU reports them, and the CPUs that its cgroup allows.

use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, NodeId, VcpuIndex};

/// One vCPU as the guest sees it; `None` where QEMU says nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the fields are QEMU's `CpuInstanceProperties` (qapi/machine.json)
pub struct GuestVcpu {
    pub index: VcpuIndex,
    pub node: Option<u32>,
    pub socket: Option<u32>,
    pub die: Option<u32>,
    pub cluster: Option<u32>,
    pub core: Option<u32>,
    pub thread: Option<u32>,
}

/// A piece of the guest's memory, as QEMU reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestMemory {
    /// The guest's node that it belongs to, where that is known.
    pub guest_node: Option<u32>,
    /// Its size.
    pub bytes: u64,
    /// The host's nodes that it was bound to; none: it lies where the kernel has put it.
    pub bound: Vec<NodeId>,
}

/// What the VM has now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Guest {
    /// Its vCPUs, by index.
    pub vcpus: Vec<GuestVcpu>,
    /// Its iothreads, by id.
    pub iothreads: Vec<IothreadId>,
    /// vCPUs that QEMU reports beyond `max_vcpus`: they are placed as helpers are.
    pub beyond: Vec<VcpuIndex>,
    /// Its memory; empty where that is not known.
    pub memory: Vec<GuestMemory>,
}

/// The CPUs that the VM's cgroup allows its threads, where these are not all online CPUs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// The CPUs.
    pub cpus: CpuSet,
    /// Which cgroup forbids the others, in a clause: "100.scope allows only CPUs 2-9 (cpuset.cpus)".
    pub why: String,
}
