//! What the planner answers: every thread's CPUs, or why there is no plan.

use std::collections::BTreeMap;

use super::memory::PlacedMemory;
use super::report::{Finding, Verdict, Why};
use crate::cpuset::CpuSet;
use crate::ids::{CpuId, IothreadId, VcpuIndex, VmName};
use crate::policy::{Level, Origin};
use crate::promises::Displaced;

/// Where a vCPU belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedVcpu {
    /// Which vCPU.
    pub vcpu: VcpuIndex,
    /// On which CPUs: one, the set it floats over, or the housekeeping CPUs after an overflow.
    pub cpus: CpuSet,
    /// Why there.
    pub why: Why,
}

/// Where an iothread belongs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedIothread {
    /// Which iothread.
    pub iothread: IothreadId,
    /// On which CPUs.
    pub cpus: CpuSet,
}

/// The answer: every thread's CPUs, and how far the rules were kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// For which VM.
    pub vm: VmName,
    /// By index. A vCPU that is left alone (`overflow = "refuse"`) is not here.
    pub vcpus: Vec<PlannedVcpu>,
    /// vCPUs that are left where they are.
    pub left_alone: Vec<VcpuIndex>,
    /// By id.
    pub iothreads: Vec<PlannedIothread>,
    /// Where iothreads may run: those above together, and one that is plugged.
    pub iothread_cpus: CpuSet,
    /// Where emulator threads may run, and all that has no place of its own.
    pub emulator: CpuSet,
    /// The CPUs that are this VM's alone.
    pub exclusive: CpuSet,
    /// Online CPUs that are no VM's.
    pub housekeeping: CpuSet,
    /// Those of `exclusive` that were isolated on the kernel command line.
    pub isolated: CpuSet,
    /// Who loses CPUs to it.
    pub displaced: Vec<Displaced>,
    /// Where its memory is, relative to its vCPUs; `None` where that is not known or makes no difference.
    pub memory: Option<PlacedMemory>,
    /// How alone the VM is to be there.
    pub isolation: Level,
    /// A finding per rule.
    pub report: Vec<Finding>,
}

impl Plan {
    /// Where one vCPU belongs.
    #[must_use]
    pub fn vcpu(&self, index: VcpuIndex) -> Option<CpuSet> {
        let at = self.vcpus.binary_search_by_key(&index, |planned| planned.vcpu).ok()?;
        Some(self.vcpus[at].cpus)
    }

    /// Where one iothread belongs.
    #[must_use]
    pub fn iothread(&self, id: &IothreadId) -> CpuSet {
        let own = self.iothreads.iter().find(|planned| planned.iothread == *id);
        own.map_or(self.iothread_cpus, |planned| planned.cpus)
    }

    /// The single CPUs held by vCPUs, for the next plan.
    #[must_use]
    pub fn held(&self) -> BTreeMap<VcpuIndex, CpuId> {
        let is_pinned =
            |planned: &&PlannedVcpu| !matches!(planned.why, Why::Overflow | Why::Floats);
        let own = self.vcpus.iter().filter(is_pinned);
        own.filter_map(|planned| Some((planned.vcpu, planned.cpus.first()?))).collect()
    }

    /// The CPUs over which vCPUs float; empty where each has its own.
    #[must_use]
    pub fn floats(&self) -> CpuSet {
        let floating = self.vcpus.iter().filter(|planned| planned.why == Why::Floats);
        floating.fold(CpuSet::EMPTY, |all, planned| all | planned.cpus)
    }

    /// The worst verdict in the report.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.report.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Met)
    }
}

/// Why there is no plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// The policy asks for CPUs that cannot be asked for.
    #[error("{origin}: {reason}")]
    Policy {
        /// Where it asks.
        origin: Origin,
        /// What is wrong.
        reason: String,
        /// For how long.
        lasts: Lasts,
    },
    /// The machine, as it is now, does not have what the VM needs.
    #[error("{reason}")]
    Infeasible {
        /// What is needed and what there is.
        reason: String,
        /// The nearest plan that would do, where there is one.
        nearest: Option<Box<Nearest>>,
        /// The VMs whose CPUs are in the way: a plan may be found when one of their leases ends or shrinks.
        waits_for: Vec<VmName>,
    },
}

/// For how long a policy cannot be met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lasts {
    /// Until it is changed.
    ForGood,
    /// Until CPUs that it names are online.
    WhileOffline,
}

/// A plan that would do, and what it takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nearest {
    /// What the user has to change, such as `--share` or `vcpus = "auto"`.
    pub takes: String,
    /// The plan with that.
    pub plan: Plan,
}
