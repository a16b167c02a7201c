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
use vcpus::{Fit, Placement};

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
    let blocked = claims.never() | *beside;
    let usable = match (only, request.allowed()) {
        (None, None) => None,
        (only, _) => Some(only.map_or(claims.allowed, |only| only & claims.allowed)),
    };
    // What was named for one vCPU was looked into, and no wish takes it back.
    let fixed = Fixed::gather(request, &claims)?;
    let attempt = |blocked: &CpuSet, usable| {
        let blocked = *blocked - fixed.cores;
        let mut groups = request.machine.groups(&claims.reserved, &blocked, usable);
        needs::restrict(&mut groups, &request.policy.vm);
        smt::restrict(&mut groups, &request.policy.vm);
        let placement = place(request, &groups, &fixed.on);
        (groups, placement)
    };
    // The first with which each vCPU has a CPU; where there is none, the one with which the vCPUs fit best.
    let wishes = promised::wishes(request, usable.as_ref(), housekeeping::spared(request));
    let mut best: Option<(Vec<Group<'_>>, Placement, Fit)> = None;
    for wish in &wishes {
        let (groups, Some(placement)) = attempt(&(blocked | wish.beside), wish.within.as_ref())
        else {
            continue;
        };
        let fit = placement.fit();
        if best.as_ref().is_none_or(|(.., before)| fit.beats(*before)) {
            best = Some((groups, placement, fit));
        }
        if fit == Fit::Whole {
            break;
        }
    }
    let (groups, placement, _) = best.ok_or_else(|| PlanError::Infeasible {
        reason: verdicts::shortage(request, &claims, &attempt(&blocked, usable.as_ref()).0),
        nearest: None,
        waits_for: request.neighbours.names(),
    })?;
    let mut plan = finish(request, &claims, &groups, &placement, only.as_ref())?;
    plan.report.extend(fixed.finding());
    Ok(plan)
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
