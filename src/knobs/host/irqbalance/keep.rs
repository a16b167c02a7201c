//! What a process of qmpin keeps in mind of irqbalances: which do not answer, and what was set and is not
//! taken yet.
//!
//! ```text
//!   set ───at the end of its interval──▶ read back: applied
//!     └──── long after ─────────────────▶ reported: it was set, and does otherwise
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::cpuset::CpuSet;
use crate::knobs::host::Wish;
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::{HostView, Place, Value};
use crate::knobs::host::step::HostStep;
use crate::threads::ProcessKey;

/// One that does not answer makes everybody wait, so it is asked again only after this long.
const SILENCE: Duration = Duration::from_secs(60);

/// Why it was configured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// VMs want it.
    Keep,
    /// No VM does any more.
    PutBack,
}

#[derive(Debug)]
struct Setting {
    value: Value,
    purpose: Purpose,
    /// When it should have taken it, however busy it is.
    until: Instant,
}

/// What is kept in mind of irqbalances.
#[derive(Debug, Default)]
pub(crate) struct Irqbalances {
    pending: BTreeMap<Place, Setting>,
    silent: BTreeMap<ProcessKey, (Instant, String)>,
    said: BTreeSet<String>,
}

/// The longest that one is given, whatever its interval: the end of a detach waits for it.
const PATIENCE_MAX: Duration = Duration::from_secs(120);

/// How long one that scans in so many seconds at most is given.
fn patience(within_s: u32) -> Duration {
    (Duration::from_secs(10) + 3 * Duration::from_secs(within_s.into())).min(PATIENCE_MAX)
}

impl Irqbalances {
    /// Those that are not to be asked now, and why.
    pub(crate) fn silent(&self) -> BTreeMap<ProcessKey, String> {
        let fresh = self.silent.iter().filter(|(_, (since, _))| since.elapsed() < SILENCE);
        fresh.map(|(process, (_, why))| (*process, why.clone())).collect()
    }

    /// Takes note of those that run. What is to be said of them is said once.
    pub(crate) fn saw(&mut self, view: &HostView) -> Vec<String> {
        let asked_anew = self.silent();
        let mut sentences = Vec::new();
        for one in &view.irqbalances {
            let Err(why) = &one.banned else { continue };
            if !asked_anew.contains_key(&one.process) {
                self.silent.insert(one.process, (Instant::now(), why.clone()));
            }
            let pid = one.process.pid;
            let sentence = format!(
                "irqbalance (process {pid}) cannot be configured, and may move interrupts back to the VMs' CPUs: {why}"
            );
            if self.said.insert(sentence.clone()) {
                sentences.push(sentence);
            }
        }
        let runs = |process: &ProcessKey| {
            view.irqbalances.iter().find(|one| one.process == *process).map(|one| &one.banned)
        };
        self.silent.retain(|process, _| runs(process).is_some_and(Result::is_err));
        self.pending.retain(|place, pending| match (place, pending.purpose) {
            (Place::Irqbalance(process), Purpose::Keep) => {
                runs(process).is_some_and(|banned| !is_taken(pending, banned, &view.online))
            }
            (Place::Irqbalance(process), Purpose::PutBack) => runs(process).is_some(),
            _ => false,
        });
        sentences
    }

    /// What is to be set although it is so now: another setting is pending and would be applied yet.
    pub(crate) fn to_tell_anew(&self, view: &HostView, wishes: &[Wish]) -> Vec<HostStep> {
        let step = |wish: &Wish| {
            let Wish { knob, place, value: to } = wish;
            let from = view.values.get(place).filter(|now| now.same(to, &view.online))?.clone();
            self.pending.get(place).filter(|pending| pending.value != *to)?;
            Some(HostStep::Write { knob: *knob, place: place.clone(), from, to: to.clone() })
        };
        wishes.iter().filter_map(step).collect()
    }

    /// Leaves out what was set and may not be applied yet; what should be by now is refused.
    pub(crate) fn hold_back(
        &self,
        steps: Vec<HostStep>,
        online: &CpuSet,
    ) -> (Vec<HostStep>, Vec<HostApplied>) {
        let now = Instant::now();
        let mut overdue = Vec::new();
        let mut to_do = Vec::new();
        for step in steps {
            let (HostStep::Write { place, from, to, .. } | HostStep::PutBack { place, from, to }) =
                &step
            else {
                to_do.push(step);
                continue;
            };
            match self.pending.get(place) {
                Some(pending) if pending.value == *to && !from.same(to, online) => {
                    if now > pending.until {
                        let outcome = HostOutcome::Narrowed { to: from.clone() };
                        overdue.push(HostApplied::usual(step, outcome));
                    }
                }
                _ => to_do.push(step),
            }
        }
        (to_do, overdue)
    }

    /// Takes note of what was set.
    pub(crate) fn note(&mut self, applied: &[HostApplied]) {
        for HostApplied { step, outcome, .. } in applied {
            let (place, to, purpose) = match step {
                HostStep::Write { place, to, .. } => (place, to, Purpose::Keep),
                HostStep::PutBack { place, to, .. } => (place, to, Purpose::PutBack),
                HostStep::Settle { .. } | HostStep::LeaveAlone { .. } | HostStep::Later { .. } => {
                    continue;
                }
            };
            match outcome {
                HostOutcome::Pending { within_s } => {
                    let until = Instant::now() + patience(*within_s);
                    self.pending
                        .insert(place.clone(), Setting { value: to.clone(), purpose, until });
                }
                HostOutcome::Done | HostOutcome::Gone => {
                    self.pending.remove(place);
                }
                HostOutcome::Narrowed { .. } | HostOutcome::Refused { .. } => {}
            }
        }
    }

    /// Whether any was set to something that it has not applied.
    pub(crate) fn is_any_waited_for(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether it was set to something that it has not applied.
    pub(crate) fn is_waited_for(&self, place: &Place) -> bool {
        self.pending.contains_key(place)
    }

    /// Until when those should have applied it that were set to what they did before; `None`: all have.
    pub(crate) fn putting_back_until(&self) -> Option<Instant> {
        let back = self.pending.values().filter(|pending| pending.purpose == Purpose::PutBack);
        back.map(|pending| pending.until).max()
    }
}

fn is_taken(pending: &Setting, banned: &Result<CpuSet, String>, online: &CpuSet) -> bool {
    banned.as_ref().is_ok_and(|banned| Value::Cpus(*banned).same(&pending.value, online))
}
