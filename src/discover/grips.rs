//! Grips on threads: a cheap and exact answer to "is it still that thread?", just before each write.
//!
//! ```text
//!   pidfd_open(TID) ─▶ read /proc/PID/task/TID/stat ─▶ …… ─▶ the pidfd says: it lives ─▶ write by TID
//!        │                      │                                     │
//!        └─ one thread ─────────┴── still its number, so its line ────┴── still its number
//! ```
//!
//! A pidfd of a thread (`PIDFD_THREAD`, Linux 6.9) stands for one thread for good, and a thread keeps
//! its number for as long as it lives. So where the pidfd was opened *before* the line was read, and
//! says *afterwards* that the thread lives, number, line and thread belong together, and the thread is
//! still of the process in whose folder the line was. That is what reading the line once more would
//! show, at a tenth of the time. On older kernels there are no grips, and the line is read once more.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::process::{Pid as RustixPid, PidfdFlags, pidfd_open};

use crate::ids::Tid;
use crate::peer::lives;
use crate::threads::ThreadKey;

/// It has the value of `O_EXCL` (`include/uapi/linux/pidfd.h`); older kernels answer `EINVAL`.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(nix::libc::O_EXCL.cast_unsigned());

/// No more than these descriptors: half of what a process may open by default.
const GRIPS_MAX: usize = 512;

/// Grips on some threads.
#[derive(Debug, Default)]
pub struct Grips {
    fds: BTreeMap<ThreadKey, OwnedFd>,
}

impl Grips {
    /// Takes hold of a thread, to be kept by [`Grips::keep`] once its line is read.
    pub(super) fn take(&self, tid: Tid) -> Option<OwnedFd> {
        if self.fds.len() >= GRIPS_MAX {
            return None;
        }
        pidfd_open(RustixPid::from_raw(tid.0)?, PIDFD_THREAD).ok()
    }

    /// Keeps a grip that was taken before the thread's line was read.
    pub(super) fn keep(&mut self, key: ThreadKey, fd: OwnedFd) {
        self.fds.insert(key, fd);
    }

    /// Whether the thread lives; `None`: there is no grip on it, and its line must be read.
    #[must_use]
    pub fn lives(&self, key: ThreadKey) -> Option<bool> {
        lives(self.fds.get(&key)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;
    use crate::ids::StartTicks;

    #[test]
    fn a_grip_tells_a_living_thread_from_one_that_has_ended() {
        let (sender, receiver) = channel();
        let (end, ended) = channel::<()>();
        let thread = thread::spawn(move || {
            sender.send(Tid(nix::unistd::gettid().as_raw())).expect("sent");
            let _ = ended.recv();
        });
        let tid = receiver.recv().expect("a thread");
        let mut grips = Grips::default();
        let key = ThreadKey { tid, start: StartTicks(1) };
        assert_eq!(grips.lives(key), None);
        let Some(fd) = grips.take(tid) else {
            // Past the capture of the test harness and off its line of dots, to be counted.
            let test = "a_grip_tells_a_living_thread_from_one_that_has_ended";
            let text = format!("\nskipped: {test}: no pidfd of a thread before Linux 6.9\n");
            let _ = std::io::stderr().write_all(text.as_bytes());
            return;
        };
        grips.keep(key, fd);
        assert_eq!(grips.lives(key), Some(true));
        drop(end);
        thread.join().expect("ended");
        // `join` returns when the thread's stack is free, which is a moment before its end.
        while grips.lives(key) == Some(true) {
            thread::yield_now();
        }
        assert_eq!(grips.lives(key), Some(false));
    }
}
