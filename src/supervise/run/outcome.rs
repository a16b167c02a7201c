//! Turns the end of a job into events, and notifies systemd and `qmpin status`.

use super::{Ended, FIRST, Runner};
use tokio::time::Instant;

use crate::attachment::around::Checked;
use crate::attachment::error::StartError;
use crate::attachment::settings::Settings;
use crate::discover::boot_id;
use crate::error::chain;
use crate::marks::note_reload;
use crate::supervise::narrate::log_shortfalls;
use crate::supervise::reload::Taken;
use crate::supervise::state::{Effect, Ending, Event};
use crate::supervise::worker::{self, Done, Now, Task};

impl Runner<'_> {
    /// Takes what has become of a job. Returns how it ended, where that was the last.
    pub(super) fn done(&mut self, ended: worker::Ended) -> Result<Option<Ended>, StartError> {
        let worker::Ended { done, now, cost } = ended;
        if matches!(done, Done::Passed(_) | Done::Learnt(_)) {
            let is_due = self.look_at.is_some() || self.due.contains(&Task::Pass);
            self.hearing.done(cost, is_due);
        }
        if let Some(now) = now {
            let before = self.now.replace(now);
            self.log_new_shortfalls(before.as_deref());
        }
        match done {
            Done::Begun(report) => {
                let report = report?;
                self.telling.pass(&report);
                self.due.extend(FIRST);
                self.carry_out(Effect::Upgrade);
                self.take(Event::Passed(report.noticed));
            }
            Done::Isolated(report) => {
                if let Ok(Some(report)) = &report {
                    self.telling.pass(report);
                    // Limits of units come with a fallback, and go with it.
                    self.due.insert(Task::KeepHost);
                }
                self.isolate_later = report.is_err();
                self.telling.isolated(report.err());
            }
            Done::Host(Ok(Checked::Done(report))) => self.telling.host(Ok(*report)),
            Done::Host(Ok(Checked::Kept)) => {}
            Done::Host(Ok(Checked::Busy)) => self.for_neighbours.again(Instant::now()),
            Done::Host(Err(error)) => self.telling.host(Err(error)),
            Done::Prioritised(Ok(report)) => self.telling.pass(&report),
            Done::Prioritised(Err(error)) | Done::Passed(Err(error)) if error.means_gone() => {}
            Done::Prioritised(Err(error)) => {
                tracing::warn!("the vCPUs have no priority yet: {}", chain(&error));
            }
            Done::Passed(Ok(report)) => {
                self.telling.pass_failed(report.plan_failed.as_ref().map(|error| chain(error)));
                self.telling.pass(&report);
                self.take(Event::Passed(report.noticed));
            }
            Done::Passed(Err(error)) => self.telling.pass_failed(Some(chain(&error))),
            Done::Learnt(learnt) => self.learnt(learnt),
            Done::Reloaded(taken) => self.reloaded(taken),
            Done::Finished(restored) => {
                let why = self.state.ending.unwrap_or(Ending::Asked);
                return Ok(Some(Ended { why, restored: Some(restored?) }));
            }
        }
        Ok(None)
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
                self.due.extend(FIRST);
                (None, later)
            }
            Err(why) => {
                tracing::warn!("VM {vm}: the policy before stays in force: {why}");
                (Some(why), Vec::new())
            }
        };
        let Ok(boot_id) = boot_id(self.root) else { return };
        note_reload(&self.settings.state, &vm, &boot_id, self.process, refused, later);
    }

    /// Logs where the VM's threads are, and shortfalls of the plan, where a job has changed them.
    pub(super) fn log_new_shortfalls(&self, before: Option<&Now>) {
        let Some(Now { plan, findings, placed, .. }) = self.now.as_deref() else { return };
        let headline = placed.in_words(plan);
        if before.is_none_or(|before| before.placed.in_words(&before.plan) != headline) {
            tracing::info!("VM {}: {headline}", plan.vm);
        }
        log_shortfalls(findings, before.map_or(&[], |before| &before.findings));
    }

    /// Tells systemd and `qmpin status` how it stands, where that has changed.
    pub(super) fn tell(&mut self) {
        // Before that, what there is to report changes with every step.
        if !self.is_ready {
            return;
        }
        let status = self.status();
        let Some(Now { drift_total, findings, .. }) = self.now.as_deref() else { return };
        let Settings { state, vm, .. } = &self.settings;
        self.telling.tell(status, state, vm, self.line.kind(), *drift_total, findings);
    }

    pub(super) fn status(&self) -> String {
        let Some(Now { plan, placed, drift_total, .. }) = self.now.as_deref() else {
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
