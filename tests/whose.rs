//! Whose attachment it is: nothing is ended, given back or forgotten that is somebody else's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use qmpin::ids::{Pid, VmName};
use qmpin::leases::StateDir;
use qmpin::sysroot::SysRoot;
use support::qemu::wait_until;
use support::run::{Place, finish};

/// Whether a process waits for a lock of the kernel's (`man 5 proc_locks`).
fn waits_for_a_lock(pid: u32) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let pid = pid.to_string();
    locks.lines().any(|line| line.contains("->") && line.split_whitespace().any(|word| word == pid))
}

#[test]
fn detach_dead_ends_nobody_who_has_come_alive_meanwhile() {
    let place = Place::new();
    let state = StateDir::at(place.state());
    state.create().unwrap();
    // Both were killed before they wrote anything.
    for vm in ["100", "105"] {
        fs::write(place.state().join(format!("{vm}.journal")), "").unwrap();
    }
    // VM 100 keeps it busy for as long as somebody changes leases.
    let folder = fs::File::open(place.state()).unwrap();
    let busy = Flock::lock(folder, FlockArg::LockExclusive).unwrap();
    let mut command = place.command(&[], place.path(), &["detach", "--dead"]);
    let mut detach = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it is at VM 100", || waits_for_a_lock(detach.id()));
    let vm: VmName = "105".parse().unwrap();
    let mut supervisor = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = Pid(i32::try_from(supervisor.id()).unwrap());
    let mut lock = state.lock_supervisor(&vm).unwrap().expect("nobody has it");
    lock.sign(qmpin::discover::process_key(&SysRoot::live(), pid).unwrap());
    drop(busy);
    wait_until("it has ended", || detach.try_wait().unwrap().is_some());
    let ended = supervisor.try_wait().unwrap();
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    assert_eq!(ended, None, "told to end");
    assert_eq!(detach.wait().unwrap().code(), Some(0));
    assert_eq!(place.left_behind(), ["105.journal", "105.lock"]);
    drop(lock);
    finish(&mut place.command(&[], place.path(), &["detach", "--dead"])).says(0, &[]);
    assert_eq!(place.left_behind(), [""; 0]);
}
