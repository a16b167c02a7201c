//! Restores how threads were scheduled, from the journal alone. It comes before the masks: a thread
//! that goes everywhere again must not keep everybody else from running there.
//!
//! ```text
//!   a thread that was changed   it is as we left it ─▶ what it had
//!                               it is as before     ─▶ nothing to do
//!                               it is otherwise     ─▶ another program's: kept, reported
//!   a thread created later      it has what qmpin set ─▶ what a thread has that was never changed
//! ```

use crate::discover::{Grips, tasks};
use crate::knobs::bench::Bench;
use crate::knobs::outcome::{Foreign, Restored};
use crate::knobs::priority::journal::SchedMemory;
use crate::sched::{Sched, is_gone};
use crate::scheduling::Scheduling;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ProcessKey;

/// Restores what is remembered of the threads of a process.
///
/// # Errors
/// [`ReadError`] where the threads cannot be listed.
pub(crate) fn restore_priorities(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &SchedMemory,
) -> Result<Restored<Scheduling>, ReadError> {
    let mut report = Restored::default();
    if memory.is_empty() {
        return Ok(report);
    }
    let grips = Grips::default();
    let bench = Bench { root, sched, grips: &grips, process };
    for thread in tasks::keys(root, process.pid)? {
        let to = memory.before(thread);
        let put_back = match sched.scheduling(thread.tid) {
            Ok(found) if found == to => continue,
            Ok(found) if !memory.is_ours(thread, &found) => {
                if memory.has_written(thread) {
                    report.foreign.push(Foreign { thread, found, before: to });
                }
                continue;
            }
            Ok(_) => bench.set(thread, &to, |now| *now == to).done(),
            Err(error) if is_gone(&error) => continue,
            Err(error) => Err(error),
        };
        report.note(thread, to, put_back);
    }
    Ok(report)
}
