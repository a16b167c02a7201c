//! The knob *core_scheduling*: the VM's cookie, by `prctl(2)` (`PR_SCHED_CORE`).

use std::io;

use crate::journal::Record;
use crate::knobs::bench::Bench;
use crate::knobs::core_scheduling::journal::CookieRecord;
use crate::knobs::core_scheduling::plan::CookieStep;
use crate::knobs::execute::Step;
use crate::sched::is_gone;
use crate::scheduling::Cookie;
use crate::threads::ThreadKey;

impl Step for CookieStep {
    type Bench<'a> = Bench<'a>;
    type Record = Record;
    /// The cookie that there is now, or what the kernel said.
    type Outcome = io::Result<Option<Cookie>>;

    fn undo(&self) -> Option<Record> {
        match self {
            CookieStep::Make => Some(Record::Cookie(CookieRecord::Intended)),
            CookieStep::Clear(_) => None,
        }
    }

    fn carry_out(&self, bench: &mut Bench<'_>) -> io::Result<Option<Cookie>> {
        match self {
            CookieStep::Make => make(bench).map(Some),
            CookieStep::Clear(thread) => clear(bench, *thread).map(|_| None),
        }
    }

    fn noted(&self, outcome: &io::Result<Option<Cookie>>) -> Option<Record> {
        let record = match (self, outcome) {
            (CookieStep::Make, Ok(Some(cookie))) => CookieRecord::Made(*cookie),
            (CookieStep::Make, _) => CookieRecord::Refused,
            (CookieStep::Clear(_), _) => return None,
        };
        Some(Record::Cookie(record))
    }
}

/// Makes a cookie for all threads of the VM.
fn make(bench: &Bench<'_>) -> io::Result<Cookie> {
    let Bench { sched, process, .. } = bench;
    let main = ThreadKey { tid: process.pid.main_thread(), start: process.start };
    if !bench.has(main).map_err(|error| error.source)? {
        return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
    }
    sched.make_cookie(process.pid)?;
    sched.cookie(main.tid)?.ok_or_else(|| io::Error::other("it has none all the same"))
}

/// Takes the cookie from one thread of the VM. Returns whether it lives.
///
/// # Errors
/// What the kernel said.
pub(crate) fn clear(bench: &Bench<'_>, thread: ThreadKey) -> io::Result<bool> {
    if !bench.has(thread).map_err(|error| error.source)? {
        return Ok(false);
    }
    let cleared = bench.sched.clear_cookie(thread.tid);
    match cleared.and_then(|()| bench.sched.cookie(thread.tid)) {
        Ok(None) => Ok(true),
        Ok(Some(_)) => Err(io::Error::other("it has one all the same")),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
