//! Wishes × what is there × what the journal remembers → steps. Empty means converged.
//!
//! ```text
//!   a wish                       it is not so      ─▶ Write
//!   no wish, but remembered      it is as before   ─▶ Settle: forget it (what looks new is kept in mind)
//!                                it is as we left  ─▶ PutBack
//!                                it is otherwise   ─▶ LeaveAlone: another program's
//!                                it is gone        ─▶ Settle
//!                                it cannot be read ─▶ Later: it stays in mind
//! ```
//!
//! irqbalance applies a setting later. So it is set to what was before even where it still says so, and it
//! is not gone where it does not answer. Where it runs, interrupts that are otherwise are its own to place.

use std::collections::BTreeSet;

use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::new_irqs::NewIrqs;
use crate::knobs::host::places::{HostView, Place, Value};
use crate::knobs::host::step::HostStep;
use crate::knobs::host::{Wish, power};
use crate::threads::ProcessKey;

/// The steps that lead to the wishes: what is restored comes first.
#[must_use]
pub fn diff(view: &HostView, wishes: &[Wish], memory: &HostMemory) -> Vec<HostStep> {
    let wished: BTreeSet<&Place> = wishes.iter().map(|wish| &wish.place).collect();
    let of_new_irqs = wishes.iter().find(|wish| wish.place == Place::of_new_irqs());
    let new_irqs = of_new_irqs.and_then(|wish| NewIrqs::of(memory, &wish.value, &wish.value));
    // Whether an interrupt would be taken for a new one if it were forgotten.
    let looks_new = |place: &Place| {
        place.irq().is_some()
            && new_irqs.as_ref().is_some_and(|new| new.let_out(view, place).is_some())
    };
    let mut steps = Vec::new();
    for (place, before) in memory.originals() {
        if wished.contains(place) {
            continue;
        }
        // As long as the governor is qmpin's, so is what the kernel has made of the preference.
        if power::governor_over(place).is_some_and(|governor| {
            wished.contains(&governor) || view.unreadable.contains_key(&governor)
        }) {
            continue;
        }
        if let Place::Irqbalance(process) = place {
            steps.push(irqbalance(view, memory, *process, before));
            continue;
        }
        let place = place.clone();
        let before = before.clone();
        steps.push(match view.values.get(&place).cloned() {
            None => match view.unreadable.get(&place).cloned() {
                Some(reason) => HostStep::Later { place, before, reason },
                None => HostStep::Settle { place },
            },
            Some(now) if now.same(&before, &view.online) => {
                // Not forgotten before the file goes: what it has may look like an earlier exclusion mask.
                if matches!(place, Place::Thread(_)) || looks_new(&place) {
                    continue;
                }
                HostStep::Settle { place }
            }
            Some(from) if memory.is_ours(&place, &from, &view.online) => {
                HostStep::PutBack { place, from, to: before }
            }
            Some(_) if place.irq().is_some() && !view.irqbalances.is_empty() => {
                HostStep::Settle { place }
            }
            Some(found) => HostStep::LeaveAlone { place, found, before },
        });
    }
    // Before its governor is back the kernel takes no other preference.
    steps.sort_by_key(|step| power::governor_over(step.place()).is_some());
    for Wish { knob, place, value } in wishes {
        let Some(now) = view.values.get(place) else { continue };
        if !now.same(value, &view.online) {
            steps.push(HostStep::Write {
                knob: *knob,
                place: place.clone(),
                from: now.clone(),
                to: value.clone(),
            });
        }
    }
    steps
}

fn irqbalance(
    view: &HostView,
    memory: &HostMemory,
    process: ProcessKey,
    before: &Value,
) -> HostStep {
    let place = Place::Irqbalance(process);
    let before = before.clone();
    let Some(found) = view.irqbalances.iter().find(|one| one.process == process) else {
        return HostStep::Settle { place };
    };
    // To be set although it does not answer: the result is reported.
    let found = found.banned.as_ref().map_or(before.clone(), |cpus| Value::Cpus(*cpus));
    if found.same(&before, &view.online) || memory.is_ours(&place, &found, &view.online) {
        return HostStep::PutBack { place, from: found, to: before };
    }
    HostStep::LeaveAlone { place, found, before }
}
