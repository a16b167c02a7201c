//! `qmpin attach --once`: attaches the VM, and leaves it without a supervisor.

use std::collections::BTreeSet;

use super::narrate::{log_shortfalls, log_threads, refusals, refusals_for_good};
use crate::attachment::Attachment;
use crate::attachment::error::StartError;
use crate::attachment::reports::PassReport;
use crate::attachment::settings::Settings;
use crate::knobs::affinity::keep::AffinityReport;
use crate::knobs::ground::Host;
use crate::knobs::host::report::{HostLines, HostReport, log_host};
use crate::knobs::priority::keep::PriorityReport;
use crate::plan::Plan;
use crate::standing::{STANDING_SCHEMA, Standing, write_standing};

/// Attaches, and leaves all as it is then.
///
/// # Errors
/// [`StartError`].
pub async fn attach_once(
    host: Host<'_>,
    settings: Settings,
) -> Result<(Plan, PassReport, HostReport), StartError> {
    let (state, vm) = (settings.state.clone(), settings.vm.clone());
    let (mut attachment, _channel, mut report) = Attachment::start(host, settings).await?;
    let AffinityReport { applied, drifted, .. } = &report.knobs.affinity;
    log_threads(applied, drifted, &mut BTreeSet::new());
    // Anything that fails from here on leaves the VM pinned, with its undo.
    let remembered = attachment.remember_host();
    // The kernel does not restore what it changes while a partition is built.
    let isolated = match &remembered {
        Ok(()) => attachment.isolate(),
        Err(_) => Ok(PassReport::default()),
    };
    let kept = attachment.keep_host();
    let raised = attachment.prioritise();
    let second = attachment.pass();
    let (plan, findings) = (attachment.plan().clone(), attachment.findings());
    log_shortfalls(&findings, &[]);
    attachment.leave();
    report.then_applied(isolated?.knobs.affinity.applied);
    let second = second?.knobs;
    report.knobs.affinity.placed = second.affinity.placed;
    let raised = raised?.knobs;
    report.then_applied(raised.affinity.applied);
    report.then_applied(second.affinity.applied);
    report.knobs.partition = second.partition;
    (report.knobs.priority, report.knobs.cookie) = (raised.priority, raised.cookie);
    let PriorityReport { applied, drifted } = &report.knobs.priority;
    log_threads(applied, drifted, &mut BTreeSet::new());
    remembered?;
    let kept = kept?;
    log_host(&kept, &mut HostLines::default());
    let refused = refusals(&report).into_iter().chain(refusals_for_good(&report));
    let standing = Standing {
        schema: STANDING_SCHEMA.to_owned(),
        channel: None,
        drift_total: None,
        refused: refused.chain(kept.refusals()).collect(),
        findings: findings.into_iter().filter(|finding| finding.falls_short()).collect(),
    };
    if let Err(error) = write_standing(&state, &vm, &standing) {
        tracing::warn!("`qmpin status` does not know what was refused: {error}");
    }
    Ok((plan, report, kept))
}
