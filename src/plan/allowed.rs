//! The limit *allowed*: the CPUs outside which the kernel refuses every pin of the VM's threads, because its
//! cgroup, or one above it, does not have them.

use super::{Finding, PlanError, Request};
use crate::cpuset::CpuSet;
use crate::policy::CpuChoice;

/// The rule's name in the report.
const RULE: &str = "allowed";

/// The CPUs that this VM's threads can be pinned to.
pub(super) fn cpus(request: &Request<'_>) -> CpuSet {
    let online = request.machine.online;
    request.allowed().map_or(online, |allowed| allowed.cpus & online)
}

/// A core for the helpers of a VM whose limit has no housekeeping CPU: vCPUs, which may be plugged at any time,
/// must not take the last one. Empty where there is one, or CPUs are given by hand.
pub(super) fn kept_for_helpers(
    request: &Request<'_>,
    housekeeping: &CpuSet,
    others: &CpuSet,
) -> CpuSet {
    let free = cpus(request) - *others;
    let is_by_hand = request.policy.vm.vcpus.value != CpuChoice::Auto;
    if request.allowed().is_none() || is_by_hand || free.intersects(housekeeping) {
        return CpuSet::EMPTY;
    }
    let by_hand = request.policy.vm.vcpu_cpus.values().map(|own| own.value).collect();
    let rest = free - request.machine.whole_cores(&by_hand);
    let free = if rest.is_empty() { free } else { rest };
    let core = request.machine.topology.cores.iter().find(|core| core.cpus.intersects(&free));
    core.map_or(CpuSet::EMPTY, |core| core.cpus)
}

/// Checks CPUs that were given by hand under `key`.
///
/// # Errors
/// [`PlanError::Infeasible`] with the CPUs that are not allowed, and the cgroup.
pub(super) fn check(request: &Request<'_>, key: &str, cpus: &CpuSet) -> Result<(), PlanError> {
    let outside = (*cpus & request.machine.online) - self::cpus(request);
    match request.allowed() {
        Some(allowed) if !outside.is_empty() => {
            let outside = crate::wording::cpus_in_words(&outside);
            let reason = format!(
                "{key}: no access to {outside}: {}; choose CPUs inside, or lift that limit",
                allowed.why
            );
            Err(PlanError::Infeasible { reason, nearest: None, waits_for: Vec::new() })
        }
        _ => Ok(()),
    }
}

/// The finding about a limit that the plan keeps to; `None` where there is none. It is a shortfall where vCPUs have no
/// CPU of their own inside it.
pub(super) fn finding(request: &Request<'_>, unplaced: usize) -> Option<Finding> {
    let allowed = request.allowed()?;
    Some(match unplaced {
        0 => Finding::met(RULE, format!("the plan is inside the VM's limit: {}", allowed.why)),
        _ => Finding::degraded(RULE, format!("the VM does not fit: {}", allowed.why)),
    })
}
