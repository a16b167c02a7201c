//! The planner: `Topology × Guest × Policy × other VMs → Plan`. Pure: no files, no clock, no chance,
//! so that the same question always has the same answer and a test can ask any question.
//!
//! ```text
//!   housekeeping ─▶ which CPUs are the host's, shared, other VMs'      housekeeping.rs
//!   allowed      ─▶ which CPUs the VM's cgroup does not allow it         allowed.rs
//!   needs        ─▶ which of the others it may have at all                needs.rs
//!   vcpus        ─▶ which group(s), then which core and thread         groups.rs, vcpus.rs,
//!                                                                      extension.rs (hotplug),
//!                                                                      in_order.rs (by hand)
//!   helpers      ─▶ emulator and iothreads, away from the vCPUs        helpers.rs
//!   partition    ─▶ how the vCPUs' CPUs are kept theirs                partition.rs
//!   priority     ─▶ which of them are scheduled before others          priority.rs
//!   core_scheduling ─▶ who may be on the other half of a core           core_scheduling.rs
//!   reonline     ─▶ which CPUs are taken offline and online before        reonline.rs
//!   diff         ─▶ Plan × observed masks → steps                      diff.rs
//!   host         ─▶ all leases → what the rest of the host should be   host/
//! ```
//!
//! Ties are broken by the order of cores, never by CPU numbers as such: renumbering the CPUs only
//! renumbers the plan.

mod allowed;
pub mod core_scheduling;
pub mod diff;
mod doubts;
mod extension;
mod groups;
mod helpers;
pub mod host;
mod housekeeping;
mod in_order;
mod machine;
mod nearest;
mod needs;
pub mod partition;
pub mod priority;
pub mod reonline;
mod report;
mod vcpus;
mod verdicts;

use std::collections::BTreeMap;

pub use allowed::Allowed;
pub use report::{Finding, Placed, Verdict, Why, counted, cpus_in_words, listed};

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, IothreadId, VcpuIndex, VmName};
use crate::policy::{CpuChoice, Level, Origin, Overflow, Policy, Sharing};
use crate::topology::Topology;
use housekeeping::{Claims, whole_cores};
use machine::Group;
use vcpus::Placement;

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
    /// The CPUs that the VM's cgroup allows it; `None`: all of them.
    pub allowed: Option<&'a Allowed>,
    /// Where its vCPUs are by an earlier plan: they stay, where they still may.
    pub held: &'a BTreeMap<VcpuIndex, CpuId>,
    /// How much staying is worth.
    pub stay: Stay,
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

