//! Signals to supervisors, by pidfd: the number of a process that has ended may be another's.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid as RustixPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::discover::is_alive;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Sends a signal to a process. Returns what shows its end; `None`: it has ended.
///
/// # Errors
/// The kernel's answer.
pub(super) fn send(
    root: &SysRoot,
    process: ProcessKey,
    signal: Signal,
) -> io::Result<Option<OwnedFd>> {
    let pid = RustixPid::from_raw(process.pid.0).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        opened => opened?,
    };
    // Only now: the descriptor is of the process that has the number, and that must be this one.
    if !is_alive(root, process) {
        return Ok(None);
    }
    match pidfd_send_signal(&pidfd, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(None),
        sent => sent.map(|()| Some(pidfd)).map_err(io::Error::from),
    }
}

/// Waits for the end of a process; whether it has ended.
///
/// # Errors
/// The kernel's answer.
pub(super) fn ends_within(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    Ok(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit))? > 0)
}
