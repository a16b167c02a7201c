//! The checks of everybody else: who may be on the VM's CPUs, and what is left to be done about the host.

use std::collections::BTreeMap;

use crate::check::verify::{
    Check, HostFacts, Unmet, UnmetCause, VfioSeat, broken, holds, judged, refused, some, some_of,
};
use crate::discover::cgroup::PartitionFile;
use crate::discover::{Occupant, OccupantKind};
use crate::knobs::host::interrupts::{Interrupt, kept_in_words};
use crate::knobs::host::kernel_threads;
use crate::knobs::host::places::Place;
use crate::shown;
use crate::site::ISOLATED;
use crate::wording::cpus_in_words;

pub(crate) fn partition(facts: &HostFacts<'_>) -> Check {
    let own = &facts.lease.exclusive;
    let Some(PartitionFile { group, state, cpus, lost_drop_in }) = &facts.partition else {
        return fallback_below(facts);
    };
    if let Some(path) = lost_drop_in {
        return broken("partition", format!("/{path} does not exist: systemd may remove {group}"));
    }
    if state != ISOLATED {
        return broken("partition", format!("{group}/cpuset.cpus.partition is `{state}`"));
    }
    if cpus != own {
        let (is, wanted) = (cpus_in_words(cpus), cpus_in_words(own));
        return broken("partition", format!("{group} is isolated with {is} and not with {wanted}"));
    }
    holds("partition", format!("{} are isolated in {group}", cpus_in_words(own)))
}

/// Without a partition: whether systemd keeps the units beside the VM off its CPUs, where that is the fallback.
fn fallback_below(facts: &HostFacts<'_>) -> Check {
    let Some(cgroup) = &facts.lease.slices else {
        let reason = "the VM has none; `qmpin plan --explain` says why".to_owned();
        return refused("partition", reason);
    };
    let is_limit = |unmet: &&Unmet| unmet.place.limited_cgroup().is_some();
    let mut limits = facts.unmet.iter().filter(is_limit).peekable();
    if limits.peek().is_some() {
        let wrong =
            limits.map(|one| format!("{} is {} and not {}", one.place, one.found, one.wanted));
        return broken("partition", some(wrong));
    }
    let reason =
        format!("the VM has none; systemd keeps the units beside {cgroup} off by AllowedCPUs=");
    refused("partition", reason)
}

pub(crate) fn processes(facts: &HostFacts<'_>) -> Check {
    let there = facts.occupants.iter().filter(|one| one.kind == OccupantKind::User);
    judged("processes", there.map(named), nothing_there("process", facts))
}

/// Those that the kernel would not move are listed separately.
pub(crate) fn kthreads(facts: &HostFacts<'_>) -> Vec<Check> {
    let is_refused = |one: &&Occupant| {
        facts.unmet.iter().any(|unmet| {
            unmet.cause == UnmetCause::Refused
                && matches!(unmet.place, Place::Thread(key) if key.tid == one.tid)
        })
    };
    let there = facts.occupants.iter().filter(|one| one.kind == OccupantKind::Movable);
    let (stay, there): (Vec<&Occupant>, Vec<&Occupant>) = there.partition(is_refused);
    let mut checks = Vec::new();
    if !there.is_empty() {
        checks.push(broken("kthreads", some(there.into_iter().map(named))));
    }
    if !stay.is_empty() {
        let reason = format!("the kernel would not move {}", some(stay.into_iter().map(named)));
        checks.push(refused("kthreads", reason));
    }
    if checks.is_empty() {
        checks.push(holds("kthreads", nothing_there("movable kernel thread", facts)));
    }
    checks
}

fn nothing_there(what: &str, facts: &HostFacts<'_>) -> String {
    format!("no {what} on {}", cpus_in_words(&facts.lease.exclusive))
}

fn named(one: &Occupant) -> String {
    format!("{} ({}) on {}", shown::line(&one.comm), one.tid, one.allowed)
}

/// What the kernel binds to each CPU.
pub(crate) fn bound(facts: &HostFacts<'_>) -> Option<Check> {
    let bound = facts.occupants.iter().filter(|one| one.kind == OccupantKind::Bound);
    let names = kernel_threads::by_name(bound.map(|one| one.comm.as_str()));
    let reason = || kernel_threads::bound_in_words(names.iter());
    (!names.is_empty()).then(|| refused("bound-kthreads", reason()))
}

