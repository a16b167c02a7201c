//! What the planner is asked.

use std::collections::BTreeMap;

use super::{Machine, Neighbours};
use crate::guest::{Allowed, Guest};
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::policy::Policy;
use crate::promises::Surroundings;

/// The question.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// For which VM.
    pub vm: &'a VmName,
    /// On which machine.
    pub machine: &'a Machine<'a>,
    /// What it has.
    pub guest: &'a Guest,
    /// What is wanted.
    pub policy: &'a Policy,
    /// Who else is there.
    pub neighbours: &'a Neighbours,
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
