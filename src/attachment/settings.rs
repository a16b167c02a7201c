//! What to attach, and how.

use std::collections::BTreeMap;

use crate::discover::{self, FirstWay, VmLocation};
use crate::guest::Guest;
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::leases::StateDir;
use crate::plan::{Machine, Neighbours, Plan, PlanError, Request, Stay, plan};
use crate::policy::{ChannelChoice, Policy};
use crate::promises::Surroundings;
use crate::qmp::{ChannelPaths, Limits};
use crate::topology::Topology;

/// What to attach, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which VM.
    pub vm: VmName,
    /// Where to find it.
    pub location: VmLocation,
    /// Where leases and journals are.
    pub state: StateDir,
    /// What is wanted.
    pub policy: Policy,
    /// What QEMU is granted.
    pub limits: Limits,
    /// Whether this process stays with the VM.
    pub follow: Follow,
}

/// Whether the attaching process stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Follow {
    /// It follows the VM and restores at the end.
    Stay,
    /// It applies once and leaves the rest to `detach`.
    Once,
}

impl Settings {
    /// Plans beside the VMs that are attached now. `held` is where the VM's vCPUs are already, `surroundings` what the
    /// rest of the host leaves to it.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn plan(
        &self,
        topology: &Topology,
        guest: &Guest,
        neighbours: &Neighbours,
        surroundings: &Surroundings,
        held: &BTreeMap<VcpuIndex, CpuId>,
        stay: Stay,
    ) -> Result<Plan, PlanError> {
        plan(&Request {
            vm: &self.vm,
            machine: &Machine::of(topology),
            guest,
            policy: &self.policy,
            neighbours,
            surroundings,
            held,
            stay,
        })
    }
}

pub(crate) fn channel_paths(settings: &Settings) -> (ChannelPaths, FirstWay) {
    let paths = discover::channel_paths(&settings.vm, &settings.location);
    match settings.policy.vm.channel.value {
        ChannelChoice::Auto => (paths, FirstWay::Best),
        ChannelChoice::Lease => (paths, FirstWay::Lease),
        // The socket itself is for qmpin: the same path in both places.
        ChannelChoice::Persistent => {
            (ChannelPaths { own: paths.shared.clone(), shared: paths.shared }, FirstWay::Best)
        }
    }
}
