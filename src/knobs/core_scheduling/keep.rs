//! The VM's core-scheduling cookie: made once others are off its CPUs, kept in every pass, removed at
//! the end.

use crate::journal::{Journal, JournalError, Record};
use crate::knobs::core_scheduling::journal::CookieRecord;
use crate::knobs::core_scheduling::plan::{CookieStep, Cookies, RULE, Wish, steps, wished};
use crate::knobs::execute::{Applied, execute};
use crate::knobs::turn::Turn;
use crate::policy::{Knob, VmPolicy};
use crate::sched::is_gone;
use crate::scheduling::Cookie;
use crate::wording::counted;

/// What a pass has changed about it.
#[derive(Debug, Default)]
pub struct CookieReport {
    /// What the kernel would not do, in a sentence.
    pub refused: Option<String>,
    /// Whether another program had taken it from the VM.
    pub drifted: bool,
}

/// The VM's cookie, as far as it has one.
#[derive(Debug, Default)]
pub(crate) struct CookieKeeper {
    /// Whether others are off the CPUs by now.
    is_due: bool,
    /// The kernel would not make one: it is not asked in every pass.
    is_refused: bool,
    /// Whether all threads had it when they were last looked at.
    was_whole: bool,
}

impl CookieKeeper {
    /// Says that others are off the VM's CPUs, as far as they will be. Whether there may be anything to
    /// do.
    pub(crate) fn begin(&mut self, policy: &VmPolicy, journal: &Journal) -> bool {
        let is_wanted = policy.wanted_knobs().contains(&Knob::CoreScheduling);
        self.is_due = is_wanted || !journal.memory().cookie().is_empty();
        self.is_due
    }

    /// Makes it, or takes it, where that is not so.
    pub(crate) fn converge(
        &mut self,
        turn: &Turn<'_>,
        journal: &mut Journal,
    ) -> Result<CookieReport, JournalError> {
        let Turn { bench, snapshot, .. } = *turn;
        let mut report = CookieReport::default();
        let wish = wished(turn.topology, turn.plan, turn.policy);
        let is_needed = wish != Wish::Nothing || !journal.memory().cookie().is_empty();
        let Ok(cookies) = &snapshot.abilities.cookies else { return Ok(report) };
        if !self.is_due || !is_needed {
            return Ok(report);
        }
        note(journal, cookies)?;
        let memory = journal.memory().cookie();
        let mut steps = steps(wish, cookies, memory);
        steps.retain(|step| *step != CookieStep::Make || !self.is_refused);
        let is_ours = |cookie: &Option<Cookie>| cookie.is_some_and(|one| memory.is_ours(one));
        if wish == Wish::Nothing {
            self.was_whole = false;
        } else if cookies.values().all(is_ours) {
            self.was_whole = true;
        }
        for Applied { step, outcome } in execute(bench, journal, None, steps)? {
            match (step, outcome) {
                (CookieStep::Make, outcome) => {
                    report.drifted = self.was_whole && cookies.values().any(Option::is_none);
                    self.was_whole = outcome.is_ok();
                    match outcome {
                        Ok(cookie) => tracing::info!(
                            "{RULE}: cookie {} for {} of the VM",
                            cookie.map(|cookie| cookie.to_string()).unwrap_or_default(),
                            counted(cookies.len(), "thread")
                        ),
                        Err(error) if is_gone(&error) => {}
                        Err(error) => {
                            self.is_refused = true;
                            report.refused = Some(format!("{RULE}: a cookie was refused: {error}"));
                        }
                    }
                }
                (CookieStep::Clear(thread), Err(error)) => {
                    let tid = thread.tid;
                    let sentence = format!("{RULE}: thread {tid} keeps its cookie: {error}");
                    report.refused.get_or_insert(sentence);
                }
                (CookieStep::Clear(_), Ok(_)) => {}
            }
        }
        if let Some(sentence) = &report.refused {
            tracing::warn!("{sentence}");
        }
        if report.drifted {
            tracing::warn!("{RULE}: another program had removed the VM's cookie");
        }
        Ok(report)
    }
}

/// A qmpin that was killed right after a cookie was made has not recorded which.
fn note(journal: &mut Journal, cookies: &Cookies) -> Result<(), JournalError> {
    let found = cookies.values().copied().flatten().next();
    match found {
        Some(cookie) if journal.memory().cookie().is_pending() => {
            journal.append(vec![Record::Cookie(CookieRecord::Made(cookie))])
        }
        _ => Ok(()),
    }
}
