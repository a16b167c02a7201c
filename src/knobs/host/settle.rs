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
    settled.chain(refused).chain(applied.iter().filter_map(narrowed)).collect()
}

/// Records what a cpuset has cut a thread's mask to, as another program's partition does, so that the mask counts as
/// written by qmpin when it is restored. It may have been so before the write: then the VM's own partition has moved
/// the thread. A restored mask is cut by the partition of a VM that ends at the same time.
fn narrowed(HostApplied { step, outcome, .. }: &HostApplied) -> Option<HostRecord> {
    match (step, outcome) {
        (
            HostStep::Write { place, from, .. } | HostStep::PutBack { place, from, .. },
            HostOutcome::Narrowed { to },
        ) if matches!(place, Place::Thread(_)) => {
            let (place, from, to) = (place.clone(), from.clone(), to.clone());
            Some(HostRecord::Intent { place, from, to })
        }
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StartTicks, Tid};
    use crate::knobs::host::places::Value;
    use crate::policy::Knob;
    use crate::threads::ThreadKey;

    #[test]
    fn a_mask_that_a_cpuset_has_cut_is_known_again() {
        let cpus = |list: &str| Value::Cpus(list.parse().expect("a cpulist"));
        let place = Place::Thread(ThreadKey { tid: Tid(60), start: StartTicks(1) });
        let step = |from: &str| HostStep::Write {
            knob: Knob::Kthreads,
            place: place.clone(),
            from: cpus(from),
            to: cpus("0-13"),
        };
        let cut = |from: &str| {
            let outcome = HostOutcome::Narrowed { to: cpus("0-11") };
            settle(&HostMemory::default(), &mut [HostApplied::usual(step(from), outcome)])
        };
        for from in ["14-23", "0-11"] {
            let (place, to) = (place.clone(), cpus("0-11"));
            let known = HostRecord::Intent { place, from: cpus(from), to };
            assert!(cut(from).contains(&known), "{:?}", cut(from));
        }
    }
}
