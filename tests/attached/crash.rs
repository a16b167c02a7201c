//! SIGKILL before every write, and every write refused: `detach` restores everything all the same.
//! System calls are met by `strace`'s injection, one more of them in each run, until a run comes through
//! unharmed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;

use crate::support::qemu::{Accel, QemuOptions, has_kvm, wait_until};
use crate::support::run::{Attached, Done, Stage, needs_strace, taskset};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;
use qmpin::ids::Tid;
use serde_json::{Value, json};

/// No command makes more calls of one kind than this.
const CALLS_MAX: usize = 2000;

/// A VM whose threads differ.
fn stage() -> (Stage, BTreeMap<Tid, String>) {
    // KVM has a kernel thread beside the process.
    let accel = if has_kvm() { Accel::Kvm } else { Accel::Tcg };
    let stage = Stage::new(&QemuOptions { accel, iothreads: 1, ..QemuOptions::default() });
    taskset(stage.vcpu(0), &[0]);
    taskset(stage.iothread("iothread-virtioscsi0"), &[1]);
    let before = stage.masks();
    (stage, before)
}

/// Runs the command with the n-th call of its kind met. `None`: it made fewer calls than that.
fn met(stage: &Stage, args: &[&str], call: &str, with: &str, n: usize) -> Option<Done> {
    let log = stage.place.path().join("strace");
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:{with}:when={n}"));
    let log_name = log.to_str().unwrap();
    let strace = ["strace", "-f", "-qq", "-o", log_name, "-e", &trace, "-e", &inject];
    let done = stage.run_under(&strace, args);
    let log = fs::read_to_string(&log).unwrap();
    let was_met = log.contains("(INJECTED)") || log.contains("killed by SIGKILL");
    was_met.then_some(done)
}

/// Does this for the first call of the kind, the second, and so on; the number of runs.
fn for_every_call(
    stage: &Stage,
    args: &[&str],
    call: &str,
    with: &str,
    mut then: impl FnMut(usize, Option<&Done>),
) -> usize {
    for n in 1..CALLS_MAX {
        let done = met(stage, args, call, with, n);
        then(n, done.as_ref());
        if done.is_none() {
            return n - 1;
        }
    }
    panic!("more than {CALLS_MAX} calls of {call}");
}

const CALLS_THAT_CHANGE: [&str; 9] = [
    "write",
    "fdatasync",
    "fsync",
    "sched_setaffinity",
    "sched_getaffinity",
    "renameat",
    "unlink",
    "unlinkat",
    "flock",
];

#[test]
fn attach_killed_anywhere_is_undone() {
    needs_strace!("attach_killed_anywhere_is_undone");
    let (stage, before) = stage();
    let mut kills = BTreeMap::new();
    for call in CALLS_THAT_CHANGE {
        let met = for_every_call(
            &stage,
            &["attach", "100", "--once"],
            call,
            "signal=SIGKILL",
            |n, done| {
                if let Some(done) = done {
                    assert_eq!(done.code, None, "{call} {n}: killed");
                }
                stage.run(&["detach", "100"]).says(0, &[]);
                assert_eq!(stage.masks(), before, "{call} {n}");
                assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
            },
        );
        kills.insert(call, met);
    }
    // Not in vain: these are made once per thread at least.
    assert!(kills["sched_setaffinity"] >= 5, "{kills:?}");
    for call in ["write", "fdatasync", "renameat"] {
        assert!(kills[call] >= 1, "{kills:?}");
    }
}

