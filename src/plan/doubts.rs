//! What a plan says of VMs whose leases cannot be read: their CPUs are avoided, and the file is named.

use super::{Finding, Plan, PlanError, Request};

/// Names the leases that cannot be read, in the plan's report or in the reason why there is none.
pub(super) fn named(
    planned: Result<Plan, PlanError>,
    request: &Request<'_>,
) -> Result<Plan, PlanError> {
    let doubtful = || request.neighbours.iter().filter_map(|vm| Some((vm, vm.doubt.as_ref()?)));
    match planned {
        Ok(mut plan) => {
            plan.report.extend(doubtful().map(|(vm, doubt)| {
                Finding::degraded("neighbours", format!("{} avoided: {doubt}", vm.exclusive))
            }));
            Ok(plan)
        }
        Err(PlanError::Infeasible { mut reason, nearest, waits_for }) => {
            for (_, doubt) in doubtful() {
                reason += &format!("; {doubt}");
            }
            Err(PlanError::Infeasible { reason, nearest, waits_for })
        }
        Err(error) => Err(error),
    }
}
