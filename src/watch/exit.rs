//! QEMU's end, by a pidfd (`man 2 pidfd_open`): it becomes readable once, and no other process can
//! stand in for it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid as RustixPid, PidfdFlags, pidfd_open};

use crate::discover::is_alive;
use crate::ids::Pid;
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
        let pidfd = open(process.pid)?;
        // The number may have been given to another process before the descriptor was had.
        if !is_alive(root, process) {
            return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
        }
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

fn open(pid: Pid) -> io::Result<OwnedFd> {
    let pid = RustixPid::from_raw(pid.0).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}
