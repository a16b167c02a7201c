//! What other processes that hold a lock can do to a command: delay it, within limits, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use crate::support::clean;
use crate::support::qemu::{QemuOptions, clients_of, wait_until};
use crate::support::run::{Reaped, Stage, needs_two_cpus};
use crate::support::skipped;
use qmpin::leases::StateDir;

/// A process of user 65534 that has locked a folder; ended with the test.
fn squatter_on(folder: &Path) -> Option<Reaped> {
    let child = clean::command("setpriv")
        .args(["--reuid=65534", "--clear-groups", "flock", "--no-fork"])
        .arg(folder)
        .args(["sleep", "600"])
        .spawn()
        .ok()?;
    let inode = format!(":{} ", fs::metadata(folder).unwrap().ino());
    wait_until("the folder is locked", || {
        fs::read_to_string("/proc/locks").unwrap().contains(&inode)
    });
    Some(Reaped(child))
}

/// A VM whose state folder is there, and can be read by every user, as /run/qmpin is.
fn stage() -> (Stage, StateDir) {
    let stage = Stage::new(&QemuOptions { iothreads: 1, ..QemuOptions::default() });
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(stage.place.path(), mode).unwrap();
    let state = StateDir::at(stage.place.state());
    state.create().unwrap();
    (stage, state)
}

#[test]
fn lock_of_an_unprivileged_user_on_the_folder_delays_no_command() {
    let test = "lock_of_an_unprivileged_user_on_the_folder_delays_no_command";
    needs_two_cpus!(test);
    let (stage, state) = stage();
    let before = stage.masks();
    let Some(_squatter) = squatter_on(state.path()) else {
        return skipped(test, "there is no setpriv, or no flock");
    };
    // Each ends within the limit of `run`; 0.1.0 waited for as long as the lock was held.
    stage.run(&["attach", "100", "--once"]).says(0, &["vCPUs on 1"]);
    stage.run(&["status"]).says(0, &["100"]);
    stage.run(&["verify", "100"]).says(0, &[]);
    let attached = stage.attach(&[]);
    stage.run(&["detach", "100"]).says(0, &[]);
    attached.end_of(0);
    stage.assert_untouched(&before);
}

#[test]
fn monitor_is_free_and_the_watchdog_is_fed_while_a_lock_is_waited_for() {
    needs_two_cpus!("monitor_is_free_and_the_watchdog_is_fed_while_a_lock_is_waited_for");
    let (stage, state) = stage();
    let before = stage.masks();
    let held = state.lock_host().unwrap();
    let leases = state.lock_leases().unwrap();
    let mut attached = stage.attach_unready(&[]);
    let monitor = stage.qemu.paths().shared;
    let supervised = || stage.place.left_behind().contains(&"100.lock".to_owned());
    wait_until("QEMU was asked", || supervised() && clients_of(&monitor) == 0);
    for _ in 0..3 {
        attached.wait_told("WATCHDOG=1");
        attached.notified.clear();
        assert_eq!(clients_of(&monitor), 0, "the monitor is held");
        stage.run(&["status"]).says(0, &[]);
    }
    assert_eq!(stage.masks(), before, "pinned without a lease");
    drop((held, leases));
    attached.wait_ready();
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn lock_that_is_never_released_is_named_with_its_holder() {
    needs_two_cpus!("lock_that_is_never_released_is_named_with_its_holder");
    let (stage, state) = stage();
    let before = stage.masks();
    let held = state.lock_host().unwrap();
    let holder = format!("is still locked after 10 s by process {}", std::process::id());
    let done = stage.run(&["attach", "100"]);
    done.says(1, &[".host.lock", &holder, "hint: nothing was changed"]);
    assert_eq!(stage.masks(), before);
    drop(held);
    stage.run(&["attach", "100", "--once"]).says(0, &[]);
    // Restoring does not wait for the host: the VM's threads come first, and the rest is named.
    let held = state.lock_host().unwrap();
    stage.run(&["detach", "100"]).says(1, &[".host.lock", &holder]);
    assert_eq!(stage.masks(), before);
    drop(held);
    stage.run(&["detach", "100"]).says(0, &[]);
    stage.assert_untouched(&before);
}
