//! Signals to supervisors, by pidfd: the number of a process that has ended may be another's.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::discover::pidfd_of;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Sends a signal to a process. Returns what shows its end; `None`: it has ended.
///
/// # Errors
/// The kernel's answer.
pub(crate) fn send(
    root: &SysRoot,
    process: ProcessKey,
    signal: Signal,
) -> io::Result<Option<OwnedFd>> {
    let Some(pidfd) = pidfd_of(root, process)? else { return Ok(None) };
    match pidfd_send_signal(&pidfd, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(None),
        sent => sent.map(|()| Some(pidfd)).map_err(io::Error::from),
    }
}

/// Waits for the end of a process; whether it has ended.
///
/// # Errors
/// The kernel's answer.
pub(crate) fn ends_within(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    Ok(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit))? > 0)
}
