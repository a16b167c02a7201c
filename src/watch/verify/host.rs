//! The checks of everybody else: who may be on the VM's CPUs, and what is left to be done about the host.

use std::collections::BTreeMap;

use super::{
    Check, CheckVerdict, Facts, Unmet, UnmetCause, VfioSeat, broken, holds, some, some_of,
};
use crate::discover::OccupantKind;
use crate::discover::cgroup::PartitionFile;
use crate::places::Place;
use crate::plan::cpus_in_words;
use crate::plan::partition::ISOLATED;

pub(super) fn partition(facts: &Facts<'_>) -> Check {
    let own = &facts.lease.exclusive;
    let Some(PartitionFile { group, state, cpus }) = facts.partition else {
        let reason = match &facts.lease.slices {
            Some(cgroup) => {
                format!("the VM has none; systemd is to keep units beside {cgroup} off")
            }
            None => "the VM has none; `qmpin plan --explain` says why".to_owned(),
        };
        return Check { check: "partition", verdict: CheckVerdict::Refused, reason };
    };
    if state != ISOLATED {
        return broken("partition", format!("{group}/cpuset.cpus.partition is `{state}`"));
    }
    if cpus != own {
        let (is, wanted) = (cpus_in_words(cpus), cpus_in_words(own));
        return broken("partition", format!("{group} is isolated with {is} and not with {wanted}"));
    }
    holds("partition", format!("{} are isolated in {group}", cpus_in_words(own)))
}

pub(super) fn nobody(
    check: &'static str,
    what: &str,
    facts: &Facts<'_>,
    kind: OccupantKind,
) -> Check {
    let there: Vec<String> = facts
        .occupants
        .iter()
        .filter(|occupant| occupant.kind == kind)
        .map(|one| format!("{} ({}) on {}", one.comm.escape_debug(), one.tid, one.allowed))
        .collect();
    if there.is_empty() {
        return holds(check, format!("no {what} on {}", cpus_in_words(&facts.lease.exclusive)));
    }
    broken(check, some(&there))
}

/// What the kernel binds to each CPU: `ksoftirqd/12` is one of the ksoftirqd.
pub(super) fn bound(facts: &Facts<'_>) -> Option<Check> {
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    for one in facts.occupants.iter().filter(|one| one.kind == OccupantKind::Bound) {
        *names.entry(one.comm.split(['/', ':']).next().unwrap_or(&one.comm)).or_default() += 1;
    }
    let names: Vec<String> =
        names.iter().map(|(name, number)| format!("{number} {name}")).collect();
    let reason = format!("the kernel binds them to their CPUs: {}", names.join(", "));
    (!names.is_empty()).then_some(Check {
        check: "bound-kthreads",
        verdict: CheckVerdict::Refused,
        reason,
    })
}

pub(super) fn is_irqbalance(place: &Place) -> bool {
    matches!(place, Place::Irqbalance(_))
}

/// One that cannot be told is not qmpin's to mend.
pub(super) fn irqbalance(facts: &Facts<'_>) -> Vec<Check> {
    let unmet: Vec<&Unmet> =
        facts.unmet.iter().filter(|unmet| is_irqbalance(&unmet.place)).collect();
    let cannot = facts.irqbalances.iter().filter_map(|one| match &one.banned {
        Err(why) => Some(format!("process {} cannot be told: {why}", one.process.pid)),
        // It has no CPU left for interrupts with these as well.
        Ok(banned) if unmet.is_empty() && !facts.lease.exclusive.is_subset(banned) => {
            Some(format!("process {} keeps off {} already", one.process.pid, cpus_in_words(banned)))
        }
        Ok(_) => None,
    });
    let cannot: Vec<String> = cannot.collect();
    if !cannot.is_empty() {
        let (check, verdict) = ("irqbalance", CheckVerdict::Refused);
        return vec![Check { check, verdict, reason: some(&cannot) }];
    }
    places(facts, &unmet, "irqbalance", || {
        format!("it keeps interrupts off {}", cpus_in_words(&facts.lease.exclusive))
    })
}

pub(super) fn as_it_should() -> String {
    "as it should be".to_owned()
}

/// Where the interrupts of the VM's devices are: `0000:0a:00.0 on CPUs 4-5 (40, 41)`.
pub(super) fn seats(facts: &Facts<'_>) -> String {
    let mut seats: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for VfioSeat { place, device, on } in facts.vfio {
        let numbers = seats.entry((device, cpus_in_words(on))).or_default();
        numbers.extend(place.irq().map(|number| number.to_string()));
    }
    let seat = |((device, on), numbers): ((&str, String), Vec<String>)| {
        format!("{device} on {on} ({})", some_of(&numbers, ", "))
    };
    let seats: Vec<String> = seats.into_iter().map(seat).collect();
    format!("vfio_irqs = \"{}\": {}", facts.lease.vfio_irqs.name(), some(&seats))
}

pub(super) fn places(
    facts: &Facts<'_>,
    unmet: &[&Unmet],
    check: &'static str,
    all_is_well: impl Fn() -> String,
) -> Vec<Check> {
    let in_words = |unmet: &&Unmet| {
        let irq = unmet.place.irq().and_then(|number| facts.interrupts.get(&number));
        let irq = irq.map_or(String::new(), |irq| {
            let devices = if irq.devices.is_empty() { "no device" } else { irq.devices.as_str() };
            format!(", {devices}, fired there {} times", irq.fired)
        });
        let later = match unmet.cause {
            UnmetCause::Told => "; it was told, and takes it at its next turn",
            UnmetCause::Changed | UnmetCause::Refused => "",
        };
        format!("{} is {} and not {}{irq}{later}", unmet.place, unmet.found, unmet.wanted)
    };
    let mut checks = Vec::new();
    let (changed, refused): (Vec<&Unmet>, Vec<&Unmet>) =
        unmet.iter().copied().partition(|unmet| unmet.cause == UnmetCause::Changed);
    for (of, verdict) in [(changed, CheckVerdict::Broken), (refused, CheckVerdict::Refused)] {
        let list: Vec<String> = of.iter().map(in_words).collect();
        if !list.is_empty() {
            checks.push(Check { check, verdict, reason: some(&list) });
        }
    }
    if unmet.is_empty() {
        checks.push(holds(check, all_is_well()));
    }
    checks
}
