//! Files in the place of state, policies and pid files that are none, or another user's: an error with path and
//! reason at once, and nothing is written elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::Path;

use crate::support::qemu::QemuOptions;
use crate::support::run::{Stage, needs_two_cpus};
use crate::support::skipped;

const NOBODY: u32 = 65534;

fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap();
}

type Make = fn(&Path);

/// Puts each thing that is no file in a place, and takes it away after `then`.
fn each_kind(path: &Path, mut then: impl FnMut(&str)) {
    let kinds: [(&str, Make); 3] = [
        ("a FIFO", fifo),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("a symbolic link", |path| symlink("/dev/zero", path).unwrap()),
    ];
    for (kind, make) in kinds {
        make(path);
        then(kind);
        if fs::remove_file(path).is_err() {
            fs::remove_dir(path).unwrap();
        }
    }
}

#[test]
fn a_policy_pid_file_or_journal_that_is_no_file_is_named_at_once() {
    needs_two_cpus!("a_policy_pid_file_or_journal_that_is_no_file_is_named_at_once");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let policy = stage.place.path().join("config/100.toml");
    each_kind(&policy, |kind| {
        for command in [&["attach", "100"][..], &["plan", "100"]] {
            stage.run(command).says(2, &[&policy.display().to_string(), kind]);
        }
    });
    let (pid_file, away) = (stage.qemu.dir().join("100.pid"), stage.qemu.dir().join("away"));
    fs::rename(&pid_file, &away).unwrap();
    each_kind(&pid_file, |kind| {
        for command in [&["attach", "100"][..], &["threads", "100"]] {
            stage.run(command).says(3, &[&pid_file.display().to_string(), kind]);
        }
    });
    fs::rename(&away, &pid_file).unwrap();
    fs::create_dir(stage.place.state()).unwrap();
    let journal = stage.place.state().join("100.journal");
    each_kind(&journal, |kind| {
        let done = stage.run(&["attach", "100", "--once"]);
        assert!(!matches!(done.code, Some(0 | 70) | None), "{done:?}");
        done.says(done.code.unwrap(), &["100.journal", kind]);
        assert_eq!(stage.masks(), before);
    });
}

#[test]
fn a_state_folder_of_another_user_is_refused_and_nothing_in_it_is_followed() {
    let test = "a_state_folder_of_another_user_is_refused_and_nothing_in_it_is_followed";
    needs_two_cpus!(test);
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let state = stage.place.state();
    fs::create_dir(&state).unwrap();
    let target = stage.place.path().join("target");
    fs::write(&target, "not qmpin's").unwrap();
    // What the other user prepares before root attaches.
    for name in ["100.lease", "100.lease.new", "100.journal", "100.lock", ".host.journal"] {
        symlink(&target, state.join(name)).unwrap();
    }
    let untouched = || {
        assert_eq!(fs::read_to_string(&target).unwrap(), "not qmpin's");
        assert_eq!(stage.masks(), before);
    };
    let refused = |words: &[&str]| {
        let done = stage.run(&["attach", "100", "--once"]);
        assert!(!matches!(done.code, Some(0 | 70) | None), "{done:?}");
        done.says(done.code.unwrap(), words);
        untouched();
    };
    refused(&["it is a symbolic link"]);
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&["other users can write it (mode 0777)"]);
    fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
    if chown(&state, Some(NOBODY), None).is_err() {
        return skipped(test, "half of it, for it is not root");
    }
    refused(&["it belongs to user 65534"]);
}

#[test]
fn too_few_descriptors_are_an_error_and_no_panic() {
    needs_two_cpus!("too_few_descriptors_are_an_error_and_no_panic");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    for limit in 5..=12 {
        let limit = format!("--nofile={limit}");
        for command in [&["attach", "100"][..], &["attach", "100", "--once"], &["threads", "100"]] {
            let done = stage.run_under(&["prlimit", &limit], command);
            assert_eq!(done.code, Some(1), "{limit}: {command:?}: {done:?}");
            assert!(done.err.contains("Too many open files"), "{done:?}");
        }
    }
    assert_eq!(stage.masks(), before);
}
