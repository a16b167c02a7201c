//! The loop around `state`: makes events, carries out effects. It decides nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::attachment::Attachment;
use super::host_report::{HostLines, HostReport, log_host};
use super::leasing::{give_back, lock_forsaken};
use super::line::{Done, Line, Said};
use super::narrate::{log_learnt, log_look, log_plan, log_priority, log_shortfalls};
use super::notify;
use super::pace::{ForNeighbours, Pace};
use super::reports::LookReport;
use super::settings::{Host, Settings};
use super::sources::{BLIND_INTERVAL, Watch, at, next_of, stop_signals};
use super::start_error::StartError;
use super::starting::start;
use super::state::{Effect, Ending, Event, Hint, Liveness, State};
use super::telling::Telling;
use crate::discover::boot_id;
use crate::discover::tasks::TasksError;
use crate::error::chain;
use crate::ids::Tid;
use crate::plan::Plan;
use crate::policy::ChannelChoice;
use crate::qmp::{Happening, QmpError, Roles, Upgrade};
use crate::restore::RestoreReport;
use crate::threads::Role;
use crate::watch::{Births, LeaseChanges, SlowTimer};

/// A look waits this long for further hints: a hotplugged thread is not alone.
const LOOK_DELAY: Duration = Duration::from_millis(1);
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
    report.applied.extend(isolated?.applied);
    let second = second?;
    report.applied.extend(second.applied);
    report.partition = second.partition;
    let raised = raised?;
    report.applied.extend(raised.applied);
    (report.priority, report.cookie) = (raised.priority, raised.cookie);
    log_priority(&report.priority, &mut BTreeSet::new());
    remembered?;
    let kept = kept?;
    log_host(&kept, &mut HostLines::default());
    Ok((plan, report, kept))
}

/// Attaches, follows the VM until it ends or a signal comes, and puts everything back.
///
/// # Errors
/// [`StartError`].
pub async fn follow(host: Host<'_>, settings: Settings) -> Result<Ended, StartError> {
    let channel_choice = settings.policy.vm.channel.value;
    let (state, vm) = (settings.state.clone(), settings.vm.clone());
    // Before anything is written: from then on no signal may end us without restoring.
    let mut stop = stop_signals(host)?;
    let started = tokio::select! {
        biased;
        started = start(host, &settings) => started?,
        // It waits for QEMU alone: nothing is written yet, but perhaps by an earlier qmpin that was killed.
        // What somebody else has attached, and follows or has left so, is not ours to give back.
        _ = stop.next() => {
            tracing::info!("told to stop before VM {vm} was attached");
            let boot_id = boot_id(host.root).map_err(StartError::BootId)?;
            let restored = match lock_forsaken(host.root, &state, &vm, &boot_id) {
                Some(_lock) => Some(give_back(host, &state, &vm, &boot_id)?),
                None => None,
            };
            return Ok(Ended { why: Ending::Told, restored });
        }
    };
    let (attachment, channel, first) = started;
    let watch = Watch::of(host, &attachment, stop);
    let runner = Runner {
        upgrade_wanted: channel_choice == ChannelChoice::Auto,
        pace: Pace::default(),
        last_look: Instant::now(),
        last_ask: None,
        look_at: None,
        ask_at: None,
        line: Line::new(channel),
        host_due: false,
        isolate_due: false,
        for_neighbours: ForNeighbours::default(),
        telling: Telling::default(),
        attachment,
    };
    match watch {
        Ok(watch) => Box::pin(runner.run(watch, &first)).await,
        Err(error) => {
            // It cannot be followed, so it is not left pinned.
            let _ = runner.attachment.finish();
            Err(error)
        }
    }
}

struct Runner<'a> {
    attachment: Attachment<'a>,
    line: Line,
    upgrade_wanted: bool,
    look_at: Option<Instant>,
    ask_at: Option<Instant>,
    last_look: Instant,
    last_ask: Option<Instant>,
    pace: Pace,
    /// Interrupts and kernel threads may have come since the last time.
    host_due: bool,
    /// What others are kept off with could not be written down.
    isolate_due: bool,
    for_neighbours: ForNeighbours,
    telling: Telling,
}

