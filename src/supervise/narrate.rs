//! What the log says of the loop: one line per decision.

use std::collections::BTreeSet;

use crate::attachment::reports::{Learnt, PassReport};
use crate::knobs::execute::{Applied, Step};
use crate::knobs::outcome::{Named, Outcome};
use crate::knobs::reonline::cycle::ReonlineReport;
use crate::knobs::step::ThreadStep;
use crate::knobs::vm::VmReport;
use crate::plan::Finding;
use crate::threads::{ThreadKey, thread_in_words};

/// So many threads are kept about which a line was logged: a VM's threads come and go for months.
const LINES_MAX: usize = 10_000;

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

/// One line per decision; a thread that is changed externally again and again, or refused again and again, has one line
/// in all.
pub(super) fn log_threads<V: Named>(
    applied: &[Applied<ThreadStep<V>>],
    drifted: &BTreeSet<ThreadKey>,
    lines: &mut BTreeSet<ThreadKey>,
) where
    ThreadStep<V>: Step<Outcome = Outcome<V>>,
{
    if lines.len() > LINES_MAX {
        lines.clear();
    }
    for one in applied {
        let Applied { step, outcome } = one;
        let (who, from, to) = (step.who(), &step.from, &step.to);
        match outcome {
            Outcome::Done if drifted.contains(&step.thread) => {
                if lines.insert(step.thread) {
                    tracing::warn!(
                        "{who}: {} changed externally to {from}; restored to {to} (further changes are counted, not logged)",
                        V::NAME
                    );
                }
            }
            Outcome::Done | Outcome::Pending { .. } => tracing::info!("{who}: {from} → {to}"),
            Outcome::Gone => tracing::debug!("{who}: gone before its {} was set", V::NAME),
            Outcome::Narrowed { .. } | Outcome::Refused { .. } => {
                if lines.insert(step.thread)
                    && let Some(sentence) = one.refusal()
                {
                    tracing::warn!("{sentence}");
                }
            }
        }
    }
}

/// What the kernel would not do in this pass, in sentences: it is tried again in the next.
pub(super) fn refusals(report: &PassReport) -> BTreeSet<String> {
    let VmReport { partition, affinity, priority, .. } = &report.knobs;
    let threads = affinity.applied.iter().filter_map(Applied::refusal);
    let priorities = priority.applied.iter().filter_map(Applied::refusal);
    let partition = partition.iter().map(ToString::to_string);
    threads.chain(affinity.barred.iter().cloned()).chain(partition).chain(priorities).collect()
}

/// What the kernel would not do and is not asked for again, in sentences.
pub(super) fn refusals_for_good(report: &PassReport) -> Vec<String> {
    let ReonlineReport { left_out, failed } = &report.reonline;
    let reonline = left_out.iter().chain(failed).cloned();
    report.knobs.cookie.refused.iter().cloned().chain(reonline).collect()
}
