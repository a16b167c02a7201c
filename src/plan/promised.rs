//! The promises of the rest of the host: CPUs that a VM never takes, takes last, or takes first.
//!
//! ```text
//!   hard       another partition, exclusive CPUs       never: the kernel refuses an overlap
//!   soft       a unit's CPUs, a thread's own mask      where the VM does not fit without; the widest first, since who
//!                                                      has many CPUs loses least. Helpers may be there: they have
//!                                                      several CPUs, and the scheduler moves them off a busy one
//!   isolated   isolcpus=, nohz_full=                   first, for vCPUs; never for helpers, which the kernel would
//!                                                      leave on the first of them
//! ```

use std::cmp::Reverse;

use super::report::Finding;
use super::{Plan, PlanError, Request, memory};
use crate::cpuset::CpuSet;
use crate::policy::{CpuChoice, Displace};
use crate::promises::{Displaced, Promise, Strength};
use crate::wording::{counted, cpus_in_words, listed};

/// The rules' names in the report.
const RULE: &str = "promises";
const ISOLATED: &str = "isolated-at-boot";

/// Where vCPUs would best be.
pub(super) struct Wish {
    /// CPUs to leave to others.
    pub(super) beside: CpuSet,
    /// CPUs to stay within; `None`: any.
    pub(super) within: Option<CpuSet>,
}

/// Returns the wishes to try, the best first. With the last one nothing is left to give up. `usable` are the CPUs that
/// there are for the vCPUs, `helpers` those that helpers were given by hand.
pub(super) fn wishes(request: &Request<'_>, usable: Option<&CpuSet>, helpers: CpuSet) -> Vec<Wish> {
    let wish = |beside, within| Wish { beside, within };
    let any = usable.copied();
    if request.policy.vm.vcpus.value != CpuChoice::Auto {
        return vec![wish(CpuSet::EMPTY, any)];
    }
    let soft = avoided(request);
    let all = soft.iter().fold(CpuSet::EMPTY, |all, cpus| all | *cpus);
    let isolated = request.surroundings.promises.isolated;
    // Memory that is bound cannot follow.
    let isolated = memory::bound_nodes(request).map_or(isolated, |cpus| isolated & cpus);
    let isolated = (!isolated.is_empty() && request.held.is_empty())
        .then(|| any.map_or(isolated, |usable| usable & isolated));
    let mut wishes: Vec<Wish> =
        isolated.into_iter().map(|isolated| wish(all | helpers, Some(isolated))).collect();
    wishes.push(wish(all | helpers, any));
    // Helpers' CPUs by hand are a wish of this VM's own: it is given up before others lose anything.
    if !helpers.is_empty() {
        wishes.push(wish(all, any));
    }
    for given_up in 1..=soft.len() {
        let rest = soft[given_up..].iter().fold(CpuSet::EMPTY, |all, cpus| all | *cpus);
        wishes.push(wish(rest, any));
    }
    wishes
}

/// The cores of each soft promise, the widest first, but those that this VM's vCPUs have already.
fn avoided(request: &Request<'_>) -> Vec<CpuSet> {
    if request.policy.vm.displace.value == Displace::Freely {
        return Vec::new();
    }
    let held = request.machine.whole_cores(&request.held.values().copied().collect());
    let promises = request.surroundings.promises.soft();
    let cores = promises.map(|promise| request.machine.whole_cores(&promise.cpus) - held);
    let mut cores: Vec<CpuSet> = cores.filter(|cpus| !cpus.is_empty()).collect();
    cores.sort_by_key(|cpus| Reverse(cpus.len()));
    cores
}

/// These CPUs without those that were isolated at boot, where others are left.
pub(super) fn but_isolated(request: &Request<'_>, cpus: CpuSet) -> CpuSet {
    let rest = cpus - request.surroundings.promises.isolated;
    if rest.is_empty() { cpus } else { rest }
}

/// Checks CPUs that were given by hand. `cores` are those with their siblings, where they are for vCPUs.
///
/// # Errors
/// [`PlanError::Infeasible`] with who has them.
pub(super) fn check(request: &Request<'_>, what: &str, cores: &CpuSet) -> Result<(), PlanError> {
    let hard = request.surroundings.promises.made.iter().filter(|promise| is_hard(promise));
    let taken: Vec<String> = hard
        .filter(|promise| promise.cpus.intersects(cores))
        .map(|promise| format!("{} has {}", promise.what, cpus_in_words(&(promise.cpus & *cores))))
        .collect();
    if taken.is_empty() {
        return Ok(());
    }
    let reason = format!("{what}: {}; choose other cores", listed(&taken, 3, ", "));
    Err(PlanError::Infeasible { reason, nearest: None, waits_for: Vec::new() })
}