#[test]
fn a_killed_attach_can_be_attached_again() {
    needs_strace!("a_killed_attach_can_be_attached_again");
    let (stage, before) = stage();
    for call in ["write", "fdatasync", "sched_setaffinity", "rename"] {
        let args = ["attach", "100", "--once"];
        for_every_call(&stage, &args, call, "signal=SIGKILL", |n, _| {
            stage.run(&args).says(0, &["0 refused"]);
            assert_eq!(stage.mask(stage.vcpu(0)), "1", "{call} {n}");
            stage.run(&["detach", "100"]).says(0, &["restored"]);
            assert_eq!(stage.masks(), before, "{call} {n}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
        });
    }
}

/// The life of a supervisor: a hotplug, a drift, the end. Whether it came through.
fn life(stage: &Stage, n: usize, call: &str) -> bool {
    let inject = format!("inject={call}:signal=SIGKILL:when={n}");
    let before = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &inject];
    let args = ["attach", "100", "--iothreads", "0-1"];
    let command = stage.place.command(&before, stage.qemu.dir(), &args);
    let mut attached = Attached::spawn(command, stage.place.path());
    if !attached.gets_ready() {
        return false;
    }
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let (iothread, vcpu) = (stage.iothread("io-hot"), stage.vcpu(0));
    if !attached.lives_until(|| stage.mask(iothread) == "0-1") {
        return false;
    }
    taskset(vcpu, &[0, 1]);
    if !attached.lives_until(|| stage.mask(vcpu) == "1") {
        return false;
    }
    // What was started is strace; whom it traces has signed the lock.
    let signed = fs::read_to_string(stage.place.state().join("100.lock")).unwrap();
    let signed: Value = serde_json::from_str(&signed).unwrap();
    let supervisor = i32::try_from(signed["pid"].as_i64().unwrap()).unwrap();
    kill(NixPid::from_raw(supervisor), Signal::SIGTERM).unwrap();
    attached.wait() == Some(0)
}

