//! vCPUs with a CPU by hand (`[vcpu.0] cpu = "6"`): they have it, and the others are placed around them.

use std::collections::BTreeMap;

use super::housekeeping::Claims;
use super::report::Finding;
use super::{Lasts, PlanError, Request};
use crate::cpuset::CpuSet;
use crate::ids::{CpuId, VcpuIndex};
use crate::policy::{CpuChoice, Sharing, Sourced};
use crate::wording::listed;

/// The vCPUs that have a CPU by hand.
#[derive(Clone, Debug, Default)]
pub(super) struct Fixed {
    pub(super) on: BTreeMap<VcpuIndex, CpuId>,
    /// Their cores.
    pub(super) cores: CpuSet,
    /// Why those that were plugged later cannot have theirs.
    refused: Vec<String>,
}

impl Fixed {
    /// Gathers those of the guest's vCPUs.
    ///
    /// # Errors
    /// As [`Claims::gather`], and [`PlanError::Policy`] where the policy names two places for a vCPU, or one CPU twice.
    /// For a VM that has CPUs already it is no error: a vCPU that is plugged is placed as any other then.
    pub(super) fn gather(request: &Request<'_>, claims: &Claims) -> Result<Fixed, PlanError> {
        let by_hand = &request.policy.vm.vcpu_cpus;
        // Also of vCPUs that are not plugged yet: that is known before the VM counts on it.
        for (at, (vcpu, own)) in by_hand.iter().enumerate() {
            check_policy(request, *vcpu, own, by_hand.iter().take(at))?;
        }
        let mut fixed = Fixed::default();
        for vcpu in &request.guest.vcpus {
            let Some(own) = by_hand.get(&vcpu.index) else { continue };
            let mut held = request.held.iter();
            if let Some((other, _)) =
                held.find(|(other, cpu)| **cpu == own.value && **other != vcpu.index)
            {
                fixed.refused.push(format!(
                    "{}: [vcpu.{}] cpu = \"{}\": vCPU {other} has it since before; detach and attach the VM",
                    own.origin, vcpu.index, own.value
                ));
                continue;
            }
            match check_host(request, claims, vcpu.index, own) {
                Ok(()) => drop(fixed.on.insert(vcpu.index, own.value)),
                Err(error) if request.held.is_empty() => return Err(error),
                Err(error) => fixed.refused.push(error.to_string()),
            }
        }
        fixed.cores = request.machine.whole_cores(&fixed.on.values().copied().collect());
        Ok(fixed)
    }

    /// Names those that do not have theirs.
    pub(super) fn finding(&self) -> Option<Finding> {
        let refused = listed(&self.refused, 3, "; ");
        (!refused.is_empty()).then(|| Finding::degraded("by-hand", refused))
    }
}

/// The CPUs of vCPUs that are not plugged: they are left to them, where others fit without.
pub(super) fn of_absent(request: &Request<'_>) -> CpuSet {
    let is_there = |vcpu: &VcpuIndex| request.guest.vcpus.iter().any(|one| one.index == *vcpu);
    let by_hand = request.policy.vm.vcpu_cpus.iter().filter(|(vcpu, _)| !is_there(vcpu));
    by_hand.map(|(_, own)| own.value).collect()
}

/// Checks it against the rest of the policy, and the vCPUs `before` it.
fn check_policy<'a>(
    request: &Request<'_>,
    vcpu: VcpuIndex,
    own: &Sourced<CpuId>,
    mut before: impl Iterator<Item = (&'a VcpuIndex, &'a Sourced<CpuId>)>,
) -> Result<(), PlanError> {
    let vm = &request.policy.vm;
    let cpu = own.value;
    let wrong = |reason: String| {
        Err(PlanError::Policy {
            origin: own.origin.clone(),
            reason: format!("[vcpu.{vcpu}] cpu = \"{cpu}\": {reason}"),
            lasts: Lasts::ForGood,
        })
    };
    let whole = format!("vcpus = \"{}\" ({})", vm.vcpus.value, vm.vcpus.origin);
    match &vm.vcpus.value {
        CpuChoice::Cpus(all) if !all.contains(cpu) => {
            return wrong(format!("it is not among {whole}; name it there, too"));
        }
        CpuChoice::InOrder(_) | CpuChoice::Float(_) => {
            return wrong(format!("{whole} has a place for each vCPU; say one of the two"));
        }
        CpuChoice::Auto | CpuChoice::Cpus(_) => {}
    }
    let other = before.find(|(_, other)| other.value == cpu);
    match other.filter(|_| vm.share.value == Sharing::Refuse) {
        Some((other, _)) => {
            wrong(format!("vCPU {other} has it; choose another, or say share = true"))
        }
        None => Ok(()),
    }
}

/// Checks it against what others have.
fn check_host(
    request: &Request<'_>,
    claims: &Claims,
    vcpu: VcpuIndex,
    own: &Sourced<CpuId>,
) -> Result<(), PlanError> {
    let set = CpuSet::single(own.value);
    let key = format!("[vcpu.{vcpu}] cpu");
    claims.check_vcpus(request, &key, &own.clone().map(|_| CpuChoice::Cpus(set)), &set)?;
    if !request.machine.whole_cores(&set).intersects(&claims.kept) {
        return Ok(());
    }
    let limit = request.allowed().map_or("", |limit| limit.why.as_str());
    let reason = format!(
        "{}: {key} = \"{}\": its core is the only one for the VM's helpers: {limit}; choose another, or lift that limit",
        own.origin, own.value
    );
    Err(PlanError::Infeasible { reason, nearest: None, waits_for: Vec::new() })
}
