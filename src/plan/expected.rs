//! VMs that are enabled and not started yet: a plan leaves them the CPUs that they would have, where that costs
//! nothing.

use super::all::place_all;
use super::{Declared, Machine, Neighbours, Plan, PlanError, Request, Verdict, plan_strictly};
use crate::cpuset::CpuSet;
use crate::policy::CpuChoice;
use crate::promises::Surroundings;

/// The CPUs that the others would have if all of them were placed with this one, as `qmpin plan --all` shows.
#[must_use]
pub fn expected_cpus(
    machine: &Machine<'_>,
    this: Declared,
    others: &[Declared],
    neighbours: &Neighbours,
    surroundings: &Surroundings,
) -> CpuSet {
    let is_attached = |one: &Declared| neighbours.iter().any(|other| other.vm == one.vm);
    let missing = others.iter().filter(|one| one.vm != this.vm && !is_attached(one));
    let name = this.vm.clone();
    let mut all: Vec<Declared> = missing.cloned().collect();
    if all.is_empty() {
        return CpuSet::EMPTY;
    }
    all.push(this);
    let plans = place_all(machine, all, &mut neighbours.clone(), surroundings);
    let theirs = plans.iter().filter(|(vm, _)| *vm != name);
    theirs
        .filter_map(|(_, plan)| plan.as_ref().ok())
        .fold(CpuSet::EMPTY, |all, plan| all | plan.exclusive)
}

/// The plan beside the CPUs that others are to have, where it keeps every rule as well.
pub(super) fn beside(
    request: &Request<'_>,
    planned: Result<Plan, PlanError>,
) -> Result<Plan, PlanError> {
    let expected = &request.surroundings.expected;
    let Ok(plan) = &planned else { return planned };
    // What was given by hand is taken as it is.
    if request.policy.vm.vcpus.value != CpuChoice::Auto
        || !plan.exclusive.intersects(expected)
        || !request.held.is_empty()
    {
        return planned;
    }
    match plan_strictly(request, expected) {
        Ok(other) if costs_nothing(&other, plan) => Ok(other),
        _ => planned,
    }
}

fn costs_nothing(other: &Plan, plan: &Plan) -> bool {
    let worst = |plan: &Plan, rule: &str| {
        let of_rule = plan.report.iter().filter(|finding| finding.rule == rule);
        of_rule.map(|finding| finding.verdict).max().unwrap_or(Verdict::Met)
    };
    let mut rules = other.report.iter().map(|finding| &finding.rule);
    other.displaced.len() <= plan.displaced.len()
        && rules.all(|rule| worst(other, rule) <= worst(plan, rule))
}
