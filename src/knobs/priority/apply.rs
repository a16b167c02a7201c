//! The knob *sched*: how one thread is scheduled, by `sched_setscheduler(2)`.

use std::io;

use crate::ids::{StartTicks, Tid};
use crate::journal::{Journal, JournalError, Record};
use crate::knobs::affinity::apply::Bench;
use crate::knobs::affinity::write::is_still_there;
use crate::knobs::outcome::{Applied, Outcome};
use crate::knobs::priority::journal::PriorityIntent;
use crate::knobs::priority::plan::PriorityStep;
use crate::sched::is_gone;
use crate::scheduling::{Class, Scheduling};

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
) -> Result<Vec<Applied<Scheduling>>, JournalError> {
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let is_first = !journal.memory().scheduling().has_baseline();
    let baseline = is_first.then_some(Record::Priorities(baseline));
    let intents = steps.iter().map(|step| {
        Record::Priority(PriorityIntent { thread: step.thread, from: step.from, to: step.to })
    });
    journal.append(baseline.into_iter().chain(intents).collect())?;
    let apply = |step: PriorityStep| {
        let outcome = write(bench, &step);
        Applied { step, outcome }
    };
    Ok(steps.into_iter().map(apply).collect())
}

/// Checks, writes, reads back.
fn write(bench: Bench<'_>, step: &PriorityStep) -> Outcome<Scheduling> {
    let refused = |error| Outcome::Refused { error };
    if step.from.class == Class::Deadline {
        // Its budget would be lost: only its owner can restore it.
        let reason = "it has a deadline, which could not be restored";
        return refused(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    match is_still_there(bench, step.thread, &step.role) {
        Ok(true) => {}
        Ok(false) => return Outcome::Gone,
        Err(error) => return refused(error.source),
    }
    let tid = step.thread.tid;
    let now = bench.sched.set_scheduling(tid, step.to).and_then(|()| bench.sched.scheduling(tid));
    match now {
        Ok(now) if now == step.to => Outcome::Done,
        Ok(now) => refused(io::Error::other(format!("it is {now} all the same"))),
        Err(error) if is_gone(&error) => Outcome::Gone,
        Err(error) => refused(error),
    }
}
