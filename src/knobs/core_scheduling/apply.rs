//! The knob *core_scheduling*: the VM's cookie, by `prctl(2)` (`PR_SCHED_CORE`).

use std::io;

use crate::journal::{Journal, JournalError, Record};
use crate::knobs::affinity::apply::Bench;
use crate::knobs::affinity::write::is_still_there;
use crate::knobs::core_scheduling::journal::CookieRecord;
use crate::sched::is_gone;
use crate::scheduling::Cookie;
use crate::threads::{Role, ThreadKey};

/// Makes a cookie for all threads of the VM. What the kernel says where it will not.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable, and then nothing was written; or where it
/// could not be written down which cookie it is.
pub fn make_cookie(
    bench: Bench<'_>,
    journal: &mut Journal,
) -> Result<io::Result<Cookie>, JournalError> {
    let Bench { sched, process, .. } = bench;
    journal.append(vec![Record::Cookie(CookieRecord::Intended)])?;
    let main = ThreadKey { tid: process.pid.main_thread(), start: process.start };
    let made = || -> io::Result<Cookie> {
        if !is_still_there(bench, main, &Role::Emulator).map_err(|error| error.source)? {
            return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
        }
        sched.make_cookie(process.pid)?;
        sched.cookie(main.tid)?.ok_or_else(|| io::Error::other("it has none all the same"))
    };
    let made = made();
    let record = made.as_ref().map_or(CookieRecord::Refused, |made| CookieRecord::Made(*made));
    journal.append(vec![Record::Cookie(record)])?;
    Ok(made)
}

/// Takes the cookie from one thread of the VM; one that has ended has none.
///
/// # Errors
/// What the kernel said.
pub fn clear_cookie(bench: Bench<'_>, thread: ThreadKey) -> io::Result<()> {
    if !is_still_there(bench, thread, &Role::Emulator).map_err(|error| error.source)? {
        return Ok(());
    }
    let cleared = bench.sched.clear_cookie(thread.tid);
    match cleared.and_then(|()| bench.sched.cookie(thread.tid)) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(io::Error::other("it has one all the same")),
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(error),
    }
}
