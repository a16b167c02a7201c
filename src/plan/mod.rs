//! The planner: `Topology × Guest × Policy × other VMs → Plan`. Pure: no files, no clock, no chance,
//! so that the same question always has the same answer and a test can ask any question.
//!
//! ```text
//!   housekeeping ─▶ which CPUs are the host's, shared, other VMs'      housekeeping.rs
//!   allowed      ─▶ which CPUs the VM's cgroup does not allow it         allowed.rs
//!   promised     ─▶ which CPUs other programs count on                   promised.rs
//!   needs        ─▶ which of the others it may have at all                needs.rs, and how many threads
//!                                                                      of a core, smt.rs
//!   memory, devices ─▶ which nodes come first                           memory.rs, devices.rs
//!   vcpus        ─▶ which group(s), then which core and thread         groups.rs, vcpus.rs,
//!                                                                      extension.rs (hotplug),
//!                                                                      in_order.rs, float.rs, fixed.rs (by hand)
//!   verdicts     ─▶ how far each rule is kept                           verdicts.rs, and what
//!                                                                      would improve it, advice.rs
//!   helpers      ─▶ emulator and iothreads, away from the vCPUs        helpers.rs, iothreads.rs
//! ```
//!
//! Where not all rules can be kept, the earlier one counts. `tests/planning/exhaustive.rs` compares plans with the best
//! of all placements, and says how each rule is measured:
//!
//! ```text
//!   never          CPUs of the host, of other VMs, of hard promises, outside the limit; two vCPUs on a CPU
//!   promises       the soft ones: those with few CPUs are kept first    promised.rs
//!   isolated       all vCPUs on CPUs that were isolated at boot         promised.rs
//!   siblings       a host core for each guest core                      vcpus.rs
//!   memory         each guest node near its own                         memory.rs, groups.rs
//!   kinds          fast cores, else small ones, else both               groups.rs
//!   nodes, caches  one for each guest node, else few                    groups.rs
//!   own core       for each vCPU of a guest without siblings            groups.rs
//!   then           stacked cache; many vCPUs behind one cache; not the  groups.rs
//!                  host's cache; few cores left over; few vCPUs on a
//!                  core; few promised CPUs
//! ```
//!
//! Ties are broken by the order of cores, never by CPU numbers as such: renumbering the CPUs only
//! renumbers the plan.

mod advice;
mod all;
mod allowed;
mod answer;
mod devices;
mod doubts;
mod expected;
mod extension;
mod fixed;
mod float;
mod groups;
mod helpers;
mod housekeeping;
mod in_order;
mod iothreads;
mod machine;
mod memory;
mod nearest;
mod needs;
mod neighbours;
mod promised;
pub(crate) mod report;
mod request;
mod smt;
mod vcpus;
mod verdicts;

pub use all::{AllPlanned, Declared, Left, plan_all};
pub use answer::{Lasts, Nearest, Plan, PlanError, PlannedIothread, PlannedVcpu};
pub use expected::expected_cpus;
pub use memory::{PlacedMemory, memory_seen};
pub use neighbours::{Neighbour, Neighbours};
pub use report::{Finding, Placed, Verdict, Why};
pub use request::{Request, Stay};

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::guest::GuestVcpu;
use crate::ids::{CpuId, VcpuIndex};
use crate::policy::{CpuChoice, Overflow, Sharing, Spread};
use fixed::Fixed;
use housekeeping::Claims;
use machine::Group;
pub use machine::Machine;
use promised::{Attempt, Wish};
use vcpus::Placement;

/// Answers a [`Request`].
///
/// # Errors
/// [`PlanError::Policy`] where the policy itself is wrong for this machine, [`PlanError::Infeasible`]
/// where the machine cannot hold the VM.
pub fn plan(request: &Request<'_>) -> Result<Plan, PlanError> {
    let mut planned = expected::beside(request, plan_strictly(request, &CpuSet::EMPTY));
    if let Err(PlanError::Infeasible { nearest, .. }) = &mut planned {
        *nearest = nearest::nearest(request);
    }
    if let Ok(plan) = &mut planned {
        advice::advise(plan, request);
    }
    doubts::name(&mut planned, request);
    planned
}

/// As [`plan`], without looking for what else would do, or do better. No vCPU gets CPUs of `beside`.
fn plan_strictly(request: &Request<'_>, beside: &CpuSet) -> Result<Plan, PlanError> {
    let claims = Claims::gather(request)?;
    let only = request.policy.vm.vcpus.value.cpus();
    let usable = match (only, request.allowed()) {
        (None, None) => None,
        (only, _) => Some(only.map_or(claims.allowed, |only| only & claims.allowed)),
    };
    // What was named for one vCPU was looked into, and no wish takes it back.
    let fixed = Fixed::gather(request, &claims)?;
    let never = (claims.never() | *beside) - fixed.cores;
    let isolated = promised::isolated(request, usable.as_ref());
    let within: Vec<Option<&CpuSet>> = isolated.iter().map(Some).chain([usable.as_ref()]).collect();
    let best = promised::best(request, &within, housekeeping::spared(request), |wish| {
        let groups = groups(request, &claims, &never, &fixed.cores, wish);
        let placement = place(request, &groups, &fixed.on)?;
        Some(Attempt { groups, placement })
    });
    let Attempt { groups, placement } = best.ok_or_else(|| PlanError::Infeasible {
        reason: {
            let any = Wish::none(usable.as_ref());
            let groups = groups(request, &claims, &never, &fixed.cores, &any);
            verdicts::shortage(request, &claims, &groups)
        },
        nearest: None,
        waits_for: request.neighbours.names(),
    })?;
    let mut plan = finish(request, &claims, &groups, &placement, only.as_ref())?;
    plan.report.extend(fixed.finding());
    Ok(plan)
}

