//! The knob *sched*: how one thread is scheduled, by `sched_setscheduler(2)`.

use std::io;

use crate::ids::{StartTicks, Tid};
use crate::journal::{Journal, JournalError, Record};
use crate::knobs::affinity::apply::Bench;
use crate::knobs::affinity::write::is_still_there;
use crate::knobs::priority::journal::PriorityIntent;
use crate::knobs::priority::plan::PriorityStep;
use crate::sched::is_gone;
use crate::scheduling::{Class, Scheduling};
use crate::threads::thread_in_words;

/// What became of a change.
#[derive(Debug)]
pub enum PriorityOutcome {
    /// Written and read back.
    Done,
    /// The thread had ended before.
    Gone,
    /// The kernel said no.
    Refused {
        /// What it said.
        error: io::Error,
    },
}

/// A change and what became of it.
#[derive(Debug)]
pub struct PriorityApplied {
    /// The change.
    pub step: PriorityStep,
    /// What became of it.
    pub outcome: PriorityOutcome,
}

impl PriorityApplied {
    /// Whether the thread is not as it should be now.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        matches!(self.outcome, PriorityOutcome::Refused { .. })
    }
}

/// Carries out the changes. `baseline` is how every thread is scheduled; it goes into the journal with
/// the first change.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable; then nothing was written.
pub fn apply_priorities(
    bench: Bench<'_>,
    journal: &mut Journal,
    baseline: Vec<(Tid, StartTicks, Scheduling)>,
    steps: Vec<PriorityStep>,
) -> Result<Vec<PriorityApplied>, JournalError> {
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let is_first = !journal.memory().scheduling().has_baseline();
    let baseline = is_first.then_some(Record::Priorities(baseline));
    let intents = steps.iter().map(|PriorityStep { of, to }| {
        Record::Priority(PriorityIntent { thread: of.thread, from: of.now, to: *to })
    });
    journal.append(baseline.into_iter().chain(intents).collect())?;
    let apply = |step: PriorityStep| {
        let outcome = write(bench, &step);
        PriorityApplied { step, outcome }
    };
    Ok(steps.into_iter().map(apply).collect())
}

/// Checks, writes, reads back.
fn write(bench: Bench<'_>, PriorityStep { of, to }: &PriorityStep) -> PriorityOutcome {
    let refused = |error| PriorityOutcome::Refused { error };
    if of.now.class == Class::Deadline {
        // Its budget would be lost: only its owner can restore it.
        let reason = "it has a deadline, which could not be restored";
        return refused(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    match is_still_there(bench, of.thread, &of.role) {
        Ok(true) => {}
        Ok(false) => return PriorityOutcome::Gone,
        Err(error) => return refused(error.source),
    }
    let tid = of.thread.tid;
    let now = bench.sched.set_scheduling(tid, *to).and_then(|()| bench.sched.scheduling(tid));
    match now {
        Ok(now) if now == *to => PriorityOutcome::Done,
        Ok(now) => refused(io::Error::other(format!("it is {now} all the same"))),
        Err(error) if is_gone(&error) => PriorityOutcome::Gone,
        Err(error) => refused(error),
    }
}

/// About a thread that is not scheduled as it should be. `None`: nothing was refused.
#[must_use]
pub fn priority_refusal(PriorityApplied { step, outcome }: &PriorityApplied) -> Option<String> {
    match outcome {
        PriorityOutcome::Refused { error } => {
            let who = thread_in_words(step.of.thread.tid, &step.of.role, &step.of.comm);
            Some(format!("{who}: {} → {} was refused: {error}", step.of.now, step.to))
        }
        PriorityOutcome::Done | PriorityOutcome::Gone => None,
    }
}
