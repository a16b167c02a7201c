//! What the planner is asked.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::guest::{Allowed, Guest};
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::policy::Policy;
use crate::promises::Surroundings;
use crate::topology::Topology;

/// Another attached VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// Its name.
    pub vm: VmName,
    /// The CPUs that are its alone.
    pub exclusive: CpuSet,
    /// Where its emulator threads and iothreads may run.
    pub helpers: CpuSet,
    /// Where its lease cannot be read: which file, why, and what to do. `exclusive` is then all that it may have.
    pub doubt: Option<String>,
}

/// The question.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// For which VM.
    pub vm: &'a VmName,
    /// On which machine.
    pub topology: &'a Topology,
    /// What it has.
    pub guest: &'a Guest,
    /// What is wanted.
    pub policy: &'a Policy,
    /// Who else is there.
    pub neighbours: &'a [Neighbour],
    /// What the rest of the host leaves to it.
    pub surroundings: &'a Surroundings,
    /// Where its vCPUs are by an earlier plan: they stay, where they still may.
    pub held: &'a BTreeMap<VcpuIndex, CpuId>,
    /// How much staying is worth.
    pub stay: Stay,
}

impl<'a> Request<'a> {
    /// The CPUs that the VM's cgroup allows it; `None`: all of them.
    pub(super) fn allowed(&self) -> Option<&'a Allowed> {
        self.surroundings.allowed.as_ref()
    }
}

/// How much it is worth that a vCPU stays where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stay {
    /// More than anything: vCPUs are hotplugged, or neighbours come and go.
    Always,
    /// Less than siblings together or a CPU for everyone: the host's own CPUs have changed, and a pair
    /// must not be parted for good because a CPU was offline for a while.
    UnlessBetter,
}
