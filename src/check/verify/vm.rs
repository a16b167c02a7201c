//! The checks of the VM's own threads.

use std::collections::BTreeSet;

use crate::check::verify::{Check, VmFacts, broken, holds, judged, refused};
use crate::cpuset::CpuSet;
use crate::scheduling::Cookie;
use crate::threads::{Role, Thread};
use crate::wording::{counted, cpus_in_words};

pub(crate) fn vcpus(facts: &VmFacts<'_>) -> Check {
    let own = &facts.lease.exclusive;
    let floats = &facts.lease.floats;
    let mut used = CpuSet::EMPTY;
    let mut wrong = Vec::new();
    let mut number = 0;
    for thread in facts.threads {
        let Role::Vcpu(index) = thread.role else { continue };
        number += 1;
        let on = &thread.allowed;
        if !floats.is_empty() {
            if **on != *floats {
                wrong.push(format!("vCPU {index} may run on {}", cpus_in_words(on)));
            }
        } else if on.len() != 1 || !on.is_subset(own) {
            wrong.push(format!("vCPU {index} may run on {}", cpus_in_words(on)));
        } else if on.intersects(&used) {
            wrong.push(format!("vCPU {index} shares {}", cpus_in_words(on)));
        }
        used |= **on;
    }
    if number == 0 {
        return broken("vcpus", "QEMU names no vCPU".to_owned());
    }
    let vcpus = counted(number, "vCPU");
    let why = if floats.is_empty() {
        format!("{vcpus}, each alone on one of {}", cpus_in_words(own))
    } else {
        format!("{vcpus}, each on any of {}", cpus_in_words(floats))
    };
    judged("vcpus", wrong.into_iter(), why)
}

pub(crate) fn helpers(facts: &VmFacts<'_>) -> Check {
    let own = &facts.lease.exclusive;
    let is_helper = |thread: &&Thread| !matches!(thread.role, Role::Vcpu(_));
    let there = facts.threads.iter().filter(is_helper).filter(|one| one.allowed.intersects(own));
    let wrong = there.map(|one| format!("{} {} on {}", one.role.name(), one.key.tid, one.allowed));
    judged("helpers", wrong, format!("no other thread of the VM on {}", cpus_in_words(own)))
}

pub(crate) fn sched(facts: &VmFacts<'_>) -> Option<Check> {
    let wanted = facts.lease.sched.wanted()?;
    let is_about = |index| facts.lease.priority().is_about(index);
    let helpers = facts.lease.emulator | facts.lease.iothreads;
    let vcpus = || facts.threads.iter().filter(|one| matches!(one.role, Role::Vcpu(_)));
    let has_its_own = |on: &CpuSet| {
        let users = vcpus().filter(|other| other.allowed.intersects(on)).count();
        on.len() == 1 && users == 1 && !on.intersects(&helpers)
    };
    let mut wrong = Vec::new();
    let mut number = 0;
    for one in facts.threads {
        let Some(now) = facts.scheduling.get(&one.key) else { continue };
        match one.role {
            Role::Vcpu(index) if is_about(index) && has_its_own(&one.allowed) => {
                number += 1;
                if *now != wanted {
                    wrong.push(format!("vCPU {index} is {now} and not {wanted}"));
                }
            }
            _ if facts.memory.scheduling().is_ours(one.key, now)
                && *now != facts.memory.scheduling().before(one.key) =>
            {
                wrong.push(format!("{} {} is {now}", one.role.name(), one.key.tid));
            }
            _ => {}
        }
    }
    if number == 0 {
        return Some(broken("sched", format!("no vCPU has a CPU to itself and {wanted}")));
    }
    let are = if number == 1 { "is" } else { "are" };
    let vcpus = counted(number, "vCPU");
    let why = format!("{vcpus} {are} {wanted}, and no other thread of the VM");
    Some(judged("sched", wrong.into_iter(), why))
}

pub(crate) fn core_scheduling(facts: &VmFacts<'_>) -> Check {
    let beside = cpus_in_words(&facts.beside);
    if facts.memory.cookie().is_empty() {
        let reason =
            format!("others on {beside} are not kept apart; `qmpin plan --explain` says why");
        return refused("core-scheduling", reason);
    }
    let ours = |cookie: &Option<Cookie>| {
        cookie.is_some_and(|cookie| facts.memory.cookie().is_ours(cookie))
    };
    let without = facts.cookies.values().filter(|cookie| !ours(cookie)).count();
    let all: BTreeSet<&Option<Cookie>> = facts.cookies.values().collect();
    match all.first() {
        Some(Some(cookie)) if without == 0 && all.len() == 1 => {
            let threads = counted(facts.cookies.len(), "thread");
            let reason = format!("{threads} have cookie {cookie}, apart from others on {beside}");
            holds("core-scheduling", reason)
        }
        _ => {
            let threads = counted(without, "thread");
            broken("core-scheduling", format!("{threads} without the VM's cookie, beside {beside}"))
        }
    }
}
