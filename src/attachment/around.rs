//! What is done around the VM: others excluded from its CPUs, and what depends on that.
//!
//! ```text
//!   reonline ─▶ the first pins ─▶ remember_host ─▶ isolate ─▶ keep_host ─▶ prioritise
//! ```

use std::time::Instant;

use crate::attachment::error::{PassError, StartError};
use crate::attachment::reports::PassReport;
use crate::attachment::{Attachment, Known};
use crate::discover;
use crate::discover::tasks::Scan;
use crate::error::chain;
use crate::knobs::host::keep::Due;
use crate::knobs::host::outcome::HostApplied;
use crate::knobs::host::report::HostReport;
use crate::knobs::reonline::cycle::{ReonlineReport, reonline};
use crate::leases::StateError;
use crate::policy::Knob;

/// A partition, and the fallback where that is refused.
const CHOICES_MAX: usize = 2;

/// What has come of a check of the host.
#[derive(Debug)]
pub enum Checked {
    /// It was brought in line with all leases.
    Done(Box<HostReport>),
    /// A supervisor has done so just now.
    Kept,
    /// Another supervisor is at it: it is to be checked again in a moment.
    Busy,
}

impl Attachment<'_> {
    /// Keeps others off the VM's CPUs, as far as the policy wants that and the host can, and looks
    /// again: a thread's mask may have been lost on the way.
    ///
    /// # Errors
    /// [`PassError`].
    pub fn isolate(&mut self) -> Result<PassReport, PassError> {
        let is_wanted = self.known.settings.policy.vm.wanted_knobs().contains(&Knob::Partition);
        let mut report = PassReport::default();
        for _ in 0..CHOICES_MAX {
            let mut applied = std::mem::take(&mut report.knobs.affinity.applied);
            report = self.isolate_as_chosen(is_wanted)?;
            applied.append(&mut report.knobs.affinity.applied);
            report.knobs.affinity.applied = applied;
            if !self.knobs.partition.is_refused() {
                break;
            }
        }
        let leased = (self.knobs.partition.cgroup(), self.knobs.partition.slices());
        self.knobs.partition.settle();
        if (self.knobs.partition.cgroup(), self.knobs.partition.slices()) != leased {
            self.relet()?;
        }
        Ok(report)
    }

    /// Makes the choice between a partition and a fallback, and does what it takes.
    fn isolate_as_chosen(&mut self, is_wanted: bool) -> Result<PassReport, PassError> {
        let earlier = self.knobs.partition.site();
        let had_one = earlier.is_some();
        let leased = (self.knobs.partition.cgroup(), self.knobs.partition.slices());
        let ground = self.known.ground();
        let claimed =
            is_wanted && self.knobs.partition.claim(ground, &self.plan, &mut self.journal)?;
        if !is_wanted {
            self.knobs.partition.abandon(ground, self.journal.memory());
        }
        if claimed {
            if let Err(error) = self.relet() {
                // Without its lease it is not made: others would not know of it.
                self.knobs.partition.disclaim(earlier);
                return Err(error.into());
            }
            self.knobs.partition.prepare(self.known.ground());
        }
        if self.lease_due
            || (self.knobs.partition.cgroup(), self.knobs.partition.slices()) != leased
        {
            self.relet()?;
        }
        if claimed || had_one {
            self.host_knobs.expect_changes();
        }
        let is_ready = claimed && !self.knobs.partition.is_refused();
        if is_ready || had_one { self.pass() } else { Ok(PassReport::default()) }
    }

    /// When the choice between a partition and a fallback is to be made again; `None`: it is made for good.
    #[must_use]
    pub fn choice_due(&self) -> Option<Instant> {
        self.knobs.partition.choice_due()
    }

    /// Whether that choice would be another one now. It reads, and writes nothing.
    pub fn would_choose_anew(&mut self) -> bool {
        let ground = self.known.ground();
        self.knobs.partition.would_choose_anew(ground, &self.plan, self.journal.memory())
    }

    /// Gives vCPUs their priority and the VM its core-scheduling cookie, once others are elsewhere: a
    /// thread of the kernel's that is below that priority would not get away from there any more.
    ///
    /// # Errors
    /// [`PassError`].
    pub fn prioritise(&mut self) -> Result<PassReport, PassError> {
        let policy = &self.known.settings.policy.vm;
        let has_priority = self.knobs.priority.begin(policy.sched.value, &self.journal);
        let has_cookie = self.knobs.cookie.begin(policy, &self.journal);
        if has_priority || has_cookie { self.pass() } else { Ok(PassReport::default()) }
    }

    /// Writes the lease while no other process does.
    pub(crate) fn relet(&mut self) -> Result<(), StateError> {
        self.lease_due = true;
        let _lock = self.known.settings.state.lock_leases()?;
        self.write_lease()?;
        self.lease_due = false;
        Ok(())
    }

    /// Takes down what the kernel is about to change by itself: to be called before
    /// [`Attachment::isolate`].
    ///
    /// # Errors
    /// [`StartError`]; then there had better be no partition.
    pub fn remember_host(&mut self) -> Result<(), StartError> {
        let state = &self.known.settings.state;
        let lock = state.lock_host()?;
        Ok(self.host_knobs.remember(self.known.host, state, &self.known.boot_id, &lock)?)
    }

    /// Excludes interrupts and the kernel's own work from the CPUs of all VMs that want it, where that is due.
    ///
    /// # Errors
    /// [`StartError`]. The VM's own threads stay where they are.
    pub fn check_host(&mut self) -> Result<Checked, StartError> {
        self.step_aside();
        let Known { host, settings, boot_id, .. } = &self.known;
        // Each supervisor's timer ticks at another time, so one in two or more finds it done.
        let within = settings.policy.vm.check_interval.value / 2;
        match self.host_knobs.is_due(host.root, &settings.state, boot_id, within, Instant::now()) {
            Due::Now(_lock) => self.reconcile_host().map(Box::new).map(Checked::Done),
            Due::Soon => Ok(Checked::Busy),
            Due::NotYet => Ok(Checked::Kept),
        }
    }

    /// The same, whatever another supervisor has done.
    ///
    /// # Errors
    /// As [`Attachment::check_host`].
    pub fn keep_host(&mut self) -> Result<HostReport, StartError> {
        self.step_aside();
        self.reconcile_host()
    }

    fn reconcile_host(&mut self) -> Result<HostReport, StartError> {
        let Known { host, settings, boot_id, process } = &self.known;
        let state = &settings.state;
        // The end of the VM is seen in a moment, and its partition goes first.
        if discover::lives(host.root, *process).is_ok_and(|lives| !lives) {
            return Ok(HostReport::default());
        }
        let report = self.host_knobs.reconcile(*host, state, boot_id)?;
        self.drift_total += report.drifted.len() as u64;
        if report.applied.iter().any(HostApplied::has_limited_unit) {
            // What it did to our masks is not drift.
            self.knobs.affinity.expect_changes();
        }
        Ok(match self.early_host.take() {
            Some(earlier) => report.after(earlier),
            None => report,
        })
    }

    /// Takes the VM's CPUs offline and online again, where the policy wants that: once, before the first
    /// pin. What can be moved has left them by then, so that it is in no way. A later scan, or
    /// the one there is.
    pub(crate) fn reonline(&mut self, scan: Scan) -> (Scan, ReonlineReport) {
        if !self.known.settings.policy.vm.wanted_knobs().contains(&Knob::Reonline) {
            return (scan, ReonlineReport::default());
        }
        let report = self.try_reonline().unwrap_or_else(|error| {
            tracing::warn!("reonline: {}", chain(&error));
            ReonlineReport { failed: vec![chain(&error)], ..ReonlineReport::default() }
        });
        (self.scan().unwrap_or(scan), report)
    }

    fn try_reonline(&mut self) -> Result<ReonlineReport, StartError> {
        self.early_host = Some(self.keep_host()?);
        let report = reonline(self.known.ground(), &self.plan.exclusive)?;
        self.notice_cpu_hotplug()?;
        if let Some(stay) = self.stale {
            self.replan(stay)?;
        }
        Ok(report)
    }
}
