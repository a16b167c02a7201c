//! What the log says of the loop: one line per decision.

use std::collections::BTreeSet;

use super::reports::{Learnt, LookReport};
use crate::apply::{Applied, StepOutcome};
use crate::render::thread_in_words;
use crate::threads::ThreadKey;

/// A hot-added iothread is often born where it belongs; then this is the only line about it.
pub(super) fn log_learnt(learnt: &Learnt) {
    for (key, role) in &learnt.joined {
        tracing::info!("new: {}", thread_in_words(key.tid, role, ""));
    }
    for (key, role) in &learnt.left {
        tracing::info!("gone: {}", thread_in_words(key.tid, role, ""));
    }
}

/// One line per decision; a thread that is moved back again and again, or refused again and again, has
/// one line in all.
pub(super) fn log_look(report: &LookReport, lines: &mut BTreeSet<ThreadKey>) {
    for Applied { step, outcome } in &report.applied {
        let who = thread_in_words(step.thread.tid, &step.role, &step.comm);
        let again = report.drifted.contains(&step.thread);
        match outcome {
            StepOutcome::Done if again => {
                if lines.insert(step.thread) {
                    tracing::warn!(
                        "{who}: somebody else moved it to {}; back to {} (further times are counted, not logged)",
                        step.from,
                        step.to
                    );
                }
            }
            StepOutcome::Done => tracing::info!("{who}: {} → {}", step.from, step.to),
            StepOutcome::Gone => tracing::debug!("{who}: gone before it was moved"),
            StepOutcome::Narrowed { to } => {
                if lines.insert(step.thread) {
                    tracing::warn!(
                        "{who}: wanted {}, the kernel made it {to}: its cpuset allows no more",
                        step.to
                    );
                }
            }
            StepOutcome::Refused { error } => {
                if lines.insert(step.thread) {
                    tracing::warn!("{who}: {} → {} was refused: {error}", step.from, step.to);
                }
            }
        }
    }
}

/// What the kernel would not do, in sentences.
pub(super) fn refusals(report: &LookReport) -> Vec<String> {
    let sentence = |Applied { step, outcome }: &Applied| {
        let who = thread_in_words(step.thread.tid, &step.role, &step.comm);
        match outcome {
            StepOutcome::Narrowed { to } => {
                Some(format!("{who}: wanted {}, the kernel made it {to}", step.to))
            }
            StepOutcome::Refused { error } => Some(format!("{who}: {}: {error}", step.to)),
            StepOutcome::Done | StepOutcome::Gone => None,
        }
    };
    report.applied.iter().filter_map(sentence).collect()
}
