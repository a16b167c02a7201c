//! The loop around `state`: makes events, carries out effects. It decides nothing, and it never waits for
//! anything but its sources: what may take long is the worker's.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::attachment::{Attachment, Found};
use super::budget::Hearing;
use super::host_report::{HostLines, HostReport, log_host};
use super::leasing::{give_back, lock_forsaken};
use super::line::{Done as LineDone, Line, Said};
use super::narrate::{log_learnt, log_look, log_plan, log_priority, log_shortfalls};
use super::notify;
use super::pace::{ForNeighbours, Pace};
use super::reload::Taken;
use super::reports::{Learnt, LookReport};
use super::settings::{Host, Settings};
use super::signals::Signals;
use super::sources::{BLIND_INTERVAL, Watch, at, interval, next_of};
use super::start_error::StartError;
use super::starting::find;
use super::state::{Effect, Ending, Event, Hint, Liveness, State};
use super::telling::Telling;
use super::worker::{self, Done, Job, Now, Worker};
use crate::discover::boot_id;
use crate::discover::tasks::TasksError;
use crate::error::chain;
use crate::ids::Tid;
use crate::leases::Heart;
use crate::marks::note_reload;
use crate::plan::Plan;
use crate::policy::ChannelChoice;
use crate::qmp::{Happening, QmpError, QmpEvent, Roles, Upgrade};
use crate::restore::RestoreReport;
use crate::sysroot::SysRoot;
use crate::threads::{ProcessKey, Role};
use crate::watch::{Births, LeaseChanges, SlowTimer};

/// Between two signs of life while the worker is busy.
const BEAT: Duration = Duration::from_secs(1);
/// A look waits this long for further hints: a hotplugged thread is not alone.
const LOOK_DELAY: Duration = Duration::from_millis(1);
/// QEMU's events that are heard in one go, and for how long at most. One pass follows from all of them.
const EVENTS_AT_A_TIME: usize = 512;
const HEARING_TIME: Duration = Duration::from_millis(4);
/// Two looks are at least this far apart, however many hints there are.
const LOOK_GAP: Duration = Duration::from_millis(20);

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Why it ended.
    pub why: Ending,
    /// What was put back; none where nothing was ours.
    pub restored: Option<RestoreReport>,
}

/// Attaches, and leaves all as it is then.
///
/// # Errors
/// [`StartError`].
pub async fn attach_once(
    host: Host<'_>,
    settings: Settings,
) -> Result<(Plan, LookReport, HostReport), StartError> {
    let (mut attachment, _channel, mut report) = Attachment::start(host, settings).await?;
    log_look(&report, &mut BTreeSet::new());
    log_shortfalls(attachment.plan(), &[]);
    // Anything that fails from here on leaves the VM pinned, with its undo.
    let remembered = attachment.remember_host();
    // The kernel does not put back what it changes as a partition is built.
    let isolated = match &remembered {
        Ok(()) => attachment.isolate(),
        Err(_) => Ok(LookReport::default()),
    };
    let kept = attachment.keep_host();
    let raised = attachment.prioritise();
    let second = attachment.look();
    let plan = attachment.plan().clone();
    attachment.leave();
    report.then_applied(isolated?.applied);
    let second = second?;
    report.placed = second.placed;
    let raised = raised?;
    report.then_applied(raised.applied);
    report.then_applied(second.applied);
    report.partition = second.partition;
    (report.priority, report.cookie) = (raised.priority, raised.cookie);
    log_priority(&report.priority, &mut BTreeSet::new());
    remembered?;
    let kept = kept?;
    log_host(&kept, &mut HostLines::default());
    Ok((plan, report, kept))
}

