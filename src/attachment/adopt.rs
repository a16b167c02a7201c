//! Another policy for a VM that is attached: nothing is unpinned on the way, since the plan in force stays in force
//! until there is a new one.

use std::collections::BTreeMap;

use crate::attachment::Attachment;
use crate::attachment::error::PassError;
use crate::attachment::leasing::neighbours;
use crate::error::chain;
use crate::plan::Stay;
use crate::policy::Policy;

impl Attachment<'_> {
    /// Takes another policy: plans by it, and shows it to other VMs. A pass, and what is done around the VM, are to
    /// follow.
    ///
    /// # Errors
    /// [`PassError`]; then policy and plan are as they were.
    pub(crate) fn adopt(&mut self, policy: Policy) -> Result<(), PassError> {
        self.knobs.affinity.limit.read_promises(self.known.ground());
        let lock = self.known.settings.state.lock_leases()?;
        self.knobs.affinity.limit.read(self.known.ground(), &self.online);
        let mut settings = self.known.settings.clone();
        // Where the same places are asked for, vCPUs stay where they are.
        let held =
            if same_places(&settings.policy, &policy) { self.plan.held() } else { BTreeMap::new() };
        settings.policy = policy;
        let beside = neighbours(self.known.ground());
        let plan = self.plan_beside(&settings, &beside, &held, Stay::Always)?;
        let old = (
            std::mem::replace(&mut self.known.settings, settings),
            std::mem::replace(&mut self.plan, plan),
        );
        if let Err(error) = self.write_lease() {
            // What other VMs cannot read is not this VM's to take.
            (self.known.settings, self.plan) = old;
            return Err(error.into());
        }
        self.beside = beside;
        self.stale = None;
        self.knobs.partition.resize(self.known.ground(), &self.plan, &mut self.journal, &lock)?;
        Ok(())
    }

    /// Keeps the policy in force, and has the report say why it is not the one of the files.
    pub(crate) fn keep_policy(&mut self, why: &str) {
        self.known.settings.policy.instead_of = Some(why.to_owned());
        if let Err(error) = self.replan(Stay::Always) {
            tracing::debug!("the report does not say why the policy stays: {}", chain(&error));
        }
    }
}

/// Whether two policies ask for the same places.
fn same_places(one: &Policy, other: &Policy) -> bool {
    let (vm, host) = (&one.vm, &one.host);
    vm.vcpus.value == other.vm.vcpus.value
        && vm.vcpu_cpus == other.vm.vcpu_cpus
        && vm.iothreads.value == other.vm.iothreads.value
        && vm.iothread_cpus == other.vm.iothread_cpus
        && vm.emulator.value == other.vm.emulator.value
        && vm.cores.value == other.vm.cores.value
        && vm.cache.value == other.vm.cache.value
        && vm.smt.value == other.vm.smt.value
        && vm.share.value == other.vm.share.value
        && host.reserved.value == other.host.reserved.value
        && host.shared.value == other.host.shared.value
}