/// The groups with the cores that a wish leaves to the VM, but for CPUs that are `never` its. Those of `fixed` are in
/// any case.
fn groups<'a>(
    request: &Request<'a>,
    claims: &Claims,
    never: &CpuSet,
    fixed: &CpuSet,
    wish: &Wish<'a>,
) -> Vec<Group<'a>> {
    let blocked = *never | (wish.beside - *fixed);
    let mut groups = request.machine.groups(&claims.reserved, &blocked, wish.within);
    if !wish.last.is_empty() {
        for group in &mut groups {
            group.spare(&wish.last);
        }
    }
    needs::restrict(&mut groups, &request.policy.vm);
    smt::restrict(&mut groups, &request.policy.vm);
    groups
}

fn place(
    request: &Request<'_>,
    groups: &[Group<'_>],
    fixed: &BTreeMap<VcpuIndex, CpuId>,
) -> Option<Placement> {
    let Request { machine: Machine { topology, .. }, guest, held, .. } = *request;
    let sharing = request.policy.vm.share.value;
    if let CpuChoice::InOrder(order) = &request.policy.vm.vcpus.value {
        return in_order::place(topology, groups, guest, held, order, sharing);
    }
    if float::is_wanted(request) {
        return float::place(groups, guest);
    }
    let fresh = || vcpus::fresh(request, groups);
    match extension::extended(topology, groups, guest, [fixed, held], &request.policy.vm) {
        Some(stay) if !fixed.is_empty() => Some(stay),
        Some(stay) if request.stay == Stay::UnlessBetter && stay.falls_short() => {
            Some(fresh().filter(|fresh| !fresh.falls_short()).unwrap_or(stay))
        }
        Some(stay) => Some(stay),
        None => fresh().or_else(|| match sharing {
            Sharing::Wrap => vcpus::wrapped(topology, groups, guest),
            Sharing::Refuse => None,
        }),
    }
}

fn finish(
    request: &Request<'_>,
    claims: &Claims,
    groups: &[Group<'_>],
    placement: &Placement,
    only: Option<&CpuSet>,
) -> Result<Plan, PlanError> {
    let used = placement.used();
    let exclusive =
        only.copied().unwrap_or_else(|| request.machine.whole_cores(&used) & claims.allowed);
    let housekeeping = claims.online - exclusive - claims.others;
    let place =
        |key, choice| claims.helpers(request, groups, key, choice, &exclusive, &housekeeping);
    let vm = &request.policy.vm;
    let mut emulator = place("emulator", &vm.emulator)?;
    let for_iothreads = vm.iothreads.clone().map(|choice| choice.cpus);
    let mut iothreads = match (&vm.emulator.value, &for_iothreads.value) {
        // The rule is the same for both.
        (CpuChoice::Auto, CpuChoice::Auto) => emulator.clone(),
        _ => place("iothreads", &for_iothreads)?,
    };
    let dealt = iothreads::planned(request, &iothreads.cpus);
    if !dealt.is_empty() {
        iothreads.cpus = dealt.iter().fold(CpuSet::EMPTY, |all, one| all | one.cpus);
    }
    // An iothread that has a CPU to itself is alone there, where that can be.
    let apart = emulator.cpus - iothreads.cpus;
    let alone = vm.iothreads.value.spread == Spread::Each && vm.emulator.value == CpuChoice::Auto;
    if alone && !dealt.is_empty() && !apart.is_empty() {
        emulator.cpus = apart;
    }
    let mut planned: Vec<PlannedVcpu> = placement
        .placed
        .iter()
        .map(|placed| PlannedVcpu {
            vcpu: placed.vcpu,
            cpus: CpuSet::single(placed.cpu),
            why: placed.why,
        })
        .collect();
    if let Some(cpus) = placement.floats {
        let floating = |vcpu: &GuestVcpu| PlannedVcpu { vcpu: vcpu.index, cpus, why: Why::Floats };
        planned.extend(request.guest.vcpus.iter().map(floating));
    }
    let mut left_alone = Vec::new();
    let spare = promised::but_isolated(request, (housekeeping & claims.allowed) - claims.hard);
    let spare = if spare.is_empty() { claims.allowed } else { spare };
    match request.policy.vm.overflow.value {
        Overflow::Shared => planned.extend(placement.unplaced.iter().map(|vcpu| PlannedVcpu {
            vcpu: *vcpu,
            cpus: spare,
            why: Why::Overflow,
        })),
        Overflow::Refuse => left_alone.clone_from(&placement.unplaced),
    }
    planned.sort_unstable_by_key(|planned| planned.vcpu);
    let mut plan = Plan {
        vm: request.vm.clone(),
        vcpus: planned,
        left_alone,
        iothreads: dealt,
        iothread_cpus: iothreads.cpus,
        emulator: emulator.cpus,
        exclusive,
        housekeeping,
        isolated: request.surroundings.promises.isolated & exclusive,
        displaced: promised::displaced(request, &exclusive),
        memory: None,
        isolation: request.policy.vm.isolation.value,
        report: Vec::new(),
    };
    plan.memory = memory::placed(request, &plan);
    plan.report =
        verdicts::report(request, claims, groups, placement, &plan, [&emulator, &iothreads]);
    Ok(plan)
}