/// See [`Supervisor::follow`](super::supervisor::Supervisor::follow).
pub(super) async fn run(
    host: Host<'_>,
    settings: Settings,
    worker: Worker,
    signals: &mut Signals,
) -> Result<Ended, StartError> {
    let found = tokio::select! {
        biased;
        found = find(host, &settings) => found?,
        // It waits for QEMU alone. This process has written nothing, but an earlier one that was killed may have.
        // A VM that another process follows, or has left so, is not restored.
        _ = signals.stop.next() => {
            let Settings { state, vm, .. } = &settings;
            tracing::info!("VM {vm}: stopped before it was attached");
            let boot_id = boot_id(host.root).map_err(StartError::BootId)?;
            let restored = match lock_forsaken(host.root, state, vm, &boot_id)? {
                Some(_lock) => Some(give_back(host, state, vm, &boot_id)?),
                None => None,
            };
            return Ok(Ended { why: Ending::Told, restored });
        }
    };
    let (found, channel) = found;
    let process = found.process();
    let mut watch = Watch::of(host, &settings, process)?;
    let runner = Runner {
        root: host.root,
        process,
        upgrade_wanted: settings.policy.vm.channel.value == ChannelChoice::Auto,
        settings,
        pace: Pace::default(),
        last_look: Instant::now(),
        last_ask: None,
        look_at: None,
        ask_at: None,
        line: Line::new(channel),
        heart: found.heart(),
        next_beat: None,
        worker,
        answer: None,
        due: BTreeSet::new(),
        hearing: Hearing::new(),
        isolate_later: false,
        ending: None,
        new_interval: None,
        is_ready: false,
        now: None,
        for_neighbours: ForNeighbours::default(),
        telling: Telling::default(),
    };
    runner.run(found, &mut watch, signals).await
}

struct Runner<'a> {
    root: &'a SysRoot,
    process: ProcessKey,
    settings: Settings,
    line: Line,
    upgrade_wanted: bool,
    look_at: Option<Instant>,
    ask_at: Option<Instant>,
    last_look: Instant,
    last_ask: Option<Instant>,
    pace: Pace,
    heart: Option<Heart>,
    /// When the next sign of life is due while the worker is busy.
    next_beat: Option<Instant>,
    worker: Worker,
    /// An answer of QEMU's that the worker has yet to take.
    answer: Option<Job>,
    due: BTreeSet<Task>,
    hearing: Hearing,
    /// What others are excluded with could not be written down: it is tried again with the slow timer.
    isolate_later: bool,
    ending: Option<Ending>,
    /// The slow timer is to tick this often.
    new_interval: Option<Duration>,
    /// Whether everything was in place once.
    is_ready: bool,
    /// How the VM stands; `None` before it is attached.
    now: Option<Now>,
    for_neighbours: ForNeighbours,
    telling: Telling,
}

/// What the worker has yet to do, in this order. However often something becomes due, it is done once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Task {
    /// The policy is to be read again.
    Reload,
    Isolate,
    /// The reason for a fallback may have gone.
    Choose,
    /// Interrupts and kernel threads may have come since the last time.
    KeepHost,
    Prioritise,
    Look,
}

impl Task {
    /// What a VM is given when it is attached.
    const FIRST: [Task; 3] = [Task::Isolate, Task::KeepHost, Task::Prioritise];

    fn job(self) -> Job {
        match self {
            Task::Reload => Job::Reload,
            Task::Isolate => Job::Isolate,
            Task::Choose => Job::Choose,
            Task::KeepHost => Job::KeepHost,
            Task::Prioritise => Job::Prioritise,
            Task::Look => Job::Look,
        }
    }
}

