//! Turns what QEMU reports into events: its own events, its answers, and changes of the line to it.

use std::time::Duration;

use tokio::time::Instant;

use super::Runner;
use crate::attachment::reports::Learnt;
use crate::discover::tasks::TasksError;
use crate::error::chain;
use crate::qmp::{Happening, QmpError, QmpEvent, Upgrade};
use crate::supervise::line::Said;
use crate::supervise::narrate::log_learnt;
use crate::supervise::state::Event;
use crate::supervise::worker::Job;
use crate::threads::Role;

/// QEMU's events that are heard in one go, and for how long at most. One pass follows from all of them.
const EVENTS_AT_A_TIME: usize = 512;
const HEARING_TIME: Duration = Duration::from_millis(4);

impl Runner<'_> {
    /// Takes an event, and all that have come with it. The strongest of their hints counts.
    async fn hear_events(&mut self, mut event: QmpEvent) {
        let started = Instant::now();
        let mut strongest = None;
        for _ in 0..EVENTS_AT_A_TIME {
            tracing::debug!("QEMU reports {}", event.name);
            let hint = hint_of(&event.name);
            if hint == Some(Event::DeviceChanged) || strongest.is_none() {
                strongest = hint;
            }
            if started.elapsed() > HEARING_TIME {
                break;
            }
            match self.line.said_already().await {
                Some(Happening::Event(next)) => event = next,
                Some(Happening::FellBack(error)) => return self.fell_back(&error),
                None => break,
            }
        }
        if let Some(hint) = strongest {
            self.hearing.heard();
            self.take(hint);
        }
    }

    fn fell_back(&mut self, error: &QmpError) {
        tracing::debug!("lost the live channel: {error}");
        self.take(Event::ChannelLost);
    }

    /// Takes what the line to QEMU reports.
    pub(super) async fn hear(&mut self, said: Said) {
        match said {
            Said::Happening(Happening::Event(event)) => self.hear_events(event).await,
            Said::Happening(Happening::FellBack(error)) => self.fell_back(&error),
            Said::Upgraded(result) => {
                self.line.ask_if_waiting(self.root, self.process.pid);
                self.upgraded(result);
            }
            // The worker compares it with the process.
            Said::Asked(Ok((before, roles))) => {
                self.answer = Some(Job::Learn { before, roles: Box::new(roles) });
            }
            Said::Asked(Err(reason)) => self.not_answered(&reason),
        }
    }

    fn upgraded(&mut self, result: Result<Upgrade, QmpError>) {
        match result {
            Ok(Upgrade::Live) => {
                tracing::info!("QEMU is asked over {}", self.line.name());
                self.take(Event::ChannelLive);
            }
            Ok(Upgrade::NotNeeded) => {}
            Ok(Upgrade::Unsupported) => {
                self.upgrade_wanted = false;
                tracing::info!("QEMU is queried by leases: it has no monitor reserved for qmpin");
            }
            Ok(Upgrade::OwnPathTaken) => {
                self.upgrade_wanted = false;
                tracing::warn!(
                    "QEMU is asked by leases: something else is where qmpin's own socket would be"
                );
            }
            // Most likely it has just ended; if not, the next question shows it.
            Err(error) if error.is_nobody_there() => tracing::debug!("{}", chain(&error)),
            Err(error) => tracing::warn!("QEMU is asked by leases: {}", chain(&error)),
        }
    }

    fn not_answered(&mut self, reason: &str) {
        // The first may be QEMU on its way out, or a thread that ended just then.
        if self.pace.failed() == 2 {
            tracing::warn!("QEMU's answer is of no use, asking again: {reason}");
        } else {
            tracing::debug!("QEMU's answer is of no use, asking again: {reason}");
        }
        self.take(Event::NotAnswered);
    }

    pub(super) fn learnt(&mut self, learnt: Result<Learnt, TasksError>) {
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
                self.take(Event::Answered);
            }
            Err(error) => self.not_answered(&chain(&error)),
        }
    }
}

/// What an event of QEMU's may mean.
fn hint_of(event: &str) -> Option<Event> {
    match event {
        "RESET" | "STOP" | "RESUME" | "SUSPEND" | "WAKEUP" => Some(Event::Changed),
        "ACPI_DEVICE_OST" | "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR" => {
            Some(Event::DeviceChanged)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_qemus_is_a_hint_where_threads_may_have_moved_or_come_or_gone() {
        for (event, hint) in [
            ("RESET", Some(Event::Changed)),
            ("STOP", Some(Event::Changed)),
            ("RESUME", Some(Event::Changed)),
            ("SUSPEND", Some(Event::Changed)),
            ("WAKEUP", Some(Event::Changed)),
            ("ACPI_DEVICE_OST", Some(Event::DeviceChanged)),
            ("DEVICE_DELETED", Some(Event::DeviceChanged)),
            ("DEVICE_UNPLUG_GUEST_ERROR", Some(Event::DeviceChanged)),
            // The guest is off; that QEMU itself has ended is learnt from its pidfd.
            ("SHUTDOWN", None),
            ("POWERDOWN", None),
            ("RTC_CHANGE", None),
            // Events of later versions of QEMU, and names that only look like one of them.
            ("SOMETHING_OF_QEMU_99", None),
            ("reset", None),
            ("RESET ", None),
            ("", None),
        ] {
            assert_eq!(hint_of(event), hint, "{event}");
        }
    }
}
