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

use super::machine::Group;
use super::report::Finding;
use super::vcpus::{Fit, Placement};
use super::{Plan, PlanError, Request, memory};
use crate::cpuset::CpuSet;
use crate::policy::{CpuChoice, Displace};
use crate::promises::{Displaced, Promise, Strength};
use crate::wording::{counted, cpus_in_words, listed};

/// The rules' names in the report.
const RULE: &str = "promises";
const ISOLATED: &str = "isolated-at-boot";

/// Where vCPUs would best be.
pub(super) struct Wish<'a> {
    /// CPUs to leave to others.
    pub(super) beside: CpuSet,
    /// CPUs to stay within; `None`: any.
    pub(super) within: Option<&'a CpuSet>,
    /// CPUs to take last, because others lose them.
    pub(super) last: CpuSet,
}

impl<'a> Wish<'a> {
    /// Nothing but CPUs to stay within.
    pub(super) fn none(within: Option<&'a CpuSet>) -> Wish<'a> {
        Wish { beside: CpuSet::EMPTY, within, last: CpuSet::EMPTY }
    }
}

/// Where a wish leads to.
pub(super) struct Attempt<'a> {
    pub(super) groups: Vec<Group<'a>>,
    pub(super) placement: Placement,
}

/// The CPUs that were isolated at boot, of the usable ones; `None`: there is no reason to prefer any.
pub(super) fn isolated(request: &Request<'_>, usable: Option<&CpuSet>) -> Option<CpuSet> {
    let isolated = request.surroundings.promises.isolated;
    // Memory that is bound cannot follow.
    let isolated = memory::bound_nodes(request).map_or(isolated, |cpus| isolated & cpus);
    let is_open = request.policy.vm.vcpus.value == CpuChoice::Auto && request.held.is_empty();
    (is_open && !isolated.is_empty()).then(|| usable.map_or(isolated, |usable| *usable & isolated))
}

/// Tries wishes, the best first, until one gives each vCPU a CPU of its own; where none does, the one with which the
/// vCPUs fit best is taken. `within` are the CPUs to stay within, the best first, and `helpers` those that helpers were
/// given by hand.
pub(super) fn best<'a>(
    request: &Request<'_>,
    within: &[Option<&'a CpuSet>],
    helpers: CpuSet,
    attempt: impl Fn(&Wish<'a>) -> Option<Attempt<'a>>,
) -> Option<Attempt<'a>> {
    let mut soft = avoided(request);
    let all = soft.iter().fold(CpuSet::EMPTY, |all, promise| all | promise.cores);
    let lost = soft.iter().fold(CpuSet::EMPTY, |all, promise| all | promise.cpus);
    let mut attempts = Attempts { attempt, within, lost, best: None };
    // Helpers' CPUs by hand are a wish of this VM's own: it is given up before others lose anything.
    if attempts.fits(all | helpers)
        || (!helpers.is_empty() && attempts.fits(all))
        || soft.is_empty()
        || !attempts.fits(CpuSet::EMPTY)
    {
        return attempts.best;
    }
    // The narrowest is kept first; of those that are as wide, one on whose cores others count, too, or one that is not
    // in the way.
    let mut kept = CpuSet::EMPTY;
    while let Some(at) = (0..soft.len()).min_by_key(|at| {
        let Avoided { cpus, cores } = &soft[*at];
        let others = soft.iter().filter(|other| other.cores.intersects(cores)).count();
        (cpus.len(), Reverse(others), attempts.takes(cores))
    }) {
        let cores = soft.remove(at).cores;
        if attempts.fits(kept | cores) {
            kept |= cores;
        }
    }
    attempts.best
}

struct Attempts<'a, 'b, F> {
    attempt: F,
    within: &'b [Option<&'a CpuSet>],
    /// The CPUs of all promises that can be broken.
    lost: CpuSet,
    /// The last that was whole, else the best.
    best: Option<Attempt<'a>>,
}

impl<'a, F: Fn(&Wish<'a>) -> Option<Attempt<'a>>> Attempts<'a, '_, F> {
    /// Whether each vCPU has a CPU of its own beside these CPUs.
    fn fits(&mut self, beside: CpuSet) -> bool {
        let last = self.lost - beside;
        self.within.iter().any(|within| {
            let wish = Wish { beside, within: *within, last };
            let Some(found) = (self.attempt)(&wish) else { return false };
            let fit = found.placement.fit();
            let before = self.best.as_ref().map(|best| best.placement.fit());
            if before.is_none_or(|before| fit.beats(before)) {
                self.best = Some(found);
            }
            fit == Fit::Whole
        })
    }

    /// Whether the best attempt takes one of these CPUs.
    fn takes(&self, cpus: &CpuSet) -> bool {
        let best = self.best.as_ref();
        best.is_some_and(|best| best.placement.placed.iter().any(|on| cpus.contains(on.cpu)))
    }
}

/// A promise that can be broken.
struct Avoided {
    cpus: CpuSet,
    /// The cores of these CPUs, but those that this VM's vCPUs have already.
    cores: CpuSet,
}

fn avoided(request: &Request<'_>) -> Vec<Avoided> {
    let vm = &request.policy.vm;
    if vm.displace.value == Displace::Freely || vm.vcpus.value != CpuChoice::Auto {
        return Vec::new();
    }
    let held = request.machine.whole_cores(&request.held.values().copied().collect());
    let avoided = request.surroundings.promises.soft().map(|promise| Avoided {
        cpus: promise.cpus,
        cores: request.machine.whole_cores(&promise.cpus) - held,
    });
    avoided.filter(|promise| !promise.cores.is_empty()).collect()
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
