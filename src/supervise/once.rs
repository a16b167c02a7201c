//! `qmpin attach --once`: attaches the VM, and leaves it without a supervisor.

use std::collections::BTreeSet;

use super::narrate::{log_pass, log_priority, log_shortfalls};
use crate::attachment::Attachment;
use crate::attachment::error::StartError;
use crate::attachment::reports::PassReport;
use crate::attachment::settings::Settings;
use crate::knobs::ground::Host;
use crate::knobs::host::report::{HostLines, HostReport, log_host};
use crate::plan::Plan;

/// Attaches, and leaves all as it is then.
///
/// # Errors
/// [`StartError`].
pub async fn attach_once(
    host: Host<'_>,
    settings: Settings,
) -> Result<(Plan, PassReport, HostReport), StartError> {
    let (mut attachment, _channel, mut report) = Attachment::start(host, settings).await?;
    log_pass(&report, &mut BTreeSet::new());
    log_shortfalls(attachment.plan(), &[]);
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
