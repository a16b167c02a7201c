//! The setting that would improve a plan: where a wish falls short, others are tried, and the first that keeps it is
//! named.
//!
//! ```text
//!   displace = true ─▶ another core for the host, of each group in turn
//! ```

use super::{Plan, Request, plan_strictly};
use crate::cpuset::CpuSet;
use crate::policy::{CpuChoice, Displace, Policy};

/// The rules that are wishes: the VM runs without them, and better with them. The most important first, in the
/// planner's order.
const WISHES: [&str; 9] = [
    "isolated-at-boot",
    "guest-siblings",
    "memory",
    "devices",
    "one-kind",
    "one-node",
    "one-llc",
    "own-core",
    "cache",
];

/// A setting in words, and the policy with it.
type Setting = (String, Policy);

/// Appends to each wish that falls short what would help. CPUs by hand, and vCPUs that stay where they are, are no
/// choice of the planner's.
pub(super) fn advise(plan: &mut Plan, request: &Request<'_>) {
    if request.policy.vm.vcpus.value != CpuChoice::Auto || !request.held.is_empty() {
        return;
    }
    let before = shortfalls(plan);
    if before.is_empty() {
        return;
    }
    let mut helped: Vec<(&str, String)> = Vec::new();
    for (words, policy) in settings(request, plan) {
        let with = Request { policy: &policy, ..*request };
        let Ok(other) = plan_strictly(&with, &CpuSet::EMPTY) else { continue };
        let after = shortfalls(&other);
        let lost: Vec<&str> =
            after.iter().filter(|rule| !before.contains(rule)).map(|at| WISHES[*at]).collect();
        // What is lost must count for less.
        let gained = before.iter().filter(|rule| !after.contains(rule));
        let worst = after.iter().find(|rule| !before.contains(rule));
        for rule in gained.filter(|rule| worst.is_none_or(|worst| rule < &worst)) {
            if helped.iter().all(|(known, _)| *known != WISHES[*rule]) {
                let but = match lost.as_slice() {
                    [] => String::new(),
                    lost => format!(", and {} would not", lost.join(", ")),
                };
                helped.push((WISHES[*rule], format!("; with {words} it would be met{but}")));
            }
        }
    }
    for finding in &mut plan.report {
        let help = helped.iter().find(|(rule, _)| *rule == finding.rule && finding.falls_short());
        if let Some((_, words)) = help {
            finding.reason.push_str(words);
        }
    }
}

/// The wishes that fall short, as places among all of them.
fn shortfalls(plan: &Plan) -> Vec<usize> {
    let falls_short = |at: &usize| {
        plan.report.iter().any(|finding| finding.rule == WISHES[*at] && finding.falls_short())
    };
    (0..WISHES.len()).filter(falls_short).collect()
}

/// The settings to try.
fn settings(request: &Request<'_>, plan: &Plan) -> Vec<Setting> {
    let mut settings = Vec::new();
    let policy = request.policy;
    let soft = request.surroundings.promises.soft().next();
    if soft.is_some() && policy.vm.displace.value == Displace::WhereNeeded {
        let mut with = policy.clone();
        with.vm.displace.value = Displace::Freely;
        settings.push(("displace = true".to_owned(), with));
    }
    if policy.host.reserved.value == CpuChoice::Auto {
        for core in first_cores(request, plan) {
            let mut with = policy.clone();
            with.host.reserved.value = CpuChoice::Cpus(core);
            settings.push((format!("[host] reserved = \"{core}\""), with));
        }
    }
    settings
}

/// The first core of each group that has none of the host's, and is no other VM's.
fn first_cores(request: &Request<'_>, plan: &Plan) -> Vec<CpuSet> {
    let taken = request.machine.online - plan.exclusive - plan.housekeeping;
    let groups = request.machine.groups(&CpuSet::EMPTY, &taken, None);
    let host = request.machine.topology.cores.first().map(|core| core.cpus).unwrap_or_default();
    let others = groups.iter().filter(|group| !group.cpus.intersects(&host));
    others.filter_map(|group| Some(group.free.first()?.usable())).collect()
}
