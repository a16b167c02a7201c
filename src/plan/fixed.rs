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
        let mut fixed = Fixed::default();
        for vcpu in &request.guest.vcpus {
            let Some(own) = request.policy.vm.vcpu_cpus.get(&vcpu.index) else { continue };
            match fixed.check(request, claims, vcpu.index, own) {
                Ok(()) => drop(fixed.on.insert(vcpu.index, own.value)),
                Err(error) if request.held.is_empty() => return Err(error),
                Err(error) => fixed.refused.push(error.to_string()),
            }
        }
        fixed.cores = request.machine.whole_cores(&fixed.on.values().copied().collect());
        Ok(fixed)
    }

    fn check(
        &self,
        request: &Request<'_>,
        claims: &Claims,
        vcpu: VcpuIndex,
        own: &Sourced<CpuId>,
    ) -> Result<(), PlanError> {
        let vm = &request.policy.vm;
        let (cpu, key) = (own.value, format!("[vcpu.{vcpu}] cpu"));
        let wrong = |reason: String| PlanError::Policy {
            origin: own.origin.clone(),
            reason: format!("{key} = \"{cpu}\": {reason}"),
            lasts: Lasts::ForGood,
        };
        let whole = format!("vcpus = \"{}\" ({})", vm.vcpus.value, vm.vcpus.origin);
        match &vm.vcpus.value {
            CpuChoice::Auto => {}
            CpuChoice::Cpus(all) if all.contains(cpu) => {}
            CpuChoice::Cpus(_) => {
                return Err(wrong(format!("it is not among {whole}; name it there, too")));
            }
            CpuChoice::InOrder(_) | CpuChoice::Float(_) => {
                return Err(wrong(format!(
                    "{whole} has a place for each vCPU; say one of the two"
                )));
            }
        }
        let set = CpuSet::single(cpu);
        claims.check_vcpus(request, &key, &own.clone().map(|_| CpuChoice::Cpus(set)), &set)?;
        let other = self.on.iter().find(|(_, taken)| **taken == cpu);
        match other.filter(|_| vm.share.value == Sharing::Refuse) {
            Some((other, _)) => {
                let instead = "choose another, or say share = true";
                Err(wrong(format!("vCPU {other} has it; {instead}")))
            }
            None => Ok(()),
        }
    }

    /// Names those that do not have theirs.
    pub(super) fn finding(&self) -> Option<Finding> {
        let refused = listed(&self.refused, 3, "; ");
        (!refused.is_empty()).then(|| Finding::degraded("by-hand", refused))
    }
}