/// Where a vCPU belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedVcpu {
    /// Which vCPU.
    pub vcpu: VcpuIndex,
    /// On which CPUs: one, or the housekeeping CPUs after an overflow.
    pub cpus: CpuSet,
    /// Why there.
    pub why: Why,
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
    pub iothreads: Vec<IothreadId>,
    /// Where every iothread may run.
    pub iothread_cpus: CpuSet,
    /// Where emulator threads may run, and all that has no place of its own.
    pub emulator: CpuSet,
    /// The CPUs that are this VM's alone.
    pub exclusive: CpuSet,
    /// Online CPUs that are no VM's.
    pub housekeeping: CpuSet,
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

    /// The single CPUs held by vCPUs, for the next plan.
    #[must_use]
    pub fn held(&self) -> BTreeMap<VcpuIndex, CpuId> {
        let own = self.vcpus.iter().filter(|planned| planned.why != Why::Overflow);
        own.filter_map(|planned| Some((planned.vcpu, planned.cpus.first()?))).collect()
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

/// Answers a [`Request`].
///
/// # Errors
/// [`PlanError::Policy`] where the policy itself is wrong for this machine, [`PlanError::Infeasible`]
/// where the machine cannot hold the VM.
pub fn plan(request: &Request<'_>) -> Result<Plan, PlanError> {
    let planned = plan_strictly(request).map_err(|error| nearest::with_nearest(error, request));
    doubts::named(planned, request)
}

/// As [`plan`], without looking for what else would do.
fn plan_strictly(request: &Request<'_>) -> Result<Plan, PlanError> {
    let claims = Claims::gather(request)?;
    let only = request.policy.vm.vcpus.value.cpus();
    let only = only.as_ref();
    let blocked = claims.reserved | claims.shared | claims.kept | claims.others;
    let usable = match (only, request.allowed) {
        (None, None) => None,
        (only, _) => Some(only.map_or(claims.allowed, |only| *only & claims.allowed)),
    };
    let attempt = |blocked: &CpuSet| {
        let mut groups =
            machine::groups(request.topology, &claims.reserved, blocked, usable.as_ref());
        needs::restrict(&mut groups, &request.policy.vm);
        let placement = place(request, &groups);
        (groups, placement)
    };
    // Helpers' CPUs by hand are left to them where the vCPUs fit beside them.
    let spared = housekeeping::spared(request);
    let roomy = |(_, placement): &(_, Option<Placement>)| {
        placement.as_ref().is_some_and(|placement| placement.unplaced.is_empty())
    };
    let beside = if spared.is_empty() { None } else { Some(attempt(&(blocked | spared))) };
    let (groups, placement) = beside.filter(roomy).unwrap_or_else(|| attempt(&blocked));
    let placement = placement.ok_or_else(|| PlanError::Infeasible {
        reason: verdicts::shortage(request, &claims, &groups),
        nearest: None,
        waits_for: request.neighbours.iter().map(|other| other.vm.clone()).collect(),
    })?;
    finish(request, &claims, &groups, &placement, only)
}

fn place(request: &Request<'_>, groups: &[Group<'_>]) -> Option<Placement> {
    let Request { topology, guest, held, .. } = *request;
    let sharing = request.policy.vm.share.value;
    if let CpuChoice::InOrder(order) = &request.policy.vm.vcpus.value {
        return in_order::place(topology, groups, guest, held, order, sharing);
    }
    let fresh = || vcpus::fresh(topology, groups, guest);
    match extension::extended(topology, groups, guest, held, sharing) {
        Some(stay) if request.stay == Stay::UnlessBetter && stay.falls_short() => {
            Some(fresh().filter(|fresh| !fresh.falls_short()).unwrap_or(stay))
        }
        Some(stay) => Some(stay),
        None => fresh().or_else(|| match sharing {
            Sharing::Wrap => vcpus::wrapped(topology, groups, guest),
            Sharing::Refuse => None,
        }),
    }
}

fn finish(
    request: &Request<'_>,
    claims: &Claims,
    groups: &[Group<'_>],
    placement: &Placement,
    only: Option<&CpuSet>,
) -> Result<Plan, PlanError> {
    let used: CpuSet = placement.placed.iter().map(|placed| placed.cpu).collect();
    let exclusive = only.copied().unwrap_or_else(|| whole_cores(request, &used) & claims.allowed);
    let housekeeping = claims.online - exclusive - claims.others;
    let place =
        |key, choice| claims.helpers(request, groups, key, choice, &exclusive, &housekeeping);
    let vm = &request.policy.vm;
    let emulator = place("emulator", &vm.emulator)?;
    let iothreads = match (&vm.emulator.value, &vm.iothreads.value) {
        // The rule is the same for both.
        (CpuChoice::Auto, CpuChoice::Auto) => emulator.clone(),
        _ => place("iothreads", &vm.iothreads)?,
    };
    let mut planned: Vec<PlannedVcpu> = placement
        .placed
        .iter()
        .map(|placed| PlannedVcpu {
            vcpu: placed.vcpu,
            cpus: CpuSet::single(placed.cpu),
            why: placed.why,
        })
        .collect();
    let mut left_alone = Vec::new();
    let spare = housekeeping & claims.allowed;
    let spare = if spare.is_empty() { claims.allowed } else { spare };
    match request.policy.vm.overflow.value {
        Overflow::Shared => planned.extend(placement.unplaced.iter().map(|vcpu| PlannedVcpu {
            vcpu: *vcpu,
            cpus: spare,
            why: Why::Overflow,
        })),
        Overflow::Refuse => left_alone.clone_from(&placement.unplaced),
    }
    planned.sort_unstable_by_key(|planned| planned.vcpu);
    let mut plan = Plan {
        vm: request.vm.clone(),
        vcpus: planned,
        left_alone,
        iothreads: request.guest.iothreads.clone(),
        iothread_cpus: iothreads.cpus,
        emulator: emulator.cpus,
        exclusive,
        housekeeping,
        isolation: request.policy.vm.isolation.value,
        report: Vec::new(),
    };
    plan.report =
        verdicts::report(request, claims, groups, placement, &plan, [&emulator, &iothreads]);
    Ok(plan)
}
