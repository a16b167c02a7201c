//! What the kernel would not do, in a sentence each: the same one wherever it is shown.

use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::Place;
use crate::knobs::host::step::HostStep;
use crate::shown;

/// About a place of the host that is not as it should be. `None`: nothing was refused.
#[must_use]
pub fn host_refusal(applied: &HostApplied) -> Option<String> {
    let what = place_in_words(applied);
    match (&applied.step, &applied.outcome) {
        (HostStep::Write { from, to, .. }, HostOutcome::Refused { error }) => {
            Some(format!("{what}: {from} → {to} was refused: {error}"))
        }
        (
            HostStep::Write { place: Place::Irqbalance(_), to, .. }
            | HostStep::PutBack { place: Place::Irqbalance(_), to, .. },
            HostOutcome::Narrowed { to: now },
        ) => Some(format!("{what} was set to {to}, and is {now}")),
        (HostStep::PutBack { to, .. }, HostOutcome::Pending { within_s }) => Some(format!(
            "{what} was set to {to} again, which takes effect within {within_s} s, and has not yet"
        )),
        (HostStep::Write { to, .. }, HostOutcome::Narrowed { to: now }) => {
            Some(format!("{what}: wanted {to}, the kernel made it {now}"))
        }
        (HostStep::Settle { .. }, HostOutcome::Refused { error }) => Some(format!(
            "{what} is as before, and the file about it could not be removed: {error}"
        )),
        (HostStep::PutBack { to, .. }, HostOutcome::Refused { error }) => {
            Some(format!("{what} could not be restored to {to}: {error}"))
        }
        (HostStep::PutBack { to, .. }, HostOutcome::Narrowed { to: now }) => {
            Some(format!("{what} was restored to {to}, and the kernel made it {now}"))
        }
        (HostStep::Later { before, reason, .. }, _) => Some(format!(
            "{what} cannot be restored to {before} now: {reason}; `qmpin detach --all` restores it once it can be read"
        )),
        _ => None,
    }
}

/// About a place that another program has changed meanwhile. `None`: it is none.
#[must_use]
pub fn left_alone(applied: &HostApplied) -> Option<String> {
    match &applied.step {
        HostStep::LeaveAlone { found, before, .. } => Some(format!(
            "{} was changed externally to {found} and is left as it is (before qmpin: {before})",
            place_in_words(applied)
        )),
        _ => None,
    }
}

/// `thread 312 (kswapd0)`: a number says nothing to anybody.
fn place_in_words(HostApplied { step, comm, .. }: &HostApplied) -> String {
    match comm.as_str() {
        "" => step.place().to_string(),
        comm => format!("{} ({})", step.place(), shown::line(comm)),
    }
}
