//! A VM with very many threads: no command needs more than 64 MiB for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout)] // the figures

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use crate::support::fake_qemu::FakeQemu;
use crate::support::qemu::wait_until;
use crate::support::run::{Attached, POLICY, Place, masks, needs_two_cpus};
use crate::support::skipped;
use qmpin::ids::Pid;

/// The number that 64 MiB are enough for. A process of this kind has fewer: `vm.max_map_count` bounds its stacks.
const THREADS: u64 = 28_500;
const THREADS_MIN: u64 = 10_000;
const PEAK_MAX_KIB: u64 = 64 << 10;
/// What a process of qmpin needs whatever the number of threads.
const BASE_KIB: u64 = 16 << 10;

/// The most memory that a process has had, in KiB.
fn peak_kib(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Runs a command to its end. Its exit code, and the most memory that was seen.
fn run(mut command: Command) -> (Option<i32>, u64) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let pid = Pid(i32::try_from(child.id()).unwrap());
    let mut peak = 0;
    let mut status = None;
    wait_until("the command has ended", || {
        peak = peak.max(peak_kib(pid).unwrap_or(0));
        status = child.try_wait().unwrap();
        status.is_some()
    });
    let status = status.unwrap();
    assert_eq!(status.signal(), None);
    (status.code(), peak)
}

#[test]
fn a_vm_with_many_threads_needs_little_memory() {
    let test = "a_vm_with_many_threads_needs_little_memory";
    needs_two_cpus!(test);
    let fake = FakeQemu::start("many threads");
    let count: u64 = fs::read_to_string(fake.dir().join("many")).unwrap().parse().unwrap();
    if count < THREADS_MIN {
        return skipped(test, "the machine does not allow so many threads");
    }
    let peak_max = BASE_KIB + (PEAK_MAX_KIB - BASE_KIB) * count / THREADS;
    let place = Place::new();
    place.config("qmpin.toml", POLICY);
    let command = |words: &[&str]| place.command(&[], fake.dir(), words);
    let mut too_much = Vec::new();
    let mut check = |what: &str, peak_kib: u64| {
        println!("{what}: {peak_kib} KiB at most for {count} threads, of {peak_max} KiB");
        if peak_kib >= peak_max {
            too_much.push(what.to_owned());
        }
    };
    let mut run_and_check = |words: &[&str], codes: &[i32]| {
        let (code, peak_kib) = run(command(words));
        check(&words.join(" "), peak_kib);
        assert!(code.is_some_and(|code| codes.contains(&code)), "{words:?}: {code:?}");
    };
    let before = masks(fake.pid());
    run_and_check(&["threads", "100"], &[0]);
    run_and_check(&["threads", "100", "--json"], &[0]);
    run_and_check(&["plan", "100"], &[0]);
    run_and_check(&["attach", "100", "--once"], &[0]);
    run_and_check(&["verify", "100"], &[0, 1]);
    run_and_check(&["status"], &[0]);
    run_and_check(&["detach", "100"], &[0]);
    assert_eq!(masks(fake.pid()), before);
    let mut attached = Attached::spawn(command(&["attach", "100"]), place.path());
    attached.wait_ready();
    let peak_kib = peak_kib(attached.pid()).unwrap();
    attached.kill();
    run_and_check(&["detach", "100"], &[0]);
    check("attach 100", peak_kib);
    assert_eq!(masks(fake.pid()), before);
    assert!(too_much.is_empty(), "more than {peak_max} KiB: {too_much:?}");
}
