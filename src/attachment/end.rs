//! Ends a VM's supervisor, so that another process can restore what it had.
//!
//! ```text
//!   SIGTERM ─▶ it restores, and beats ─▶ ended
//!                 │ no beat for long, or no end to it
//!                 └─▶ SIGKILL: the journal has all that is needed
//! ```

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;

use crate::attachment::error::StartError;
use crate::attachment::signalling::{ends_within, send};
use crate::discover::{boot_id, is_alive, unlinked_holder};
use crate::ids::VmName;
use crate::knobs::ground::Host;
use crate::leases::{StateDir, SupervisorLock};
use crate::threads::ProcessKey;

/// How long a supervisor that restores is waited for.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Without a sign of progress. It gives one a second.
    silence: Duration,
    /// The same for one of qmpin 0.1.0, which gives none, and waits for a reload of systemd for 90 s.
    older_silence: Duration,
    /// In all: longer than the slowest steps that it has, one after the other.
    total: Duration,
}

const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(10),
    older_silence: Duration::from_secs(120),
    total: Duration::from_secs(300),
};

/// Between two checks whether it has ended, or whether a lock is free.
const PAUSE: Duration = Duration::from_millis(20);

/// Whether there was a supervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Supervised {
    /// There was, and it has ended; ending in order, it restore everything itself.
    Was,
    /// There was none.
    WasNot,
}

/// Becomes the VM's supervisor: asks the one there is to end, waits, and kills it if it hangs.
///
/// # Errors
/// [`StartError::NotEnded`] where another process has the lock for long and does not say which, or cannot be
/// ended.
pub fn end_supervisor(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
) -> Result<(SupervisorLock, Supervised), StartError> {
    end_within(host, state, vm, PATIENCE)
}

