//! A new plan for a VM that has one, and the lease that shows it to others.

use std::collections::BTreeMap;

use crate::attachment::error::PassError;
use crate::attachment::leasing::{neighbours, other_name};
use crate::attachment::settings::{Follow, Settings};
use crate::attachment::{Attachment, Known};
use crate::cpuset::CpuSet;
use crate::discover::{self, DiscoverError, read_topology};
use crate::ids::{CpuId, Pid, VcpuIndex};
use crate::leases::{Lease, StateError};
use crate::locks::HostLock;
use crate::plan::{Neighbours, Plan, PlanError, Stay};
use crate::promises::Displaced;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

impl Attachment<'_> {
    /// A CPU that went offline takes pins with it, and one that came back may be wanted.
    pub(crate) fn notice_cpu_hotplug(&mut self) -> Result<(), DiscoverError> {
        let online = discover::online_cpus(self.known.host.root)?;
        let known = self.topology.online();
        self.online = online;
        let changed = (online - known) | (known - online);
        // Another VM's are its own affair: it may be about to bring one back.
        if changed.is_empty() || changed.is_subset(&self.others_cpus()) {
            return Ok(());
        }
        tracing::info!("online CPUs are now {online}, were {known}");
        self.topology = read_topology(self.known.host.root)?;
        self.knobs.affinity.limit.expire();
        self.stale = Some(Stay::UnlessBetter);
        Ok(())
    }

    /// Has the plan made anew where the VM's cgroup allows it other CPUs than before.
    pub(crate) fn notice_limit(&mut self) {
        if self.knobs.affinity.limit.has_changed(self.known.ground(), &self.online) {
            self.stale = Some(Stay::UnlessBetter);
        }
    }

    /// Another VM that comes or goes takes CPUs or leaves some. It is looked for at every pass, since a message about
    /// it may come later than what it does.
    pub(crate) fn notice_neighbours(&mut self) {
        if neighbours(self.known.ground()) != self.beside {
            self.stale.get_or_insert(Stay::Always);
        }
    }

    /// The CPUs that are other VMs' alone.
    fn others_cpus(&self) -> CpuSet {
        neighbours(self.known.ground()).exclusive()
    }

    /// Plans beside these VMs, in the CPUs that the VM's cgroup has for it.
    pub(crate) fn plan_beside(
        &self,
        settings: &Settings,
        beside: &Neighbours,
        held: &BTreeMap<VcpuIndex, CpuId>,
        stay: Stay,
    ) -> Result<Plan, PlanError> {
        let surroundings = self.knobs.affinity.limit.surroundings();
        settings.plan(&self.topology, &self.guest, beside, surroundings, held, stay)
    }

    pub(crate) fn replan(&mut self, stay: Stay) -> Result<(), PassError> {
        let lock = self.known.settings.state.lock_leases()?;
        let held = self.plan.held();
        // Stale until there is a new one; but not tried in every pass: the next change will.
        self.stale = None;
        self.knobs.affinity.limit.read(self.known.ground(), &self.online);
        self.beside = neighbours(self.known.ground());
        let plan = self.plan_beside(&self.known.settings, &self.beside, &held, stay)?;
        if plan != self.plan {
            let old = std::mem::replace(&mut self.plan, plan);
            // A lease that says the same would wake all other VMs for nothing.
            let is_the_same = leased(&self.plan) == leased(&old);
            if !is_the_same && let Err(error) = self.write_lease() {
                // What others cannot read is not ours to take.
                self.plan = old;
                self.stale = Some(stay);
                return Err(error.into());
            }
            self.knobs.partition.resize(
                self.known.ground(),
                &self.plan,
                &mut self.journal,
                &lock,
            )?;
        }
        Ok(())
    }

    /// Writes the first lease. The VM is planned again where others have come or gone since it was planned.
    pub(crate) fn lease_first(
        &mut self,
        lock: &HostLock,
        held: &BTreeMap<VcpuIndex, CpuId>,
    ) -> Result<(), PassError> {
        let _lock = self.known.settings.state.lock_leases_below(lock)?;
        if let Some(other) = other_name(self.known.ground()) {
            return Err(PassError::OtherName { process: self.known.process, other });
        }
        let now = neighbours(self.known.ground());
        if now != self.beside {
            self.knobs.affinity.limit.read(self.known.ground(), &self.online);
            self.plan = self.plan_beside(&self.known.settings, &now, held, Stay::Always)?;
            self.beside = now;
        }
        Ok(self.write_lease()?)
    }

    pub(crate) fn write_lease(&self) -> Result<(), StateError> {
        let supervisor = match self.known.settings.follow {
            Follow::Stay => this_process(self.known.host.root),
            Follow::Once => None,
        };
        let Known { settings: Settings { state, vm, policy, .. }, boot_id, process, .. } =
            &self.known;
        let policy = &policy.vm;
        state.write_lease(&Lease {
            supervisor,
            since_unix_s: self.since_unix_s,
            exclusive: self.plan.exclusive,
            emulator: self.plan.emulator,
            iothreads: self.plan.iothread_cpus,
            vcpus: self.plan.held().into_iter().collect(),
            floats: self.plan.floats(),
            knobs: policy.wanted_knobs(),
            partition: self.knobs.partition.cgroup(),
            slices: self.knobs.partition.slices(),
            vfio_irqs: policy.vfio_irqs.value,
            sched: policy.sched.value,
            sched_vcpus: policy.sched_vcpus.value,
            max_vcpus: policy.max_vcpus.value,
            displaced: self.plan.displaced.clone(),
            kept: self.kept.clone(),
            ..Lease::new(vm.clone(), boot_id.clone(), *process)
        })?;
        self.leased.set(state.lease_state(vm));
        Ok(())
    }
}

/// What others see of a plan.
fn leased(plan: &Plan) -> ([CpuSet; 4], BTreeMap<VcpuIndex, CpuId>, &[Displaced]) {
    let sets = [plan.exclusive, plan.emulator, plan.iothread_cpus, plan.floats()];
    (sets, plan.held(), &plan.displaced)
}

pub(crate) fn this_process(root: &SysRoot) -> Option<ProcessKey> {
    let pid = Pid(i32::try_from(std::process::id()).ok()?);
    discover::process_key(root, pid).ok()
}
