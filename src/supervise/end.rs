//! Ends a VM's supervisor, so that somebody else can put things back.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid as RustixPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::settings::Host;
use super::start_error::StartError;
use crate::discover::is_alive;
use crate::ids::VmName;
use crate::leases::{StateDir, SupervisorLock};
use crate::threads::ProcessKey;

/// How long a supervisor may take to restore and end. It takes milliseconds; then it is killed, and the
/// journal has all that is needed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two tries for a lock whose holder is not known.
const PAUSE: Duration = Duration::from_millis(20);

/// Whether there was a supervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Supervised {
    /// There was, and it has ended; ending in order, it put everything back itself.
    Was,
    /// There was none.
    WasNot,
}

/// Becomes the VM's supervisor: asks the one there is to end, waits, and kills it if it hangs.
///
/// # Errors
/// [`StartError::NotEnded`] where somebody has the lock for long and does not say who, or cannot be
/// ended.
pub fn end_supervisor(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
) -> Result<(SupervisorLock, Supervised), StartError> {
    let mut was = Supervised::WasNot;
    for signal in [Signal::TERM, Signal::KILL] {
        if let Some(lock) = state.lock_supervisor(vm)? {
            return Ok((lock, was));
        }
        let Some(supervisor) = state.supervisor(vm) else { break };
        tracing::info!("VM {vm}: process {} has it and is told to end", supervisor.pid);
        was = Supervised::Was;
        let ended = end(host, supervisor, signal);
        ended.map_err(|source| StartError::Watch { what: "the VM's supervisor", source })?;
    }
    // Another `detach` is at work, and does not say so: it is done in milliseconds.
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(lock) = state.lock_supervisor(vm)? {
            return Ok((lock, was));
        }
        if Instant::now() > deadline {
            let pid = state.supervisor(vm).map(|process| process.pid);
            return Err(StartError::NotEnded { vm: vm.clone(), pid });
        }
        thread::sleep(PAUSE);
    }
}

fn end(host: Host<'_>, process: ProcessKey, signal: Signal) -> io::Result<()> {
    let pid = RustixPid::from_raw(process.pid.0).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        opened => opened?,
    };
    // The number may be another's by now; the descriptor then is, too.
    if !is_alive(host.root, process) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, signal) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        sent => sent?,
    }
    let limit =
        Timespec { tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))?;
    Ok(())
}
