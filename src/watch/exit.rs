//! QEMU's end, by a pidfd (`man 2 pidfd_open`): it becomes readable once, and no other process can
//! stand in for it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid as RustixPid, PidfdFlags, pidfd_open};

use crate::discover::is_alive;
use crate::sys::Readable;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Waits for a process to end.
#[derive(Debug)]
pub struct Exit {
    pidfd: Readable,
}

impl Exit {
    /// Watches this process. It must be called within a tokio runtime.
    ///
    /// # Errors
    /// `ESRCH` where the process is gone already, also where its number is another's by now.
    pub fn of(root: &SysRoot, process: ProcessKey) -> io::Result<Exit> {
        let pidfd = pidfd_of(root, process)?.ok_or(Errno::SRCH)?;
        Ok(Exit { pidfd: Readable::new(pidfd)? })
    }

    /// Returns when the process has ended. Cancel safe.
    ///
    /// # Errors
    /// Those of polling.
    pub async fn wait(&self) -> io::Result<()> {
        self.pidfd.ready().await
    }
}

/// Opens the pidfd of a process; `None`: it has ended.
///
/// # Errors
/// Those of `pidfd_open(2)`.
pub(crate) fn pidfd_of(root: &SysRoot, process: ProcessKey) -> io::Result<Option<OwnedFd>> {
    let pid = RustixPid::from_raw(process.pid.0).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Err(Errno::SRCH) => return Ok(None),
        opened => opened?,
    };
    // Only now: the descriptor is of the process that has the number, and that must be this one.
    Ok(is_alive(root, process).then_some(pidfd))
}
