//! What is remembered of steps on places of the host, from what became of them. It writes nothing.

use crate::knobs::host::memory::{HostMemory, HostRecord};
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::Place;
use crate::knobs::host::step::HostStep;

/// What the journal is to say of steps: what is settled, and what the kernel refused. A place that no program can have
/// written is gone, whatever the kernel answered.
#[must_use]
pub fn settle(memory: &HostMemory, applied: &mut [HostApplied]) -> Vec<HostRecord> {
    for one in &mut *applied {
        // The number is another's by now, or the kernel has chosen by itself what new ones get.
        if let (HostStep::PutBack { place, .. }, HostOutcome::Refused { error }) =
            (&one.step, &one.outcome)
            && one.kept_irq().is_some()
            && (error.raw_os_error() == Some(nix::libc::EIO) || one.is_fixed)
            && memory.was_changed(place)
        {
            one.outcome = HostOutcome::Gone;
        }
    }
    let new_irqs = Place::of_new_irqs();
    let is_excluded_by_partitions = memory.has_new_irqs()
        && !applied.iter().any(|one| *one.step.place() == new_irqs && is_settled(one));
    // One that is as before may look like a new one, so the next pass decides whether to forget it.
    let stays = |one: &HostApplied| {
        is_excluded_by_partitions
            && one.step.place().irq().is_some()
            && matches!((&one.step, &one.outcome), (HostStep::PutBack { .. }, HostOutcome::Done))
    };
    let settled = applied.iter().filter(|applied| is_settled(applied) && !stays(applied));
    let settled = settled.map(|applied| HostRecord::Settled(applied.step.place().clone()));
    let refused = applied.iter().filter_map(HostApplied::unwritten);
    let refused =
        refused.map(|(place, to)| HostRecord::Refused { place: place.clone(), value: to.clone() });
    settled.chain(refused).collect()
}

/// Whether its place need not be kept in mind any longer. Kernel threads are: their masks are asked for again.
fn is_settled(HostApplied { step, outcome, .. }: &HostApplied) -> bool {
    match (step, outcome) {
        (HostStep::PutBack { place, .. }, HostOutcome::Done) => !matches!(place, Place::Thread(_)),
        (HostStep::LeaveAlone { .. }, _)
        | (HostStep::Settle { .. }, HostOutcome::Done)
        | (HostStep::PutBack { .. } | HostStep::Write { .. }, HostOutcome::Gone) => true,
        _ => false,
    }
}
