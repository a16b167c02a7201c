//! What qmpin has to say about a plan on this host: the planner's findings, and one of each knob that has any. Pure.
//! This is the one place that makes them: `plan` prints them, `attach` logs those that fall short and reports them to
//! `status` and `verify`.

use crate::knobs::core_scheduling::journal::CookieMemory;
use crate::knobs::core_scheduling::plan::{Cookies, NoCookies, finding as of_cookies};
use crate::knobs::priority::plan::finding as of_priority;
use crate::knobs::reonline::plan::{Choice, Never, finding as of_reonline};
use crate::plan::{Finding, Plan};
use crate::policy::VmPolicy;
use crate::scheduling::Throttling;
use crate::topology::Topology;

/// What the findings are made of.
pub struct Facts<'a> {
    /// The machine.
    pub topology: &'a Topology,
    /// The plan.
    pub plan: &'a Plan,
    /// What is wanted.
    pub policy: &'a VmPolicy,
    /// The partition or the fallback: the one in force, or the one that there would be. `None`: none is wanted, or none
    /// has been chosen yet.
    pub partition: Option<Finding>,
    /// Whether the kernel keeps time for others beside real-time threads.
    pub throttling: Throttling,
    /// The threads' cookies, or why the kernel gives none. Read only where the policy wants core scheduling.
    pub cookies: &'a Result<Cookies, NoCookies>,
    /// What the journal remembers of cookies.
    pub made: &'a CookieMemory,
    /// What would be taken offline and online again. `None`: it is not wanted, or was done.
    pub reonline: Option<&'a Result<Choice, Never>>,
}

/// Returns all findings, the planner's first, then in the order of the knobs.
#[must_use]
pub fn findings(facts: &Facts<'_>) -> Vec<Finding> {
    let Facts { topology, plan, policy, .. } = facts;
    let mut findings = plan.report.clone();
    findings.extend(facts.partition.clone());
    findings.extend(of_priority(plan, policy.priority(), facts.throttling));
    let (cookies, made) = (facts.cookies.as_ref(), facts.made);
    findings.extend(of_cookies(topology, plan, policy, cookies, made));
    findings.extend(facts.reonline.map(of_reonline));
    findings
}
