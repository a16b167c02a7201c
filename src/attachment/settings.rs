//! What to attach, and how.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::discover::{self, FirstWay, PolicyDirs, VmLocation};
use crate::error::chain;
use crate::guest::Guest;
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::leases::StateDir;
use crate::plan::{
    Declared, Machine, Neighbours, Plan, PlanError, Request, Stay, expected_cpus, plan,
};
use crate::policy::{ChannelChoice, Policy};
use crate::promises::Surroundings;
use crate::qmp::{ChannelPaths, Limits};
use crate::sysroot::SysRoot;
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
    /// The VMs that are enabled on this host, as their configurations declare them.
    pub enabled: Vec<Declared>,
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
    /// The CPUs that VMs which are enabled and not attached yet would have beside this one.
    #[must_use]
    pub fn expected(
        &self,
        topology: &Topology,
        guest: &Guest,
        neighbours: &Neighbours,
        surroundings: &Surroundings,
    ) -> CpuSet {
        if self.enabled.is_empty() {
            return CpuSet::EMPTY;
        }
        let this = Declared {
            vm: self.vm.clone(),
            guest: guest.clone(),
            devices: surroundings.devices.clone(),
            policy: self.policy.clone(),
        };
        let machine = Machine::of(topology);
        expected_cpus(&machine, this, &self.enabled, neighbours, surroundings)
    }

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

/// What a VM would need that is started now, by its configuration and its policy.
///
/// # Errors
/// Why that is not known, in words with the file.
pub fn declare(dirs: &PolicyDirs, root: &SysRoot, vm: &VmName) -> Result<Declared, String> {
    let policy = dirs.load(Some(vm)).map_err(|error| chain(&error))?;
    let guest = discover::declared_guest(root, vm)?;
    let devices = discover::declared_devices(root, vm);
    Ok(Declared { vm: vm.clone(), guest, devices, policy })
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
