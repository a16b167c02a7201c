//! Takes the VM's core-scheduling cookie from its threads, from the journal alone. A thread that is created
//! meanwhile has that of the thread that created it, so they are listed again until none has one.

use crate::discover::tasks::LOOKS_MAX;
use crate::discover::{Grips, tasks};
use crate::knobs::bench::Bench;
use crate::knobs::core_scheduling::apply::clear;
use crate::knobs::core_scheduling::journal::CookieMemory;
use crate::knobs::outcome::{Foreign, Restored};
use crate::sched::{Sched, is_gone};
use crate::scheduling::ItsCookie;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ProcessKey;

/// Takes what is remembered to be ours.
///
/// # Errors
/// [`ReadError`] where the threads cannot be listed.
pub(crate) fn clear_cookies(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &CookieMemory,
) -> Result<Restored<ItsCookie>, ReadError> {
    let mut report = Restored::default();
    if memory.is_empty() {
        return Ok(report);
    }
    let grips = Grips::default();
    let bench = Bench { root, sched, grips: &grips, process };
    for _ in 0..LOOKS_MAX {
        let mut is_changed = false;
        (report.foreign, report.failed) = (Vec::new(), Vec::new());
        for thread in tasks::keys(root, process.pid)? {
            let none = ItsCookie(None);
            match sched.cookie(thread.tid) {
                Ok(Some(cookie)) if memory.is_ours(cookie) => {
                    let cleared = clear(&bench, thread);
                    is_changed |= cleared.is_ok();
                    report.note(thread, none, cleared);
                }
                Ok(Some(cookie)) => {
                    let found = ItsCookie(Some(cookie));
                    report.foreign.push(Foreign { thread, found, before: none });
                }
                Err(error) if !is_gone(&error) => report.note(thread, none, Err(error)),
                Ok(None) | Err(_) => {}
            }
        }
        if !is_changed {
            break;
        }
    }
    Ok(report)
}