#[test]
fn a_supervisor_killed_anywhere_is_undone() {
    needs_strace!("a_supervisor_killed_anywhere_is_undone");
    let (stage, before) = stage();
    let stage = stage.with_policy("check_interval_s = 1\n");
    let main = before[&stage.main_thread()].clone();
    for call in ["fdatasync", "sched_setaffinity", "unlink"] {
        for n in 1..CALLS_MAX {
            let came_through = life(&stage, n, call);
            stage.run(&["detach", "100"]).says(0, &[]);
            let mut now = stage.masks();
            now.retain(|tid, mask| before.contains_key(tid) || *mask != main);
            let mut wanted = before.clone();
            if now.get(&stage.vcpu(0)).is_some_and(|mask| mask == "0-1") {
                // Killed before it mended another program's word: that stands.
                wanted.insert(stage.vcpu(0), "0-1".to_owned());
                taskset(stage.vcpu(0), &[0]);
            }
            assert_eq!(now, wanted, "{call} {n}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
            stage.qemu.client().ask("object-del", &json!({"id": "io-hot"}));
            if came_through {
                assert!(n > 2, "{call}");
                break;
            }
        }
    }
}

#[test]
fn detach_killed_anywhere_is_finished_by_the_next() {
    needs_strace!("detach_killed_anywhere_is_finished_by_the_next");
    let (stage, before) = stage();
    for call in ["write", "sched_setaffinity", "sched_getaffinity", "unlink", "flock"] {
        stage.run(&["attach", "100", "--once"]).says(0, &[]);
        for_every_call(&stage, &["detach", "100"], call, "signal=SIGKILL", |n, _| {
            stage.run(&["detach", "100"]).says(0, &[]);
            assert_eq!(stage.masks(), before, "{call} {n}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
            stage.run(&["attach", "100", "--once"]).says(0, &[]);
        });
        stage.run(&["detach", "100"]).says(0, &[]);
    }
}

#[test]
fn attach_refused_a_write_says_which_and_can_be_undone() {
    needs_strace!("attach_refused_a_write_says_which_and_can_be_undone");
    let (stage, before) = stage();
    let folder = stage.place.state().display().to_string();
    let errors = [
        ("write", "ENOSPC", "No space left"),
        ("fdatasync", "EIO", "Input/output error"),
        ("rename", "ENOSPC", "No space left"),
        ("rename", "EROFS", "Read-only file system"),
    ];
    for (call, error, text) in errors {
        let with = format!("error={error}");
        let args = ["attach", "100", "--once"];
        for_every_call(&stage, &args, call, &with, |n, done| {
            let why = format!("{call} {error} {n}: {done:?}");
            match done.map(|done| (done, done.code)) {
                // What was refused was not needed.
                None | Some((_, Some(0))) => assert_eq!(stage.mask(stage.vcpu(0)), "1", "{why}"),
                Some((done, Some(6))) if done.err.contains("standard output") => {}
                // Partly applied: a kernel thread of the VM came to light in the second look.
                Some((done, Some(6))) if done.err.contains("check all threads again") => {
                    assert!(done.err.contains(&folder) && done.err.contains(text), "{why}");
                    assert_eq!(stage.mask(stage.vcpu(0)), "1", "{why}");
                }
                // The runtime's own eventfd, which is never full but here.
                Some((done, Some(70))) if done.err.contains("failed to wake I/O driver") => {}
                Some((done, code)) => {
                    assert_eq!(code, Some(6), "{why}");
                    assert!(done.err.contains(&folder) && done.err.contains(text), "{why}");
                    assert_eq!(stage.masks(), before, "{why}");
                    assert_eq!(stage.place.left_behind(), [""; 0], "{why}");
                }
            }
            stage.run(&["detach", "100"]).says(0, &[]);
            stage.assert_untouched(&before);
        });
    }
}

#[test]
fn a_supervisor_whose_journal_is_full_moves_nothing_more_and_says_so_once() {
    let test = "a_supervisor_whose_journal_is_full_moves_nothing_more_and_says_so_once";
    needs_strace!(test);
    // Without iothreads, so that theirs is a mask that was not written before.
    let stage = Stage::new(&QemuOptions::default()).with_policy("check_interval_s = 1\n");
    let before = stage.masks();
    for n in 1..CALLS_MAX {
        let inject = format!("inject=fdatasync:error=ENOSPC:when={n}+");
        let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &inject];
        let args = ["attach", "100", "--iothreads", "0-1"];
        let command = stage.place.command(&strace, stage.qemu.dir(), &args);
        let mut attached = Attached::spawn(command, stage.place.path());
        if !attached.gets_ready() {
            assert_eq!(attached.wait(), Some(6), "{}", attached.err());
            stage.assert_untouched(&before);
            continue;
        }
        stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
        let iothread = stage.iothread("io-hot");
        let words = "warn: could not write the journal";
        wait_until("it is said", || attached.lines_with(words) > 0);
        for _ in 0..3 {
            attached.wait_told("WATCHDOG=1");
            attached.notified.clear();
        }
        assert_eq!(attached.lines_with(words), 1, "{}", attached.err());
        assert_ne!(stage.mask(iothread), "0-1", "moved without an undo");
        stage.run(&["detach", "100"]).says(0, &["its supervisor has restored everything"]);
        attached.wait();
        let mut wanted = before;
        wanted.insert(iothread, wanted[&stage.main_thread()].clone());
        return stage.assert_untouched(&wanted);
    }
}

#[test]
fn a_mask_the_kernel_refuses_is_named_and_the_rest_goes_on() {
    needs_strace!("a_mask_the_kernel_refuses_is_named_and_the_rest_goes_on");
    let (stage, before) = stage();
    let args = ["attach", "100", "--once"];
    for (error, text) in [("EPERM", "not permitted"), ("EINVAL", "Invalid argument")] {
        let with = format!("error={error}");
        let met = for_every_call(&stage, &args, "sched_setaffinity", &with, |n, done| {
            if let Some(done) = done {
                // A refused thread is tried once more in a second pass; then it is where it should be, and the log
                // alone names the refusal. One that came to light in the second pass is refused for good.
                let is_whole = done.code == Some(0);
                done.says(if is_whole { 0 } else { 6 }, &["was refused: ", text, "→"]);
                let said = if is_whole { &done.err } else { &done.out };
                let named = stage.masks().keys().any(|tid| said.contains(&tid.to_string()));
                assert!(named, "{error} {n}: {done:?}");
            }
            stage.run(&["detach", "100"]).says(0, &[]);
            stage.assert_untouched(&before);
        });
        assert!(met >= 4, "{met}");
        // And restored: what is refused is named, and nothing is forgotten.
        stage.run(&args).says(0, &[]);
        for_every_call(&stage, &["detach", "100"], "sched_setaffinity", &with, |_, done| {
            if let Some(done) = done {
                done.says(6, &["could not be restored to", text]);
                assert_eq!(
                    stage.place.left_behind(),
                    [".host.lock", ".leases.lock", "100.journal", "100.lease", "100.standing"]
                );
                stage.run(&["detach", "100"]).says(0, &["1 threads restored"]);
            }
            stage.assert_untouched(&before);
            stage.run(&args).says(0, &[]);
        });
        stage.run(&["detach", "100"]).says(0, &[]);
    }
}

#[test]
fn not_permitted_to_move_anything_is_no_attachment() {
    needs_strace!("not_permitted_to_move_anything_is_no_attachment");
    let (stage, before) = stage();
    for args in [&["attach", "100", "--once"][..], &["attach", "100"][..]] {
        let inject = "inject=sched_setaffinity:error=EPERM";
        let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject];
        let done = stage.run_under(&strace, args);
        done.says(
            4,
            &["not permitted to move", "not permitted (os error 1)", "hint: run it as root"],
        );
        stage.assert_untouched(&before);
    }
}

