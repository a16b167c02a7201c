//! What a plan says of VMs whose leases cannot be read: their CPUs are avoided, and the file is named.

use super::{Finding, Plan, PlanError, Request};

/// Names the leases that cannot be read, in the plan's report or in the reason why there is none.
pub(super) fn name(planned: &mut Result<Plan, PlanError>, request: &Request<'_>) {
    let doubtful = || request.neighbours.iter().filter_map(|vm| Some((vm, vm.doubt.as_ref()?)));
    match planned {
        Ok(plan) => plan.report.extend(doubtful().map(|(vm, doubt)| {
            Finding::degraded("neighbours", format!("{} avoided: {doubt}", vm.exclusive))
        })),
        Err(PlanError::Infeasible { reason, .. }) => {
            reason.extend(doubtful().map(|(_, doubt)| format!("; {doubt}")));
        }
        Err(PlanError::Policy { .. }) => {}
    }
}