pub(crate) fn is_irqbalance(place: &Place) -> bool {
    matches!(place, Place::Irqbalance(_))
}

/// One that cannot be configured is not qmpin's to fix.
pub(crate) fn irqbalance(facts: &HostFacts<'_>) -> Vec<Check> {
    let unmet: Vec<&Unmet> =
        facts.unmet.iter().filter(|unmet| is_irqbalance(&unmet.place)).collect();
    let cannot = facts.irqbalances.iter().filter_map(|one| match &one.banned {
        Err(why) => Some(format!("process {} cannot be configured: {why}", one.process.pid)),
        // It has no CPU left for interrupts with these as well.
        Ok(banned) if unmet.is_empty() && !facts.lease.exclusive.is_subset(banned) => {
            Some(format!("process {} excludes {} already", one.process.pid, cpus_in_words(banned)))
        }
        Ok(_) => None,
    });
    let mut cannot = cannot.peekable();
    if cannot.peek().is_some() {
        return vec![refused("irqbalance", some(cannot))];
    }
    let why = format!("it keeps interrupts off {}", cpus_in_words(&facts.lease.exclusive));
    places(facts, unmet.into_iter(), "irqbalance", why)
}

/// Where the interrupts of the VM's devices are: `0000:0a:00.0 on CPUs 4-5 (40, 41)`.
pub(crate) fn seats(facts: &HostFacts<'_>) -> String {
    let mut seats: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for VfioSeat { place, device, on } in &facts.vfio {
        let numbers = seats.entry((device, cpus_in_words(on))).or_default();
        numbers.extend(place.irq().map(|number| number.to_string()));
    }
    let seat = |((device, on), numbers): ((&str, String), Vec<String>)| {
        format!("{device} on {on} ({})", some_of(numbers.into_iter(), ", "))
    };
    let seats = some(seats.into_iter().map(seat));
    format!("vfio_irqs = \"{}\": {seats}", facts.lease.vfio_irqs)
}

/// Whether nothing is left to be done about these places; `why` is the reason where that is so.
pub(crate) fn places<'a>(
    facts: &HostFacts<'_>,
    unmet: impl Iterator<Item = &'a Unmet>,
    check: &'static str,
    why: String,
) -> Vec<Check> {
    let in_words = |unmet: &Unmet| {
        let irq = unmet.place.irq().and_then(|number| facts.interrupts.get(&number));
        let irq = irq.map_or(String::new(), |irq| {
            let devices = if irq.devices.is_empty() { "no device" } else { irq.devices.as_str() };
            format!(", {devices}, fired there {} times", irq.fired)
        });
        let later = match unmet.cause {
            UnmetCause::Pending => "; it is configured, and applies that at its next scan",
            UnmetCause::Changed | UnmetCause::Refused => "",
        };
        format!("{} is {} and not {}{irq}{later}", unmet.place, unmet.found, unmet.wanted)
    };
    let mut checks = Vec::new();
    let (changed, others): (Vec<&Unmet>, Vec<&Unmet>) =
        unmet.partition(|unmet| unmet.cause == UnmetCause::Changed);
    // Interrupts that are refused are many, and each is named.
    let number = |unmet: &&Unmet| unmet.place.irq().filter(|_| unmet.cause == UnmetCause::Refused);
    let (kept, others): (Vec<&Unmet>, Vec<&Unmet>) =
        others.into_iter().partition(|unmet| number(unmet).is_some());
    let nothing = Interrupt::default();
    let kept: BTreeMap<u32, &Interrupt> = kept
        .iter()
        .filter_map(number)
        .map(|number| (number, facts.interrupts.get(&number).unwrap_or(&nothing)))
        .collect();
    if !changed.is_empty() {
        checks.push(broken(check, some(changed.into_iter().map(in_words))));
    }
    if !others.is_empty() {
        checks.push(refused(check, some(others.into_iter().map(in_words))));
    }
    if !kept.is_empty() {
        let reason = kept_in_words(kept.iter().map(|(number, irq)| (number, *irq)));
        checks.push(refused(check, reason));
    }
    if checks.is_empty() {
        checks.push(holds(check, why));
    }
    checks
}