impl Runner<'_> {
    async fn run(
        mut self,
        found: Found,
        watch: &mut Watch,
        signals: &mut Signals,
    ) -> Result<Ended, StartError> {
        let mut state = State::default();
        let mut effects = Vec::new();
        self.give(Job::Begin(Box::new(found)));
        loop {
            for effect in std::mem::take(&mut effects) {
                self.carry_out(effect);
            }
            self.give_next();
            self.tell();
            let event = match self.next_event(watch, signals).await {
                Next::Event(event) => event,
                Next::Done(ended) => {
                    let worker::Ended { done, now, cost } = *ended;
                    if matches!(done, Done::Looked(_) | Done::Learnt(_)) {
                        let is_due = self.look_at.is_some() || self.due.contains(&Task::Look);
                        self.hearing.done(cost, is_due);
                    }
                    let before = match now {
                        Some(now) => self.now.replace(now),
                        None => self.now.clone(),
                    };
                    self.log_new_shortfalls(before.as_ref());
                    match self.done(done)? {
                        Went::On(events) => {
                            effects
                                .extend(events.into_iter().flat_map(|event| state.handle(event)));
                            continue;
                        }
                        Went::Ended(ended) => return Ok(*ended),
                    }
                }
                Next::Nothing => continue,
            };
            effects.extend(state.handle(event));
        }
    }

    fn give(&mut self, job: Job) {
        self.next_beat = Some(Instant::now() + BEAT);
        self.worker.give(job);
    }

    /// Gives the worker its next job, where it has none. Nothing is begun once it is to end.
    fn give_next(&mut self) {
        if !self.worker.is_idle() {
            return;
        }
        self.next_beat = None;
        let job = match self.ending {
            Some(_) => Some(Job::Finish),
            None => self.answer.take().or_else(|| self.due.pop_first().map(Task::job)),
        };
        if let Some(job) = job {
            self.give(job);
        } else if !self.is_ready && Task::FIRST.iter().all(|first| !self.due.contains(first)) {
            self.is_ready = true;
            self.telling.ready(self.status());
        }
    }

    /// Shows that this process is alive, unless its worker hangs.
    fn beat(&mut self) {
        self.next_beat = Some(Instant::now() + BEAT);
        if self.worker.is_stuck() {
            return;
        }
        if let Some(heart) = &self.heart {
            heart.beat();
        }
        notify::busy();
    }

    /// Waits for something to happen.
    async fn next_event(&mut self, watch: &mut Watch, signals: &mut Signals) -> Next {
        let Watch { exit, births, leases, slow_timer } = watch;
        if let Some(every) = self.new_interval.take() {
            let every = if births.is_none() { every.min(BLIND_INTERVAL) } else { every };
            if let Err(error) = slow_timer.set_interval(every) {
                tracing::warn!("the slow timer stays as it was: {error}");
            }
        }
        tokio::select! {
            biased;
            ended = exit.wait(), if self.ending.is_none() => {
                if let Err(error) = ended {
                    tracing::warn!("the end of QEMU can no longer be watched: {error}");
                }
                Next::Event(Event::QemuEnded)
            }
            _ = signals.stop.next(), if self.ending.is_none() => Next::Event(Event::Stop),
            _ = signals.reload.next(), if self.ending.is_none() => {
                self.due.insert(Task::Reload);
                Next::Nothing
            }
            next = self.next_hint(births, leases, slow_timer) => next,
        }
    }

    /// The same, for sources that may be busy all the time. They are polled without bias, so that a flood of QMP
    /// events or of new threads cannot starve the others.
    async fn next_hint(
        &mut self,
        births: &mut Option<Births>,
        leases: &mut Option<LeaseChanges>,
        slow_timer: &mut SlowTimer,
    ) -> Next {
        let choice_due = self.choice_due();
        // A question under way goes on; it has limits of its own.
        let is_asked = !self.line.is_free();
        let rest = self.hearing.rest(is_asked);
        let hears_line = self.ending.is_none() && (rest.is_none() || is_asked);
        // A pass that is about to come sees all threads. Until then what comes is one message to the kernel.
        let hears_births = rest.is_none() && self.look_at.is_none();
        let said = tokio::select! {
            ended = self.worker.done() => return Next::Done(Box::new(ended)),
            () = at(rest) => return Next::Nothing,
            () = at(self.next_beat) => {
                self.beat();
                return Next::Nothing;
            }
            said = self.line.said(), if hears_line => said,
            birth = next_of(births, Births::next), if hears_births => {
                self.hearing.heard();
                if let Err(error) = birth {
                    tracing::warn!("births can no longer be watched: {error}");
                    *births = None;
                    if let Err(error) = slow_timer.at_least_every(BLIND_INTERVAL) {
                        tracing::warn!("the slow timer stays as slow as it is: {error}");
                    }
                }
                return Next::Event(Event::Hint(Hint::Birth));
            }
            changed = next_of(leases, LeaseChanges::next) => {
                if let Err(error) = changed {
                    tracing::warn!("other VMs' comings and goings are no longer seen: {error}");
                    *leases = None;
                }
                if self.for_neighbours.changed(Instant::now()) {
                    self.due.insert(Task::KeepHost);
                }
                return Next::Event(Event::Hint(Hint::Neighbour));
            }
            () = at(self.for_neighbours.due()) => {
                self.for_neighbours.looked(Instant::now());
                self.due.insert(Task::KeepHost);
                return Next::Event(Event::Hint(Hint::Neighbour));
            }
            () = at(choice_due) => {
                self.due.insert(Task::Choose);
                return Next::Nothing;
            }
            () = at(self.look_at) => {
                self.look_at = None;
                if let Some(births) = births {
                    births.drain();
                }
                return Next::Event(Event::LookDue);
            }
            () = at(self.ask_at) => {
                self.ask_at = None;
                return Next::Event(Event::AskDue);
            }
            ticked = slow_timer.tick() => {
                if let Err(error) = ticked {
                    tracing::warn!("the slow timer cannot be read: {error}");
                }
                if !self.worker.is_stuck() {
                    notify::alive(&self.status());
                }
                self.due.insert(Task::KeepHost);
                if std::mem::take(&mut self.isolate_later) {
                    self.due.insert(Task::Isolate);
                }
                return Next::Event(Event::Hint(Hint::Timer));
            }
        };
        self.hear(said).await.map_or(Next::Nothing, Next::Event)
    }

    /// Takes an event, and all that have come with it. The strongest of their hints counts.
    async fn hear_events(&mut self, first: QmpEvent) -> Option<Event> {
        let started = Instant::now();
        let mut strongest = None;
        let mut event = first;
        for _ in 0..EVENTS_AT_A_TIME {
            tracing::debug!("QEMU says {}", event.name);
            let hint = hint_of(&event.name);
            if hint == Some(Hint::Device) || strongest.is_none() {
                strongest = hint;
            }
            if started.elapsed() > HEARING_TIME {
                break;
            }
            match self.line.said_already().await {
                Some(Happening::Event(next)) => event = next,
                Some(Happening::FellBack(error)) => return Some(Self::fell_back(&error)),
                None => break,
            }
        }
        if strongest.is_some() {
            self.hearing.heard();
        }
        strongest.map(Event::Hint)
    }

    fn fell_back(error: &QmpError) -> Event {
        tracing::debug!("the live channel is gone: {error}");
        Event::ChannelChanged(Liveness::Leases)
    }

    /// Turns what the line to QEMU says into an event.
    async fn hear(&mut self, said: Said) -> Option<Event> {
        match said {
            Said::Happening(Happening::Event(event)) => self.hear_events(event).await,
            Said::Happening(Happening::FellBack(error)) => Some(Self::fell_back(&error)),
            Said::Done(LineDone::Upgraded(result)) => {
                self.line.ask_if_waiting(self.root, self.process.pid);
                self.upgraded(result)
            }
            Said::Done(LineDone::Asked { before, roles }) => self.answered(before, roles),
        }
    }

    fn upgraded(&mut self, result: Result<Upgrade, QmpError>) -> Option<Event> {
        match result {
            Ok(Upgrade::Live) => {
                tracing::info!("QEMU is asked over {}", self.line.name());
                return Some(Event::ChannelChanged(Liveness::Live));
            }
            Ok(Upgrade::NotNeeded) => {}
            Ok(Upgrade::Unsupported) => {
                self.upgrade_wanted = false;
                tracing::info!("QEMU is asked by leases: it has no monitor for qmpin alone");
            }
            Ok(Upgrade::OwnPathTaken) => {
                self.upgrade_wanted = false;
                tracing::warn!(
                    "QEMU is asked by leases: something else is where qmpin's own socket would be"
                );
            }
            // Most likely it has just ended; if not, the next question says so.
            Err(error) if error.is_nobody_there() => tracing::debug!("{}", chain(&error)),
            Err(error) => tracing::warn!("QEMU is asked by leases: {}", chain(&error)),
        }
        None
    }

    /// Takes an answer of QEMU's: the worker compares it with the process.
    fn answered(
        &mut self,
        before: Result<Vec<Tid>, TasksError>,
        roles: Result<Roles, QmpError>,
    ) -> Option<Event> {
        let answer = before
            .map_err(|error| chain(&error))
            .and_then(|before| Ok((before, roles.map_err(|error| chain(&error))?)));
        match answer {
            Ok((before, roles)) => {
                self.answer = Some(Job::Learn { before, roles: Box::new(roles) });
                None
            }
            Err(reason) => Some(self.not_answered(&reason)),
        }
    }

    fn not_answered(&mut self, reason: &str) -> Event {
        // The first may be QEMU on its way out, or a thread that ended just then.
        if self.pace.failed() == 2 {
            tracing::warn!("QEMU's answer is of no use, asking again: {reason}");
        } else {
            tracing::debug!("QEMU's answer is of no use, asking again: {reason}");
        }
        Event::NotAnswered
    }

    fn learnt(&mut self, learnt: Result<Learnt, TasksError>) -> Event {
        match learnt {
            Ok(learnt) => {
                if learnt.joined.is_empty() && learnt.left.is_empty() {
                    self.pace.in_vain();
                } else {
                    self.pace.taught();
                }
                if learnt.left.iter().any(|(_, role)| matches!(role, Role::Vcpu(_))) {
                    self.pace.lost_a_vcpu(Instant::now());
                }
                log_learnt(&learnt);
                Event::Answered
            }
            Err(error) => self.not_answered(&chain(&error)),
        }
    }

    /// Carries out one effect.
    fn carry_out(&mut self, effect: Effect) {
        let now = Instant::now();
        match effect {
            Effect::LookSoon => {
                self.look_at = Some((now + LOOK_DELAY).max(self.last_look + LOOK_GAP));
            }
            Effect::AskSoon => {
                let earliest = self.last_ask.map_or(now, |last| last + self.pace.gap(now));
                self.ask_at = Some(earliest.max(now));
            }
            Effect::Look => {
                self.last_look = now;
                self.due.insert(Task::Look);
            }
            Effect::Ask => {
                self.last_ask = Some(now);
                self.line.ask(self.root, self.process.pid);
            }
            Effect::Upgrade => {
                if self.upgrade_wanted {
                    self.line.upgrade();
                }
            }
            Effect::Finish(ending) => {
                match ending {
                    // Not yet the end of this process: it may go on with a VM that is started anew.
                    Ending::QemuEnded => {
                        notify::status("QEMU has ended: restoring");
                        tracing::info!("QEMU has ended");
                    }
                    Ending::Told => {
                        notify::stopping();
                        tracing::info!("stopping: restoring everything");
                    }
                }
                self.ending = Some(ending);
            }
        }
    }

    /// When the choice between a partition and a fallback is to be made again; `None` also while it is being made.
    fn choice_due(&self) -> Option<Instant> {
        let is_waiting = self.is_ready && self.worker.is_idle() && self.ending.is_none();
        let due = self.now.as_ref().filter(|_| is_waiting)?.choice_due;
        due.filter(|_| !self.due.contains(&Task::Choose))
    }

    /// Takes what has become of a job.
    fn done(&mut self, done: Done) -> Result<Went, StartError> {
        let mut events = Vec::new();
        match done {
            Done::Begun(report) => {
                let report = report?;
                if let Some(now) = &self.now {
                    self.telling.policy(&now.plan);
                }
                self.telling.look(&report);
                self.due.extend(Task::FIRST);
                // A pass afterwards: kernel threads, and threads that were created while the first was under way.
                self.due.insert(Task::Look);
                if self.upgrade_wanted {
                    self.line.upgrade();
                }
                events.push(Event::Looked(report.looked));
            }
            Done::Isolated(report) => {
                if let Ok(Some(report)) = &report {
                    self.telling.look(report);
                    // Limits of units come with a fallback, and go with it.
                    self.due.insert(Task::KeepHost);
                }
                self.isolate_later = report.is_err();
                self.telling.isolated(report.err());
            }
            Done::HostKept(report) => self.telling.host(report),
            Done::Prioritised(Ok(report)) => self.telling.look(&report),
            Done::Prioritised(Err(error)) => {
                if !error.means_gone() {
                    tracing::warn!("the vCPUs have no priority yet: {}", chain(&error));
                }
            }
            Done::Looked(Ok(report)) => {
                self.telling.look_failed(report.plan_failed.as_ref().map(|error| chain(error)));
                self.telling.look(&report);
                events.push(Event::Looked(report.looked));
            }
            Done::Looked(Err(error)) => {
                if !error.means_gone() {
                    self.telling.look_failed(Some(chain(&error)));
                }
            }
            Done::Learnt(learnt) => events.push(self.learnt(learnt)),
            Done::Reloaded(taken) => self.reloaded(taken),
            Done::Finished(restored) => {
                let why = self.ending.unwrap_or(Ending::Told);
                return Ok(Went::Ended(Box::new(Ended { why, restored: Some(restored?) })));
            }
        }
        Ok(Went::On(events))
    }

    /// Takes what has become of a reload.
    fn reloaded(&mut self, taken: Result<Taken, String>) {
        let vm = self.settings.vm.clone();
        let (refused, later) = match taken {
            Ok(Taken { policy, later }) => {
                tracing::info!("VM {vm}: its policy was read again and is in force");
                for key in &later {
                    tracing::info!(
                        "VM {vm}: takes effect when the VM is attached the next time: {key}"
                    );
                }
                self.settings.policy = *policy;
                self.new_interval = Some(interval(&self.settings, true));
                self.due.extend(Task::FIRST);
                self.due.insert(Task::Look);
                (None, later)
            }
            Err(why) => {
                tracing::warn!("VM {vm}: the policy before stays in force: {why}");
                (Some(why), Vec::new())
            }
        };
        if let Some(now) = &self.now {
            self.telling.policy(&now.plan);
        }
        let Ok(boot_id) = boot_id(self.root) else { return };
        note_reload(&self.settings.state, &vm, &boot_id, self.process, refused, later);
    }

    /// Logs the plan where a job has changed what it says.
    fn log_new_shortfalls(&self, before: Option<&Now>) {
        let Some(Now { plan, placed, .. }) = &self.now else { return };
        let before = before.map_or(&[][..], |before| &before.plan.report);
        if plan.report != before {
            log_plan(plan, placed, before);
        }
    }

    /// Tells systemd and `qmpin status` how it stands, where that has changed.
    fn tell(&mut self) {
        let Some(drift_total) = self.now.as_ref().map(|now| now.drift_total) else { return };
        // Before that, what there is to tell changes with every step.
        if !self.is_ready {
            return;
        }
        let status = self.status();
        let Settings { state, vm, .. } = &self.settings;
        self.telling.tell(status, state, vm, self.line.kind(), drift_total);
    }

    fn status(&self) -> String {
        let Some(Now { plan, placed, drift_total, .. }) = &self.now else {
            return format!("VM {}: attaching", self.settings.vm);
        };
        format!(
            "{} vCPUs on {}, emulator on {}, asked over {}, drift {drift_total}",
            plan.vcpus.len(),
            placed.vcpus_in_words(plan),
            placed.emulator_in_words(plan),
            self.line.name(),
        )
    }
}

