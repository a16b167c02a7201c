//! What the log says of the loop: one line per decision.

use std::collections::BTreeSet;

use crate::attachment::reports::{Learnt, PassReport};
use crate::knobs::affinity::apply::{Applied, StepOutcome, thread_refusal};
use crate::knobs::priority::apply::{PriorityApplied, PriorityOutcome, priority_refusal};
use crate::knobs::priority::keep::PriorityReport;
use crate::knobs::priority::plan::PriorityStep;
use crate::knobs::reonline::cycle::ReonlineReport;
use crate::plan::Finding;
use crate::threads::{ThreadKey, thread_in_words};

/// Each that falls short and was not there before.
pub(super) fn log_shortfalls(findings: &[Finding], before: &[Finding]) {
    let new = |finding: &&Finding| finding.falls_short() && !before.contains(finding);
    for finding in findings.iter().filter(new) {
        tracing::warn!("{finding}");
    }
}

/// A hot-added iothread is often created where it belongs; then this is the only line about it.
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
pub(super) fn log_pass(report: &PassReport, lines: &mut BTreeSet<ThreadKey>) {
    for applied in &report.applied {
        let Applied { step, outcome } = applied;
        let who = thread_in_words(step.thread.tid, &step.role, &step.comm);
        let again = report.drifted.contains(&step.thread);
        match outcome {
            StepOutcome::Done if again => {
                if lines.insert(step.thread) {
                    tracing::warn!(
                        "{who}: affinity changed externally to {}; restored to {} (further changes are counted, not logged)",
                        step.from,
                        step.to
                    );
                }
            }
            StepOutcome::Done => tracing::info!("{who}: {} → {}", step.from, step.to),
            StepOutcome::Gone => tracing::debug!("{who}: gone before it was moved"),
            StepOutcome::Narrowed { .. } | StepOutcome::Refused { .. } => {
                if lines.insert(step.thread)
                    && let Some(sentence) = thread_refusal(applied)
                {
                    tracing::warn!("{sentence}");
                }
            }
        }
    }
}

/// As [`log_pass`], of how threads are scheduled.
pub(super) fn log_priority(report: &PriorityReport, lines: &mut BTreeSet<ThreadKey>) {
    for applied in &report.applied {
        let PriorityApplied { step: PriorityStep { of, to }, outcome } = applied;
        let who = thread_in_words(of.thread.tid, &of.role, &of.comm);
        match outcome {
            PriorityOutcome::Done if report.drifted.contains(&of.thread) => {
                if lines.insert(of.thread) {
                    tracing::warn!(
                        "{who}: scheduling changed externally to {}; restored to {to} (further changes are counted, not logged)",
                        of.now
                    );
                }
            }
            PriorityOutcome::Done => tracing::info!("{who}: {} → {to}", of.now),
            PriorityOutcome::Gone => tracing::debug!("{who}: gone before it was {to}"),
            PriorityOutcome::Refused { .. } => {
                if lines.insert(of.thread)
                    && let Some(sentence) = priority_refusal(applied)
                {
                    tracing::warn!("{sentence}");
                }
            }
        }
    }
}

/// What the kernel would not do at this look, in sentences: it is tried again at the next.
pub(super) fn refusals(report: &PassReport) -> BTreeSet<String> {
    let threads = report.applied.iter().filter_map(thread_refusal);
    let priorities = report.priority.applied.iter().filter_map(priority_refusal);
    let partition = report.partition.iter().map(ToString::to_string);
    threads.chain(report.barred.iter().cloned()).chain(partition).chain(priorities).collect()
}

/// What the kernel would not do and is not asked for again, in sentences.
pub(super) fn refusals_for_good(report: &PassReport) -> Vec<String> {
    let ReonlineReport { left_out, failed } = &report.reonline;
    let reonline = left_out.iter().chain(failed).cloned();
    report.cookie.refused.iter().cloned().chain(reonline).collect()
}