/// Who has CPUs that no VM can have, in clauses; without those that are outside the VM's limit in any case.
pub(super) fn in_the_way(request: &Request<'_>, allowed: &CpuSet) -> Vec<String> {
    let made = request.surroundings.promises.made.iter();
    made.filter(|promise| is_hard(promise) && promise.cpus.intersects(allowed))
        .map(|promise| format!("{} has {}", promise.what, cpus_in_words(&promise.cpus)))
        .collect()
}

fn is_hard(promise: &Promise) -> bool {
    promise.strength == Strength::Hard
}

/// Who loses CPUs to this VM.
pub(super) fn displaced(request: &Request<'_>, exclusive: &CpuSet) -> Vec<Displaced> {
    let soft = request.surroundings.promises.soft();
    soft.filter(|promise| promise.cpus.intersects(exclusive))
        .map(|promise| Displaced {
            what: promise.what.clone(),
            cpus: promise.cpus & *exclusive,
            tid: promise.tid,
        })
        .collect()
}

/// What is said of promises, and of CPUs that were isolated at boot.
pub(super) fn findings(request: &Request<'_>, plan: &Plan, used: &CpuSet) -> Vec<Finding> {
    let mut findings: Vec<Finding> = kept(request, plan).into_iter().collect();
    let isolated = request.surroundings.promises.isolated;
    if !isolated.is_empty() && !used.is_empty() {
        let outside = *used - isolated;
        let cpus = cpus_in_words(&isolated);
        findings.push(if outside.is_empty() {
            Finding::met(
                ISOLATED,
                format!("all vCPUs on {cpus}, isolated on the kernel command line"),
            )
        } else {
            Finding::degraded(
                ISOLATED,
                format!(
                    "vCPUs on {}, and {cpus} were isolated on the kernel command line: {}",
                    cpus_in_words(&outside),
                    why_outside(request, &isolated)
                ),
            )
        });
    }
    findings
}

fn why_outside(request: &Request<'_>, isolated: &CpuSet) -> String {
    if request.policy.vm.vcpus.value != CpuChoice::Auto {
        return format!("the CPUs are given by hand ({})", request.policy.vm.vcpus.origin);
    }
    let near = memory::bound_nodes(request).map_or(*isolated, |cpus| *isolated & cpus);
    let needed = request.guest.vcpus.len();
    if near.len() < needed && near != *isolated {
        return "the guest's memory is bound to another node".to_owned();
    }
    if isolated.len() >= needed && !request.held.is_empty() {
        return "they were there before; detach and attach the VM to move them".to_owned();
    }
    format!("they do not hold {} ({} in all)", counted(needed, "vCPU"), isolated.len())
}

fn kept(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    let made = &request.surroundings.promises.made;
    if made.is_empty() {
        return None;
    }
    if plan.displaced.is_empty() {
        let all = made.iter().fold(CpuSet::EMPTY, |all, promise| all | promise.cpus);
        let who: Vec<&str> = made.iter().map(|promise| promise.what.as_str()).collect();
        let (cpus, who) = (cpus_in_words(&all), listed(&who, 3, ", "));
        return Some(Finding::met(
            RULE,
            format!("no vCPU on {cpus}, which others count on: {who}"),
        ));
    }
    let who: Vec<String> = plan
        .displaced
        .iter()
        .map(|displaced| format!("{} from {}", displaced.what, cpus_in_words(&displaced.cpus)))
        .collect();
    let vm = &request.policy.vm;
    let why = if vm.vcpus.value != CpuChoice::Auto {
        format!("the CPUs are given by hand ({})", vm.vcpus.origin)
    } else if vm.displace.value == Displace::Freely {
        format!("displace = true ({})", vm.displace.origin)
    } else if request.held.is_empty() {
        "the VM does not fit on others".to_owned()
    } else {
        "the VM was there before, or does not fit on others".to_owned()
    };
    Some(Finding::degraded(RULE, format!("displaces {}: {why}", listed(&who, 3, ", "))))
}
