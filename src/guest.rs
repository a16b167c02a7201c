//! What a VM is: its vCPUs and iothreads as QEMU reports them, and the CPUs that its cgroup allows.

use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, VcpuIndex};

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

/// What the VM has now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Guest {
    /// Its vCPUs, by index.
    pub vcpus: Vec<GuestVcpu>,
    /// Its iothreads, by id.
    pub iothreads: Vec<IothreadId>,
    /// vCPUs that QEMU reports beyond `max_vcpus`: they are placed as helpers are.
    pub beyond: Vec<VcpuIndex>,
}

/// The CPUs that the VM's cgroup allows its threads, where these are not all online CPUs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// The CPUs.
    pub cpus: CpuSet,
    /// Which cgroup forbids the others, in a clause: "100.scope allows only CPUs 2-9 (cpuset.cpus)".
    pub why: String,
}
