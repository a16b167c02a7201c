//! What steps on a VM's threads are carried out with, and the one way to write to a thread.

use std::io;

use crate::discover::{Grips, tasks};
use crate::knobs::host::kernel_threads;
use crate::knobs::outcome::Outcome;
use crate::mask::Mask;
use crate::sched::{Sched, is_gone};
use crate::scheduling::Scheduling;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::{ProcessKey, ThreadKey};

/// Everything a step on a thread is carried out with.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    /// Where threads are looked up just before each write.
    pub root: &'a SysRoot,
    /// Who sets masks.
    pub sched: &'a dyn Sched,
    /// What proves at once that a thread is still the one it was; without, its line is read.
    pub grips: &'a Grips,
    /// The QEMU process: a thread of another is never written.
    pub process: ProcessKey,
}

/// What a thread has, and can be given.
pub(crate) trait OfThread: Sized {
    fn read(sched: &dyn Sched, thread: ThreadKey) -> io::Result<Self>;
    fn write(&self, sched: &dyn Sched, thread: ThreadKey) -> io::Result<()>;
}

impl OfThread for Mask {
    fn read(sched: &dyn Sched, thread: ThreadKey) -> io::Result<Mask> {
        sched.affinity(thread.tid).map(Mask::from)
    }

    fn write(&self, sched: &dyn Sched, thread: ThreadKey) -> io::Result<()> {
        sched.set_affinity(thread.tid, self)
    }
}

impl OfThread for Scheduling {
    fn read(sched: &dyn Sched, thread: ThreadKey) -> io::Result<Scheduling> {
        sched.scheduling(thread.tid)
    }

    fn write(&self, sched: &dyn Sched, thread: ThreadKey) -> io::Result<()> {
        sched.set_scheduling(thread.tid, *self)
    }
}

impl Bench<'_> {
    /// The last check before a write: a thread number may belong to another thread by now. A kernel thread that works
    /// for the VM is none of the process.
    ///
    /// # Errors
    /// [`ReadError`] where that cannot be read.
    pub(crate) fn has(&self, thread: ThreadKey) -> Result<bool, ReadError> {
        // A grip was taken before the thread was seen to be of the process, so its word is enough.
        if let Some(lives) = self.grips.lives(thread) {
            return Ok(lives);
        }
        Ok(tasks::is_thread_of(self.root, self.process.pid, thread)?
            || kernel_threads::is_kernel_thread(self.root, thread)?)
    }

    /// Checks, writes, reads back, and compares.
    pub(crate) fn set<V: OfThread>(
        &self,
        thread: ThreadKey,
        to: &V,
        is_there: impl FnOnce(&V) -> bool,
    ) -> Outcome<V> {
        match self.has(thread) {
            Ok(true) => {}
            Ok(false) => return Outcome::Gone,
            Err(error) => return Outcome::Refused { error: error.source },
        }
        match to.write(self.sched, thread).and_then(|()| V::read(self.sched, thread)) {
            Ok(now) if is_there(&now) => Outcome::Done,
            Ok(now) => Outcome::Narrowed { to: now },
            Err(error) if is_gone(&error) => Outcome::Gone,
            Err(error) => Outcome::Refused { error },
        }
    }
}
