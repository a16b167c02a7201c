//! Restores how threads were scheduled, from the journal alone. It comes before the masks: a thread
//! that goes everywhere again must not keep everybody else from running there.
//!
//! ```text
//!   a thread that was changed   it is as we left it ─▶ what it had
//!                               it is as before     ─▶ nothing to do
//!                               it is otherwise     ─▶ another program's: kept, reported
//!   a thread created later      it has what qmpin set ─▶ what a thread has that was never changed
//! ```

use std::io;

use crate::discover::tasks;
use crate::knobs::outcome::{Failed, Foreign};
use crate::knobs::priority::journal::SchedMemory;
use crate::sched::{Sched, is_gone};
use crate::scheduling::Scheduling;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ProcessKey;

/// What came of it.
#[derive(Debug, Default)]
pub struct PriorityRestore {
    /// Threads restored.
    pub put_back: usize,
    /// Threads that another program has changed meanwhile: left alone.
    pub foreign: Vec<Foreign<Scheduling>>,
    /// Threads that could not be restored.
    pub failed: Vec<Failed<Scheduling>>,
}

/// Restores what is remembered of the threads of a process.
///
/// # Errors
/// [`ReadError`] where the threads cannot be listed.
pub(crate) fn restore_priorities(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &SchedMemory,
) -> Result<PriorityRestore, ReadError> {
    let mut report = PriorityRestore::default();
    if memory.is_empty() {
        return Ok(report);
    }
    for thread in tasks::keys(root, process.pid)? {
        let to = memory.before(thread);
        let put_back = || -> io::Result<Option<Scheduling>> {
            let found = sched.scheduling(thread.tid)?;
            if found == to || !memory.is_ours(thread, &found) {
                return Ok(Some(found));
            }
            let is_there = tasks::is_thread_of(root, process.pid, thread);
            if !is_there.map_err(|error| error.source)? {
                return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
            }
            sched.set_scheduling(thread.tid, to)?;
            match sched.scheduling(thread.tid)? {
                now if now == to => Ok(None),
                now => Err(io::Error::other(format!("it is {now} all the same"))),
            }
        };
        match put_back() {
            Ok(None) => report.put_back += 1,
            Ok(Some(found)) if found != to && memory.has_written(thread) => {
                report.foreign.push(Foreign { thread, found, before: to });
            }
            Ok(Some(_)) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => report.failed.push(Failed { thread, to, error }),
        }
    }
    Ok(report)
}
