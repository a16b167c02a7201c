//! What a running VM is planned beside, for the commands that only look.

use std::collections::BTreeMap;

use crate::attachment::leasing::neighbours;
use crate::attachment::settings::Settings;
use crate::cgroups::CgroupTree;
use crate::discover;
use crate::error::Failure;
use crate::guest::Guest;
use crate::ids::{CpuId, VcpuIndex};
use crate::knobs::affinity::limit;
use crate::knobs::ground::{Ground, Host};
use crate::plan::{Neighbours, Plan, PlanError, Stay};
use crate::promises::Surroundings;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;
use crate::threads::ProcessKey;
use crate::topology::Topology;

/// Where the vCPUs of a VM are, the other VMs, and what the rest of the host leaves to it.
pub(super) struct Scene {
    pub(super) boot_id: String,
    /// Where its vCPUs are by its lease; nothing where it is not attached.
    pub(super) held: BTreeMap<VcpuIndex, CpuId>,
    around: Surroundings,
    beside: Neighbours,
    is_live: bool,
}

impl Scene {
    /// Reads the live host. Below another root nothing is known of the rest of it.
    ///
    /// # Errors
    /// The boot id cannot be read.
    pub(super) fn read(
        root: &SysRoot,
        settings: &Settings,
        process: ProcessKey,
        topology: &Topology,
    ) -> Result<Scene, Failure> {
        let live = SysRoot::live();
        let Settings { vm, state, .. } = settings;
        let boot_id = discover::boot_id(&live)?;
        // An attached VM stays where it is, where it may.
        let lease = state.lease_of(vm, &boot_id, process);
        let held = lease.map(|lease| lease.vcpus.into_iter().collect()).unwrap_or_default();
        let cgroups = CgroupTree::of(&live);
        let host = Host { root: &live, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
        let ground = Ground { host, state, vm, boot_id: &boot_id, process };
        let around = if root.is_live() {
            limit::surroundings(ground, &topology.online())
        } else {
            Surroundings::default()
        };
        let beside = neighbours(ground);
        Ok(Scene { boot_id, held, around, beside, is_live: root.is_live() })
    }

    /// Plans a guest whose vCPUs are where `held` has them. Where they are nowhere yet, those that are enabled keep the
    /// CPUs that they would have.
    ///
    /// # Errors
    /// [`PlanError`].
    pub(super) fn plan(
        &self,
        settings: &Settings,
        topology: &Topology,
        guest: &Guest,
        held: &BTreeMap<VcpuIndex, CpuId>,
    ) -> Result<Plan, PlanError> {
        let mut around = self.around.clone();
        if held.is_empty() && self.is_live {
            around.expected = settings.expected(topology, guest, &self.beside, &around);
        }
        settings.plan(topology, guest, &self.beside, &around, held, Stay::Always)
    }
}
