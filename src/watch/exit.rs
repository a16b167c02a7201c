//! QEMU's end, by a pidfd (`man 2 pidfd_open`): it becomes readable once, and no other process can
//! stand in for it.

use std::io;

use rustix::io::Errno;

use crate::discover::pidfd_of;
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
