//! The VM's core-scheduling cookie: made once others are off its CPUs, kept in every pass, removed at
//! the end.

use std::io;

use crate::journal::{Journal, JournalError, Memory, Record};
use crate::knobs::affinity::apply::Bench;
use crate::knobs::core_scheduling::apply::{clear_cookie, make_cookie};
use crate::knobs::core_scheduling::journal::CookieRecord;
use crate::knobs::core_scheduling::plan::{CookieStep, Cookies, RULE, Wish, finding, step, wish};
use crate::knobs::ground::Host;
use crate::plan::{Finding, Plan, Verdict};
use crate::policy::{Knob, Sharing, VmPolicy};
use crate::sched::{Sched, is_gone};
use crate::systemd::SystemBus;
use crate::threads::Thread;
use crate::topology::Topology;
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
    /// What was logged already.
    said: Option<Finding>,
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
        bench: Bench<'_>,
        topology: &Topology,
        plan: &Plan,
        policy: &VmPolicy,
        journal: &mut Journal,
        threads: &[Thread],
    ) -> Result<CookieReport, JournalError> {
        let mut report = CookieReport::default();
        let wish = wished(topology, plan, policy);
        if !self.is_due || (wish == Wish::Nothing && journal.memory().cookie().is_empty()) {
            self.say(unwished(topology, plan, policy, self.is_due));
            return Ok(report);
        }
        let host = Host { root: bench.root, sched: bench.sched, units: &SystemBus };
        self.say(core_scheduling_finding(host, topology, plan, policy, threads, journal.memory()));
        let Ok(cookies) = cookies(bench.sched, threads) else { return Ok(report) };
        note(journal, &cookies)?;
        let step = step(wish, &cookies, journal.memory().cookie());
        match step {
            CookieStep::Make if !self.is_refused => {
                report.drifted = self.was_whole && cookies.values().any(Option::is_none);
                let made = make_cookie(bench, journal)?;
                self.was_whole = made.is_ok();
                match made {
                    Ok(cookie) => {
                        let threads = counted(cookies.len(), "thread");
                        tracing::info!("{RULE}: cookie {cookie} for {threads} of the VM");
                    }
                    Err(error) if is_gone(&error) => {}
                    Err(error) => {
                        self.is_refused = true;
                        report.refused = Some(format!("{RULE}: a cookie was refused: {error}"));
                    }
                }
            }
            CookieStep::Clear(threads) => {
                for thread in threads {
                    if let Err(error) = clear_cookie(bench, thread) {
                        let tid = thread.tid;
                        let sentence = format!("{RULE}: thread {tid} keeps its cookie: {error}");
                        report.refused.get_or_insert(sentence);
                    }
                }
            }
            CookieStep::Nothing => self.was_whole = wish != Wish::Nothing,
            CookieStep::Make | CookieStep::LeaveAlone { .. } => {}
        }
        if let Some(sentence) = &report.refused {
            tracing::warn!("{sentence}");
        }
        if report.drifted {
            tracing::warn!("{RULE}: another program had removed the VM's cookie");
        }
        Ok(report)
    }

    /// Logs a shortfall that was not logged before.
    fn say(&mut self, finding: Option<Finding>) {
        if let Some(finding) = &finding
            && finding.verdict != Verdict::Met
            && self.said.as_ref() != Some(finding)
        {
            tracing::warn!("{}: {}", finding.rule, finding.reason);
        }
        self.said = finding;
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

fn wished(topology: &Topology, plan: &Plan, policy: &VmPolicy) -> Wish {
    if policy.wanted_knobs().contains(&Knob::CoreScheduling) {
        wish(topology, plan, policy.share.value)
    } else {
        Wish::Nothing
    }
}

/// What there is to say where no cookie is wished for, although the knob is.
fn unwished(topology: &Topology, plan: &Plan, policy: &VmPolicy, is_due: bool) -> Option<Finding> {
    let is_wanted = is_due && policy.wanted_knobs().contains(&Knob::CoreScheduling);
    if is_wanted { finding(topology, plan, Sharing::Refuse, Ok(())) } else { None }
}

/// The cookies of threads; one that has ended has none.
///
/// # Errors
/// What the kernel says where it has no cookies at all.
pub fn cookies(sched: &dyn Sched, threads: &[Thread]) -> io::Result<Cookies> {
    let mut cookies = Cookies::new();
    for thread in threads {
        match sched.cookie(thread.key.tid) {
            Ok(cookie) => {
                cookies.insert(thread.key, cookie);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(cookies)
}

/// How far a shared core can be kept from others at the same time, for the log and `qmpin plan`.
#[must_use]
pub fn core_scheduling_finding(
    host: Host<'_>,
    topology: &Topology,
    plan: &Plan,
    policy: &VmPolicy,
    threads: &[Thread],
    memory: &Memory,
) -> Option<Finding> {
    if !policy.wanted_knobs().contains(&Knob::CoreScheduling) {
        return None;
    }
    let wish = wished(topology, plan, policy);
    let able = cookies(host.sched, threads).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EINVAL) => {
            "the kernel has no core scheduling (CONFIG_SCHED_CORE)".to_owned()
        }
        Some(nix::libc::ENODEV) => "the kernel says that there is no SMT".to_owned(),
        _ => format!("the kernel gives no cookie: {error}"),
    });
    let able = able.and_then(|cookies| match step(wish, &cookies, memory.cookie()) {
        CookieStep::LeaveAlone { thread, cookie } => Err(format!(
            "thread {} has cookie {cookie} of another program, which is kept",
            thread.tid
        )),
        _ => Ok(()),
    });
    finding(topology, plan, policy.share.value, able.as_ref().copied().map_err(String::as_str))
}
