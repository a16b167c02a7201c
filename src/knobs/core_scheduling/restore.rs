//! Takes the VM's core-scheduling cookie from its threads, from the journal alone. A thread that is created
//! meanwhile has that of its maker, so it looks again until there is none.

use std::collections::BTreeMap;
use std::io;

use crate::discover::tasks::LOOKS_MAX;
use crate::discover::{Grips, tasks};
use crate::knobs::bench::Bench;
use crate::knobs::core_scheduling::apply::clear;
use crate::knobs::core_scheduling::journal::CookieMemory;
use crate::sched::{Sched, is_gone};
use crate::scheduling::Cookie;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::{ProcessKey, ThreadKey};

/// What came of it.
#[derive(Debug, Default)]
pub struct CookieRestore {
    /// Threads whose cookie was taken.
    pub cleared: usize,
    /// Threads that have one of another program's: left alone.
    pub foreign: BTreeMap<ThreadKey, Cookie>,
    /// Threads that could not be dealt with, and what the kernel said.
    pub failed: Vec<(ThreadKey, io::Error)>,
}

/// Takes what is remembered to be ours.
///
/// # Errors
/// [`ReadError`] where the threads cannot be listed.
pub(crate) fn clear_cookies(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &CookieMemory,
) -> Result<CookieRestore, ReadError> {
    let mut report = CookieRestore::default();
    if memory.is_empty() {
        return Ok(report);
    }
    let grips = Grips::default();
    let bench = Bench { root, sched, grips: &grips, process };
    for _ in 0..LOOKS_MAX {
        let before = report.cleared;
        report.failed.clear();
        for thread in tasks::keys(root, process.pid)? {
            match sched.cookie(thread.tid) {
                Ok(Some(cookie)) if memory.is_ours(cookie) => match clear(&bench, thread) {
                    Ok(()) => report.cleared += 1,
                    Err(error) => report.failed.push((thread, error)),
                },
                Ok(Some(cookie)) => {
                    report.foreign.insert(thread, cookie);
                }
                Ok(None) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => report.failed.push((thread, error)),
            }
        }
        if report.cleared == before {
            break;
        }
    }
    Ok(report)
}