/// What the loop has waited for.
enum Next {
    Event(Event),
    Done(Box<worker::Ended>),
    /// Nothing that concerns the state.
    Nothing,
}

/// What follows from a job.
enum Went {
    On(Vec<Event>),
    Ended(Box<Ended>),
}

/// What an event of QEMU's may mean.
fn hint_of(event: &str) -> Option<Hint> {
    match event {
        "RESET" | "STOP" | "RESUME" | "SUSPEND" | "WAKEUP" => Some(Hint::GuestState),
        "ACPI_DEVICE_OST" | "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" => Some(Hint::Device),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_qemus_is_a_hint_where_threads_may_have_moved_or_come_or_gone() {
        for (event, hint) in [
            ("RESET", Some(Hint::GuestState)),
            ("STOP", Some(Hint::GuestState)),
            ("RESUME", Some(Hint::GuestState)),
            ("SUSPEND", Some(Hint::GuestState)),
            ("WAKEUP", Some(Hint::GuestState)),
            ("ACPI_DEVICE_OST", Some(Hint::Device)),
            ("DEVICE_DELETED", Some(Hint::Device)),
            ("DEVICE_UNPLUG_GUEST_ERROR", Some(Hint::Device)),
            // The guest is off; that QEMU itself has ended is learnt from its pidfd.
            ("SHUTDOWN", None),
            ("POWERDOWN", None),
            ("RTC_CHANGE", None),
            // Whatever a later QEMU says, and what only looks like one of them.
            ("SOMETHING_OF_QEMU_99", None),
            ("reset", None),
            ("RESET ", None),
            ("", None),
        ] {
            assert_eq!(hint_of(event), hint, "{event}");
        }
    }
}