fn end_within(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
    patience: Patience,
) -> Result<(SupervisorLock, Supervised), StartError> {
    let mut was = Supervised::WasNot;
    // Its files were removed, so that the lock that can be had says nothing of it.
    if let Some(supervisor) = unlinked_holder(state, vm) {
        was = Supervised::Was;
        // The file by whose time it shows progress has no name any more.
        let since = Instant::now();
        let is_worth_it = || since.elapsed() < patience.older_silence;
        end(host, vm, supervisor, Signal::TERM, is_worth_it)?;
        if unlinked_holder(state, vm).is_some() {
            return Err(StartError::NotEnded { vm: vm.clone(), pid: Some(supervisor.pid) });
        }
    }
    for signal in [Signal::TERM, Signal::KILL] {
        if let Some(lock) = state.lock_supervisor(vm)? {
            return Ok((lock, was));
        }
        let Some(supervisor) = holder(host, state, vm) else { break };
        was = Supervised::Was;
        let mut progress = Progress::of(state, vm, patience);
        end(host, vm, supervisor, signal, || progress.is_there(state, vm))?;
    }
    // Another `detach` is at work, which does not sign the lock.
    let mut progress = Progress::of(state, vm, patience);
    loop {
        if let Some(lock) = state.lock_supervisor(vm)? {
            return Ok((lock, was));
        }
        if !progress.is_there(state, vm) {
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

/// What another process shows of its progress, by the time of the VM's lock file.
struct Progress {
    since: Instant,
    beat: Option<SystemTime>,
    beat_seen: Instant,
    silence_limit: Duration,
    patience: Patience,
    is_told: bool,
}

impl Progress {
    fn of(state: &StateDir, vm: &VmName, patience: Patience) -> Progress {
        let is_older = matches!(state.lease(vm), Ok(Some(lease)) if lease.writer.is_none());
        Progress {
            since: Instant::now(),
            beat: state.last_heartbeat(vm),
            beat_seen: Instant::now(),
            silence_limit: if is_older { patience.older_silence } else { patience.silence },
            patience,
            is_told: false,
        }
    }

    /// Whether it is worth to wait.
    fn is_there(&mut self, state: &StateDir, vm: &VmName) -> bool {
        let beat = state.last_heartbeat(vm);
        if beat != self.beat {
            self.beat = beat;
            self.beat_seen = Instant::now();
            if self.since.elapsed() > self.patience.silence
                && !std::mem::replace(&mut self.is_told, true)
            {
                tracing::info!("VM {vm}: its supervisor is restoring, and makes progress: waiting");
            }
        }
        self.beat_seen.elapsed() < self.silence_limit && self.since.elapsed() < self.patience.total
    }
}

/// Sends the signal and waits for the end, for as long as that is worth it.
fn end(
    host: Host<'_>,
    vm: &VmName,
    process: ProcessKey,
    signal: Signal,
    mut is_worth_it: impl FnMut() -> bool,
) -> Result<(), StartError> {
    let name = if signal == Signal::TERM { "SIGTERM" } else { "SIGKILL" };
    tracing::info!("VM {vm}: process {} supervises it: sending {name}", process.pid);
    let fail = |source| StartError::Watch { what: "the VM's supervisor", source };
    let Some(pidfd) = send(host.root, process, signal).map_err(fail)? else { return Ok(()) };
    while !ends_within(&pidfd, PAUSE).map_err(fail)? && is_worth_it() {}
    Ok(())
}

#[cfg(test)]
mod tests {

    use std::io;
    use std::process::{Child, Command};

    use super::*;

    use crate::discover::process_key;
    use crate::ids::Pid;
    use crate::leases::Lease;

    use crate::cgroups::CgroupTree;
    use crate::sched::Kernel;
    use crate::sysroot::SysRoot;
    use crate::systemd::SystemBus;

    /// A VM whose lease names a living process.
    fn leased() -> (tempfile::TempDir, StateDir, Lease, Child) {
        let dir = tempfile::tempdir().expect("a folder");
        let state = StateDir::at(dir.path());
        let child = Command::new("sleep").arg("60").spawn().expect("a process");
        let pid = Pid(i32::try_from(child.id()).expect("a pid"));
        let process = process_key(&SysRoot::live(), pid).expect("it lives");
        let lease = {
            let vm = "100".parse().expect("a name");
            let boot_id = boot_id(&SysRoot::live()).expect("a boot");
            Lease { supervisor: Some(process), ..Lease::new(vm, boot_id, process) }
        };
        state.write_lease(&lease).expect("written");
        (dir, state, lease, child)
    }

    #[test]
    fn who_could_not_sign_the_lock_is_ended_by_the_lease() {
        let (_dir, state, lease, mut child) = leased();
        let lock = state.lock_supervisor(&lease.vm).expect("a lock").expect("it is free");
        // The lock goes with the process that is ended.
        let ended = thread::spawn(move || {
            let ended = child.wait();
            drop(lock);
            ended
        });
        let root = SysRoot::live();
        let cgroups = CgroupTree::of(&root);
        let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
        let (_lock, was) = end_supervisor(host, &state, &lease.vm).expect("it ends");
        assert_eq!(was, Supervised::Was);
        assert!(!ended.join().expect("no panic").expect("waited").success());
    }

    /// A process that ignores SIGTERM; its lock, and what ends it.
    fn deaf() -> (tempfile::TempDir, StateDir, Lease, Child) {
        let (dir, state, lease, mut child) = leased();
        child.kill().and_then(|()| child.wait()).expect("ended");
        let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
        let mut child = Command::new("bash")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("a process");
        let mut line = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut line).expect("ready");
        let pid = Pid(i32::try_from(child.id()).expect("a pid"));
        let process = process_key(&SysRoot::live(), pid).expect("it lives");
        let lease = Lease { qemu: process, supervisor: Some(process), ..lease };
        state.write_lease(&lease).expect("written");
        (dir, state, lease, child)
    }

    #[test]
    fn supervisor_that_makes_progress_is_waited_for_and_a_silent_one_is_killed() {
        let (_dir, state, lease, mut child) = deaf();
        let lock = state.lock_supervisor(&lease.vm).expect("a lock").expect("it is free");
        let heart = lock.heart();
        // It makes progress for longer than a silent one is given.
        let patience = Patience { silence: Duration::from_millis(600), ..PATIENCE };
        let progress = 3 * patience.silence;
        let begun = Instant::now();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let beats = thread::spawn(move || {
            while begun.elapsed() < progress {
                heart.beat();
                let is_killed = stopped.recv_timeout(patience.silence / 10).is_ok();
                assert!(!is_killed, "killed after {:?}", begun.elapsed());
            }
        });
        let ended = thread::spawn(move || {
            let ended = child.wait();
            let _ = stop.send(());
            drop(lock);
            ended
        });
        let root = SysRoot::live();
        let cgroups = CgroupTree::of(&root);
        let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
        let (_lock, was) = end_within(host, &state, &lease.vm, patience).expect("it ends");
        assert_eq!(was, Supervised::Was);
        assert!(begun.elapsed() > progress, "{:?}", begun.elapsed());
        beats.join().expect("not killed while it made progress");
        assert!(!ended.join().expect("no panic").expect("waited").success());
    }

    #[test]
    fn no_process_is_taken_for_the_holder_that_cannot_be() {
        let (_dir, state, lease, mut child) = leased();
        let root = SysRoot::live();
        let cgroups = CgroupTree::of(&root);
        let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
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
