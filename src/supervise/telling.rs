//! What was reported already, so that each thing is reported once.
//!
//! | who | what |
//! |---|---|
//! | the log | what was moved, what was refused, why a pass was incomplete |
//! | systemd | a line of status |
//! | `qmpin status` | `<vm>.standing`, see [`crate::standing`] |

use std::collections::BTreeSet;

use super::narrate::{log_threads, refusals, refusals_for_good};
use super::notify;
use crate::attachment::error::StartError;
use crate::attachment::reports::PassReport;
use crate::error::chain;
use crate::ids::VmName;
use crate::knobs::host::report::{HostLines, HostReport, log_host};
use crate::knobs::vm::VmReport;
use crate::leases::StateDir;
use crate::plan::Finding;
use crate::qmp::ChannelKind;
use crate::standing::{STANDING_SCHEMA, Standing, write_standing};
use crate::threads::ThreadKey;

/// So many refusals are kept; there are a few for each interrupt at most.
const REFUSED_MAX: usize = 1_000;

/// What was reported already.
#[derive(Default)]
pub(super) struct Telling {
    /// Why the last pass failed, if it did.
    pass_failed: Option<String>,
    /// What the log has of the host.
    host_lines: HostLines,
    /// Why the host could not be kept in line the last time, if it could not.
    host_failed: Option<String>,
    /// Why others are not excluded from the VM's CPUs, if that has yet to be.
    not_isolated: Option<String>,
    /// What the kernel would not do, and is not asked for again.
    refused: BTreeSet<String>,
    /// What of the plan in force falls short.
    findings: Vec<Finding>,
    /// What it would not do in the last pass.
    refused_now: BTreeSet<String>,
    /// What `status` shows of channel and drift.
    standing: Option<(ChannelKind, u64)>,
    /// The rest that it shows is out of date.
    is_stale: bool,
    /// What systemd shows.
    status: String,
    /// Threads about which a line was logged.
    lines: BTreeSet<ThreadKey>,
    /// The same, of how they are scheduled.
    priority_lines: BTreeSet<ThreadKey>,
}

impl Telling {
    /// What a pass has changed.
    pub(super) fn pass(&mut self, report: &PassReport) {
        let VmReport { affinity, priority, .. } = &report.knobs;
        log_threads(&affinity.applied, &affinity.drifted, &mut self.lines);
        log_threads(&priority.applied, &priority.drifted, &mut self.priority_lines);
        self.refuse(refusals_for_good(report));
        let refused: BTreeSet<String> = refusals(report).into_iter().take(REFUSED_MAX).collect();
        self.is_stale |= refused != self.refused_now;
        self.refused_now = refused;
    }

    /// Why a pass was incomplete. A full /run stays full for a while: once is enough.
    pub(super) fn pass_failed(&mut self, error: Option<String>) {
        if error != self.pass_failed
            && let Some(error) = &error
        {
            tracing::warn!("{error}");
        }
        self.pass_failed = error;
    }

    /// Why others are not excluded from the VM's CPUs; `None`: they are, as far as the last pass has shown.
    pub(super) fn isolated(&mut self, error: Option<String>) {
        match &error {
            Some(error) if self.not_isolated.as_ref() != Some(error) => {
                tracing::warn!(
                    "other threads are not excluded from the VM's CPUs, trying again: {error}"
                );
            }
            None if self.not_isolated.is_some() => {
                tracing::info!("other threads are excluded from the VM's CPUs now");
            }
            _ => {}
        }
        self.is_stale |= self.not_isolated != error;
        self.not_isolated = error;
    }

    /// What has become of the rest of the host.
    pub(super) fn host(&mut self, kept: Result<HostReport, StartError>) {
        match kept {
            Ok(report) => {
                self.host_failed = None;
                log_host(&report, &mut self.host_lines);
                self.refuse(report.refusals());
            }
            Err(error) => {
                let error = chain(&error);
                if self.host_failed.as_ref() != Some(&error) {
                    tracing::warn!("the rest of the host: {error}");
                }
                self.host_failed = Some(error);
            }
        }
    }

    fn refuse(&mut self, sentences: Vec<String>) {
        for sentence in sentences {
            if self.refused.len() < REFUSED_MAX {
                self.is_stale |= self.refused.insert(sentence);
            }
        }
    }

    /// That everything is in place for the first time.
    pub(super) fn ready(&mut self, status: String) {
        notify::ready(&status);
        self.status = status;
    }

    /// How it stands, and what there is to say about the plan in force, where that has changed.
    pub(super) fn tell(
        &mut self,
        status: String,
        state: &StateDir,
        vm: &VmName,
        channel: ChannelKind,
        drift_total: u64,
        findings: &[Finding],
    ) {
        let short = || findings.iter().filter(|finding| finding.falls_short());
        if !short().eq(&self.findings) {
            self.findings = short().cloned().collect();
            self.is_stale = true;
        }
        if status != self.status {
            notify::status(&status);
            self.status = status;
        }
        let standing = (channel, drift_total);
        if self.standing == Some(standing) && !self.is_stale {
            return;
        }
        let schema = STANDING_SCHEMA.to_owned();
        let not_isolated = self.not_isolated.iter();
        let not_isolated = not_isolated
            .map(|why| format!("other threads are not excluded from the VM's CPUs: {why}"));
        let refused = self.refused.union(&self.refused_now).cloned();
        // What holds although the policy files say otherwise.
        let of_policy = self.findings.iter().filter(|one| one.rule == "policy");
        let refused = of_policy.map(ToString::to_string).chain(refused).chain(not_isolated);
        let said = Standing {
            schema,
            channel: Some(channel),
            drift_total: Some(drift_total),
            refused: refused.collect(),
            findings: self.findings.clone(),
        };
        match write_standing(state, vm, &said) {
            Ok(()) => {
                self.standing = Some(standing);
                self.is_stale = false;
            }
            // The next time it may be written: a full /run is what there is to report.
            Err(error) => tracing::debug!("`qmpin status` does not know it yet: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knobs::partition::apply::Refused;
    use crate::standing::read_standing;

    #[test]
    fn past_refusal_is_no_longer_reported() {
        let dir = tempfile::tempdir().expect("a folder");
        let (state, vm) = (StateDir::at(dir.path()), "100".parse().expect("a name"));
        let mut telling = Telling::default();
        let said = |telling: &mut Telling| {
            telling.tell(String::new(), &state, &vm, ChannelKind::Lease, 0, &[]);
            read_standing(&state, &vm).expect("written").refused
        };
        let partition = vec![Refused::new("qemu.slice", "a partition", "busy")];
        telling.pass(&PassReport {
            knobs: VmReport { partition, ..VmReport::default() },
            ..PassReport::default()
        });
        assert_eq!(said(&mut telling).len(), 1);
        telling.isolated(Some("no room".to_owned()));
        assert_eq!(said(&mut telling).len(), 2);
        telling.isolated(None);
        telling.pass(&PassReport::default());
        assert_eq!(said(&mut telling), [""; 0]);
    }
}