#[test]
fn unreadable_place_is_kept() {
    needs_strace!("unreadable_place_is_kept");
    let (stage, before) = stage();
    for (call, with) in
        [("openat", "error=EMFILE"), ("read", "error=EIO"), ("sched_getaffinity", "error=EPERM")]
    {
        stage.run(&["attach", "100", "--once"]).says(0, &[]);
        for_every_call(&stage, &["detach", "100"], call, with, |n, done| {
            let Some(done) = done else { return };
            if done.code == Some(0) {
                assert_eq!(stage.masks(), before, "{call} {n}: {done:?}");
            }
            stage.run(&["detach", "100"]).says(0, &[]);
            assert_eq!(stage.masks(), before, "{call} {n}: {done:?}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}: {done:?}");
            stage.run(&["attach", "100", "--once"]).says(0, &[]);
        });
        stage.run(&["detach", "100"]).says(0, &[]);
    }
}

#[test]
fn what_attach_cannot_read_ends_it_or_does_not_matter() {
    needs_strace!("what_attach_cannot_read_ends_it_or_does_not_matter");
    let (stage, before) = stage();
    for (call, with) in [("openat", "error=EMFILE"), ("sched_getaffinity", "error=EPERM")] {
        for_every_call(&stage, &["attach", "100", "--once"], call, with, |n, done| {
            if done.is_some_and(|done| !matches!(done.code, Some(0 | 6))) {
                let why = format!("{call} {n}: {done:?}");
                assert_eq!(stage.masks(), before, "{why}");
                assert!(done.is_some_and(|done| done.err.contains("error")), "{why}");
            }
            stage.run(&["detach", "100"]).says(0, &[]);
            assert_eq!(stage.masks(), before, "{call} {n}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
        });
    }
}

#[test]
fn refusals_are_listed_once_and_threads_counted_once() {
    needs_strace!("refusals_are_listed_once_and_threads_counted_once");
    let (stage, before) = stage();
    let log = stage.place.path().join("strace");
    let log = log.to_str().unwrap();
    let strace = |inject: &[&str], args: &[&str]| {
        let mut words = vec!["strace", "-f", "-qq", "-o", log];
        for inject in inject {
            words.extend(["-e", inject]);
        }
        stage.run_under(&words, args)
    };
    let done = strace(&["inject=sched_setaffinity:error=EINVAL"], &["attach", "100", "--once"]);
    let mut refused: Vec<&str> =
        done.out.lines().filter(|line| line.trim_start().starts_with("refused: ")).collect();
    let listed = refused.len();
    assert!(listed >= 5, "{done:?}");
    done.says(6, &["0 threads moved", &format!("{listed} refused")]);
    refused.sort_unstable();
    refused.dedup();
    assert_eq!(refused.len(), listed, "{done:?}");
    stage.run(&["detach", "100"]).says(0, &["0 threads restored"]);
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    let changed = stage.masks().iter().filter(|(tid, mask)| before[tid] != **mask).count();
    stage.run(&["detach", "100"]).says(0, &[&format!("{changed} threads restored")]);
    assert_eq!(stage.masks(), before);
}

#[test]
fn an_undo_that_is_refused_after_a_failed_attach_is_reported() {
    needs_strace!("an_undo_that_is_refused_after_a_failed_attach_is_reported");
    let (stage, before) = stage();
    // No thread may be moved, and from some call on none may be looked at: also not when all is restored.
    for from in 1..CALLS_MAX {
        let looked = format!("inject=sched_getaffinity:error=EPERM:when={from}+");
        let strace = [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "inject=sched_setaffinity:error=EPERM",
        ];
        let strace = [&strace[..], &["-e", &looked]].concat();
        let done = stage.run_under(&strace, &["attach", "100", "--once"]);
        assert_ne!(done.code, Some(0), "{done:?}");
        assert_eq!(stage.masks(), before, "{from}");
        let is_reported = done.err.contains("not all is restored");
        stage.run(&["detach", "100"]).says(0, &[]);
        if is_reported {
            done.says(6, &["could not be restored", "hint: nothing was forgotten"]);
            return;
        }
        assert!(done.code != Some(4) || from < 100, "none is reported: {done:?}");
    }
}