impl Runner<'_> {
    async fn run(mut self, mut watch: Watch, first: &LookReport) -> Result<Ended, StartError> {
        log_plan(self.attachment.plan(), &[]);
        self.telling.policy(self.attachment.plan());
        self.telling.look(first);
        self.isolate();
        self.keep_host();
        self.prioritise();
        self.telling.ready(self.status());
        let mut state = State::default();
        // A look at once: kernel threads, and whatever was born while the first was under way.
        let mut effects = vec![Effect::Look];
        if self.upgrade_wanted {
            effects.push(Effect::Upgrade);
        }
        effects.extend(state.handle(Event::Looked(first.looked)));
        loop {
            for effect in std::mem::take(&mut effects) {
                if let Effect::Finish(ending) = effect {
                    return self.finish(ending);
                }
                if let Some(event) = self.carry_out(effect) {
                    effects.extend(state.handle(event));
                }
            }
            if !effects.is_empty() {
                continue;
            }
            self.tell();
            let event = self.next_event(&mut watch).await;
            effects.extend(event.map(|event| state.handle(event)).unwrap_or_default());
        }
    }

    /// Waits for something to happen. `None`: nothing that concerns the state.
    async fn next_event(&mut self, watch: &mut Watch) -> Option<Event> {
        let Watch { exit, stop, births, leases, slow_timer } = watch;
        tokio::select! {
            biased;
            ended = exit.wait() => {
                if let Err(error) = ended {
                    tracing::warn!("the end of QEMU can no longer be watched: {error}");
                }
                Some(Event::QemuEnded)
            }
            _ = stop.next() => Some(Event::Stop),
            event = self.next_hint(births, leases, slow_timer) => event,
        }
    }

    /// The same, of what may happen all the time. Nobody is asked first: a QEMU that never stops talking, or
    /// bearing threads, is not to keep the others from their turn.
    async fn next_hint(
        &mut self,
        births: &mut Option<Births>,
        leases: &mut Option<LeaseChanges>,
        slow_timer: &mut SlowTimer,
    ) -> Option<Event> {
        let said = tokio::select! {
            said = self.line.said() => said,
            birth = next_of(births, Births::next) => {
                if let Err(error) = birth {
                    tracing::warn!("births can no longer be watched: {error}");
                    *births = None;
                    if let Err(error) = slow_timer.at_least_every(BLIND_INTERVAL) {
                        tracing::warn!("the slow timer stays as slow as it is: {error}");
                    }
                }
                return Some(Event::Hint(Hint::Birth));
            }
            changed = next_of(leases, LeaseChanges::next) => {
                if let Err(error) = changed {
                    tracing::warn!("other VMs' comings and goings are no longer seen: {error}");
                    *leases = None;
                }
                self.attachment.neighbours_changed();
                self.host_due |= self.for_neighbours.changed(Instant::now());
                return Some(Event::Hint(Hint::Neighbour));
            }
            () = at(self.for_neighbours.due()) => {
                self.for_neighbours.looked(Instant::now());
                self.host_due = true;
                return Some(Event::Hint(Hint::Neighbour));
            }
            () = at(self.look_at) => {
                self.look_at = None;
                return Some(Event::LookDue);
            }
            () = at(self.ask_at) => {
                self.ask_at = None;
                return Some(Event::AskDue);
            }
            ticked = slow_timer.tick() => {
                if let Err(error) = ticked {
                    tracing::warn!("the slow timer cannot be read: {error}");
                }
                notify::alive(&self.status());
                self.host_due = true;
                return Some(Event::Hint(Hint::Timer));
            }
        };
        self.hear(said)
    }

    /// Turns what the line to QEMU says into an event.
    fn hear(&mut self, said: Said) -> Option<Event> {
        match said {
            Said::Happening(Happening::Event(event)) => {
                tracing::debug!("QEMU says {}", event.name);
                hint_of(&event.name).map(Event::Hint)
            }
            Said::Happening(Happening::FellBack(error)) => {
                tracing::debug!("the live channel is gone: {error}");
                Some(Event::ChannelChanged(Liveness::Leases))
            }
            Said::Done(Done::Upgraded(result)) => {
                self.line.ask_if_waiting(self.attachment.root(), self.attachment.process().pid);
                self.upgraded(result)
            }
            Said::Done(Done::Asked { before, roles }) => Some(self.answered(before, roles)),
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

    fn answered(
        &mut self,
        before: Result<Vec<Tid>, TasksError>,
        roles: Result<Roles, QmpError>,
    ) -> Event {
        let learnt = before.map_err(|error| chain(&error)).and_then(|before| {
            let roles = roles.map_err(|error| chain(&error))?;
            self.attachment.learn(&before, &roles).map_err(|error| chain(&error))
        });
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
            Err(reason) => {
                // The first may be QEMU on its way out, or a thread that ended just then.
                if self.pace.failed() == 2 {
                    tracing::warn!("QEMU's answer is of no use, asking again: {reason}");
                } else {
                    tracing::debug!("QEMU's answer is of no use, asking again: {reason}");
                }
                Event::NotAnswered
            }
        }
    }

    /// Carries out one effect; what comes of it at once is an event.
    fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        let now = Instant::now();
        match effect {
            Effect::LookSoon => {
                self.look_at = Some((now + LOOK_DELAY).max(self.last_look + LOOK_GAP));
                None
            }
            Effect::AskSoon => {
                let earliest = self.last_ask.map_or(now, |last| last + self.pace.gap(now));
                self.ask_at = Some(earliest.max(now));
                None
            }
            Effect::Look => {
                self.last_look = now;
                self.look().map(Event::Looked)
            }
            Effect::Ask => {
                self.last_ask = Some(now);
                self.line.ask(self.attachment.root(), self.attachment.process().pid);
                None
            }
            Effect::Upgrade => {
                if self.upgrade_wanted {
                    self.line.upgrade();
                }
                None
            }
            Effect::Finish(_) => None,
        }
    }

    fn look(&mut self) -> Option<super::state::Looked> {
        if self.host_due && self.isolate_due {
            self.isolate();
        }
        if self.host_due {
            self.keep_host();
        }
        let report_before = self.attachment.plan().report.clone();
        match self.attachment.look() {
            Ok(report) => {
                if self.attachment.plan().report != report_before {
                    log_plan(self.attachment.plan(), &report_before);
                }
                self.telling.look_failed(report.plan_failed.as_ref().map(|error| chain(error)));
                self.telling.look(&report);
                Some(report.looked)
            }
            Err(error) if error.means_gone() => None,
            Err(error) => {
                self.telling.look_failed(Some(chain(&error)));
                None
            }
        }
    }

    /// Keeps the rest of the host in line. That it cannot be done is said, and tried again.
    fn keep_host(&mut self) {
        self.host_due = false;
        self.telling.host(self.attachment.keep_host());
    }

    /// Keeps others off the VM's CPUs. That its undo cannot be written down is said, and tried again.
    fn isolate(&mut self) {
        // The kernel does not put back what it changes as a partition is built.
        let remembered = self.attachment.remember_host().map_err(|error| chain(&error));
        let isolated = remembered.and_then(|()| match self.attachment.isolate() {
            Ok(report) => {
                self.telling.look(&report);
                Ok(())
            }
            Err(error) if error.means_gone() => Ok(()),
            Err(error) => Err(chain(&error)),
        });
        self.isolate_due = isolated.is_err();
        self.telling.isolated(isolated.err());
    }

    fn prioritise(&mut self) {
        match self.attachment.prioritise() {
            Ok(report) => self.telling.look(&report),
            Err(error) if error.means_gone() => {}
            Err(error) => tracing::warn!("the vCPUs have no priority yet: {}", chain(&error)),
        }
    }

    fn finish(self, ending: Ending) -> Result<Ended, StartError> {
        match ending {
            // Not yet the end of this process: it may go on with a VM that is started anew.
            Ending::QemuEnded => {
                notify::status("QEMU has ended: restoring");
                tracing::info!("QEMU has ended");
            }
            Ending::Told => {
                notify::stopping();
                tracing::info!("told to stop: putting everything back");
            }
        }
        // A job under way is dropped with its connection; the masks do not need QEMU.
        let restored = self.attachment.finish()?;
        Ok(Ended { why: ending, restored: Some(restored) })
    }

    /// Tells systemd and `qmpin status` how it stands, where that has changed.
    fn tell(&mut self) {
        let status = self.status();
        let Settings { state, vm, .. } = self.attachment.settings();
        let drift_total = self.attachment.drift_total();
        self.telling.tell(status, state, vm, self.line.kind(), drift_total);
    }

    fn status(&self) -> String {
        let plan = self.attachment.plan();
        format!(
            "{} vCPUs on {}, emulator on {}, asked over {}, drift {}",
            plan.vcpus.len(),
            plan.exclusive,
            plan.emulator,
            self.line.name(),
            self.attachment.drift_total()
        )
    }
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
