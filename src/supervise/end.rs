//! Ends a VM's supervisor, so that somebody else can put things back.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid as RustixPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::settings::Host;
use super::start_error::StartError;
use crate::discover::{boot_id, is_alive};
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
        let Some(supervisor) = holder(host, state, vm) else { break };
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
            let pid = holder(host, state, vm).map(|process| process.pid);
            return Err(StartError::NotEnded { vm: vm.clone(), pid });
        }
        thread::sleep(PAUSE);
    }
}

/// Who has the VM, as far as that is known. The lock may be unsigned, since there was no room for that; a supervisor
/// that lives has the lock, so that of the lease is the one.
fn holder(host: Host<'_>, state: &StateDir, vm: &VmName) -> Option<ProcessKey> {
    state.supervisor(vm).or_else(|| {
        let lease = state.lease(vm).ok()??;
        let is_of_this_boot = boot_id(host.root).is_ok_and(|boot_id| boot_id == lease.boot_id);
        lease.supervisor.filter(|process| is_of_this_boot && is_alive(host.root, *process))
    })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Child, Command};

    use super::*;
    use crate::cpuset::CpuSet;
    use crate::discover::process_key;
    use crate::ids::Pid;
    use crate::leases::{Kept, Lease, SCHEMA};
    use crate::policy::{VcpuSched, VfioIrqs};
    use crate::sched::Kernel;
    use crate::sysroot::SysRoot;

    /// A VM whose lease names a living process.
    fn leased() -> (tempfile::TempDir, StateDir, Lease, Child) {
        let dir = tempfile::tempdir().expect("a folder");
        let state = StateDir::at(dir.path());
        let child = Command::new("sleep").arg("60").spawn().expect("a process");
        let pid = Pid(i32::try_from(child.id()).expect("a pid"));
        let process = process_key(&SysRoot::live(), pid).expect("it lives");
        let lease = Lease {
            schema: SCHEMA.to_owned(),
            vm: "100".parse().expect("a name"),
            boot_id: boot_id(&SysRoot::live()).expect("a boot"),
            qemu: process,
            supervisor: Some(process),
            since_unix_s: 0,
            exclusive: CpuSet::EMPTY,
            emulator: CpuSet::EMPTY,
            iothreads: CpuSet::EMPTY,
            vcpus: Vec::new(),
            knobs: BTreeSet::new(),
            partition: None,
            slices: None,
            vfio_irqs: VfioIrqs::default(),
            sched: VcpuSched::default(),
            writer: crate::leases::this_version(),
            kept: Kept::default(),
        };
        state.write_lease(&lease).expect("written");
        (dir, state, lease, child)
    }

    #[test]
    fn who_could_not_sign_the_lock_is_ended_by_the_lease() {
        let (_dir, state, lease, mut child) = leased();
        let lock = state.lock_supervisor(&lease.vm).expect("a lock").expect("nobody has it");
        // The lock goes with the process that is ended.
        let ended = thread::spawn(move || {
            let ended = child.wait();
            drop(lock);
            ended
        });
        let root = SysRoot::live();
        let host = Host { root: &root, sched: &Kernel };
        let (_lock, was) = end_supervisor(host, &state, &lease.vm).expect("it ends");
        assert_eq!(was, Supervised::Was);
        assert!(!ended.join().expect("no panic").expect("waited").success());
    }

    #[test]
    fn nobody_is_taken_for_the_holder_who_cannot_be() {
        let (_dir, state, lease, mut child) = leased();
        let root = SysRoot::live();
        let host = Host { root: &root, sched: &Kernel };
        let holder = || holder(host, &state, &lease.vm);
        assert_eq!(holder(), lease.supervisor);
        let earlier = Lease { boot_id: "another".to_owned(), ..lease.clone() };
        state.write_lease(&earlier).expect("written");
        assert_eq!(holder(), None, "its number may be anybody's");
        state.write_lease(&lease).expect("written");
        child.kill().and_then(|()| child.wait()).expect("ended");
        assert_eq!(holder(), None, "another `detach` has the lock");
    }
}
