//! The loop around `state`: makes events, carries out effects. It decides nothing, and it never waits for
//! anything but its sources: what may take long is the worker's.

mod heard;
mod outcome;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::budget::{Hearing, thread_time};
use super::line::Line;
use super::notify;
use super::pace::{ForNeighbours, Pace};
use super::signals::Signals;
use super::sources::{Source, Watch, at, interval, next_of};
use super::starting::find;
use super::state::{Effect, Ending, Event, State};
use super::telling::Telling;
use super::worker::{Done, Job, Now, Task, Worker};
use crate::attachment::error::StartError;
use crate::attachment::leasing::{give_back, lock_forsaken};
use crate::attachment::settings::Settings;
use crate::discover::boot_id;
use crate::knobs::affinity::restore::RestoreReport;
use crate::knobs::ground::Host;
use crate::leases::Heart;
use crate::policy::ChannelChoice;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;
use crate::watch::{LeaseChanges, NewThreads, SlowTimer};

/// Between two signs of life while the worker is busy.
const BEAT: Duration = Duration::from_secs(1);
/// A pass waits this long for further hints: a hotplugged thread is not alone.
const LOOK_DELAY: Duration = Duration::from_millis(1);
/// Two passes are at least this far apart, however many hints there are.
const LOOK_GAP: Duration = Duration::from_millis(20);
/// What a VM is given when it is attached. A pass comes last, for kernel threads, and for threads that were created
/// while the first pass was under way.
const FIRST: [Task; 4] = [Task::Isolate, Task::KeepHost, Task::Prioritise, Task::Pass];

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Why it ended.
    pub why: Ending,
    /// What was restored; none where nothing was ours.
    pub restored: Option<RestoreReport>,
}

/// See [`Supervisor::follow`](super::supervisor::Supervisor::follow).
pub(super) async fn run(
    host: Host<'_>,
    settings: Settings,
    worker: Worker,
    signals: &mut Signals,
) -> Result<Ended, StartError> {
    let (found, channel) = tokio::select! {
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
            return Ok(Ended { why: Ending::Asked, restored });
        }
    };
    let process = found.process;
    let mut watch = Watch::of(host, &settings, process)?;
    let (heart, line) = (found.heart(), Line::new(channel));
    let runner = Runner::new(host.root, settings, process, line, heart, worker);
    runner.run(Job::Begin(Box::new(found)), &mut watch, signals).await
}

struct Runner<'a> {
    root: &'a SysRoot,
    process: ProcessKey,
    settings: Settings,
    state: State,
    line: Line,
    upgrade_wanted: bool,
    look_at: Option<Instant>,
    ask_at: Option<Instant>,
    last_look: Instant,
    last_ask: Option<Instant>,
    pace: Pace,
    heart: Heart,
    /// When the next sign of life is due while the worker is busy.
    next_beat: Option<Instant>,
    worker: Worker,
    /// An answer of QEMU's that the worker has yet to take.
    answer: Option<Job>,
    /// What the worker has yet to do.
    due: BTreeSet<Task>,
    hearing: Hearing,
    /// What others are excluded with could not be written down: it is tried again with the slow timer.
    isolate_later: bool,
    /// Whether everything was in place once.
    is_ready: bool,
    /// How the VM stands; `None` before it is attached.
    now: Option<Box<Now>>,
    for_neighbours: ForNeighbours,
    telling: Telling,
}

impl<'a> Runner<'a> {
    fn new(
        root: &'a SysRoot,
        settings: Settings,
        process: ProcessKey,
        line: Line,
        heart: Heart,
        worker: Worker,
    ) -> Runner<'a> {
        Runner {
            root,
            process,
            upgrade_wanted: settings.policy.vm.channel.value == ChannelChoice::Auto,
            settings,
            state: State::default(),
            pace: Pace::default(),
            last_look: Instant::now(),
            last_ask: None,
            look_at: None,
            ask_at: None,
            line,
            heart,
            next_beat: None,
            worker,
            answer: None,
            due: BTreeSet::new(),
            hearing: Hearing::new(Instant::now(), thread_time()),
            isolate_later: false,
            is_ready: false,
            now: None,
            for_neighbours: ForNeighbours::default(),
            telling: Telling::default(),
        }
    }

    /// Runs until the VM is restored. `first` attaches it.
    async fn run(
        mut self,
        first: Job,
        watch: &mut Watch,
        signals: &mut Signals,
    ) -> Result<Ended, StartError> {
        self.give(first);
        loop {
            self.give_next();
            self.tell();
            if let Some(ended) = self.wait(watch, signals).await? {
                return Ok(ended);
            }
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
        let job = match self.state.ending {
            Some(_) => Some(Job::Finish),
            None => self.answer.take().or_else(|| self.due.pop_first().map(Job::Do)),
        };
        if let Some(job) = job {
            self.give(job);
        } else if !self.is_ready {
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
        self.heart.beat();
        notify::busy();
    }

    /// Waits for something to happen, and acts on it. Returns how it ended, once it has.
    async fn wait(
        &mut self,
        watch: &mut Watch,
        signals: &mut Signals,
    ) -> Result<Option<Ended>, StartError> {
        let Watch { exit, new_threads, leases, slow_timer } = watch;
        tokio::select! {
            biased;
            ended = exit.next(|exit| exit.wait()), if self.state.ending.is_none() => {
                if let Err(error) = ended {
                    tracing::warn!("the end of QEMU can no longer be watched: {error}");
                }
                self.take(Event::QemuEnded);
            }
            _ = signals.stop.next(), if self.state.ending.is_none() => self.take(Event::Stop),
            _ = signals.reload.next(), if self.state.ending.is_none() => {
                self.due.insert(Task::Reload);
            }
            ended = self.wait_for_hint(new_threads, leases, slow_timer) => return ended,
        }
        Ok(None)
    }

    /// The same, for sources that may be busy all the time. They are polled without bias, so that a flood of QMP
    /// events or of new threads cannot starve the others.
    async fn wait_for_hint(
        &mut self,
        new_threads: &mut Option<Source<NewThreads>>,
        leases: &mut Option<Source<LeaseChanges>>,
        slow_timer: &mut Source<SlowTimer>,
    ) -> Result<Option<Ended>, StartError> {
        let choice_due = self.choice_due();
        // A question under way goes on; it has limits of its own.
        let is_asked = !self.line.is_free();
        let rest = self.hearing.rest(Instant::now(), thread_time(), is_asked);
        let hears_line = self.state.ending.is_none() && (rest.is_none() || is_asked);
        // A pass that is about to come sees all threads. Until then what comes is one message to the kernel.
        let hears_new_threads = rest.is_none() && self.look_at.is_none();
        tokio::select! {
            ended = self.worker.done() => {
                let has_new_policy = matches!(ended.done, Done::Reloaded(Ok(_)));
                let ended = self.done(ended)?;
                if has_new_policy {
                    let every = interval(&self.settings, new_threads.is_some());
                    if let Err(error) = slow_timer.set_interval(every) {
                        tracing::warn!("the slow timer stays as it was: {error}");
                    }
                }
                return Ok(ended);
            }
            () = at(rest) => {}
            () = at(self.next_beat) => self.beat(),
            said = self.line.said(), if hears_line => self.hear(said).await,
            new_thread = next_of(new_threads, |source| source.next(NewThreads::next)), if hears_new_threads => {
                self.hearing.heard();
                if let Err(error) = new_thread {
                    tracing::warn!("new threads can no longer be watched: {error}");
                    *new_threads = None;
                    if let Err(error) = slow_timer.set_interval(interval(&self.settings, false)) {
                        tracing::warn!("the slow timer stays as slow as it is: {error}");
                    }
                }
                self.take(Event::Changed);
            }
            changed = next_of(leases, |source| source.next(LeaseChanges::next)) => {
                if let Err(error) = changed {
                    tracing::warn!("other VMs' comings and goings are no longer seen: {error}");
                    *leases = None;
                }
                if self.for_neighbours.changed(Instant::now()) {
                    self.due.insert(Task::CheckHost);
                }
                self.take(Event::Changed);
            }
            () = at(self.for_neighbours.due()) => {
                self.for_neighbours.looked(Instant::now());
                self.due.insert(Task::CheckHost);
                self.take(Event::Changed);
            }
            () = at(choice_due) => {
                self.due.insert(Task::Choose);
            }
            () = at(self.look_at) => {
                self.look_at = None;
                if let Some(new_threads) = new_threads {
                    new_threads.drain();
                }
                self.take(Event::PassDue);
            }
            () = at(self.ask_at) => {
                self.ask_at = None;
                self.take(Event::AskDue);
            }
            ticked = slow_timer.next(|timer| timer.tick()) => {
                if let Err(error) = ticked {
                    tracing::warn!("the slow timer cannot be read: {error}");
                }
                if !self.worker.is_stuck() {
                    notify::alive(&self.status());
                }
                self.due.insert(Task::CheckHost);
                if std::mem::take(&mut self.isolate_later) {
                    self.due.insert(Task::Isolate);
                }
                self.take(Event::Ticked);
            }
        }
        Ok(None)
    }

    /// Takes an event: `state` decides what follows from it.
    fn take(&mut self, event: Event) {
        for effect in self.state.handle(event) {
            self.carry_out(effect);
        }
    }

    /// Carries out one effect.
    fn carry_out(&mut self, effect: Effect) {
        let now = Instant::now();
        match effect {
            Effect::PassSoon => {
                self.look_at = Some((now + LOOK_DELAY).max(self.last_look + LOOK_GAP));
            }
            Effect::AskSoon => {
                let earliest = self.last_ask.map_or(now, |last| last + self.pace.gap(now));
                self.ask_at = Some(earliest.max(now));
            }
            Effect::Pass => {
                self.last_look = now;
                self.due.insert(Task::Pass);
            }
            Effect::Ask => {
                self.last_ask = Some(now);
                self.line.ask(self.root, self.process.pid);
            }
            Effect::Upgrade if self.upgrade_wanted => self.line.upgrade(),
            Effect::Upgrade => {}
            Effect::Finish(ending) => {
                match ending {
                    // Not yet the end of this process: it may go on with a VM that is started anew.
                    Ending::QemuEnded => {
                        notify::status("QEMU has ended: restoring");
                        tracing::info!("QEMU has ended");
                    }
                    Ending::Asked => {
                        notify::stopping();
                        tracing::info!("stopping: restoring everything");
                    }
                }
            }
        }
    }

    /// When the choice between a partition and a fallback is to be made again; `None` also while it is being made.
    fn choice_due(&self) -> Option<Instant> {
        let is_waiting = self.is_ready && self.worker.is_idle() && self.state.ending.is_none();
        let due = self.now.as_ref().filter(|_| is_waiting)?.choice_due;
        due.filter(|_| !self.due.contains(&Task::Choose))
    }
}
