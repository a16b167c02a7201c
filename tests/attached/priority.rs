//! `sched = "fifo:1"` on a real QEMU: only vCPU threads have it, and all is as before in the
//! end, wherever qmpin is killed and whatever the kernel refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;

use crate::support::qemu::{QemuOptions, wait_until};
use crate::support::run::{Stage, can, needs_strace};
use crate::support::skipped;
use qmpin::ids::Tid;
use qmpin::sched::{Kernel, Sched as _};
use qmpin::scheduling::OnFork;
use serde_json::{Value, json};

const POLICY: &str = "sched = \"fifo:1\"\ncheck_interval_s = 1\n";
/// No command changes more threads than this.
const CALLS_MAX: usize = 100;

/// Returns from a test where this machine gives no real-time priority, or `strace` may not trace.
macro_rules! needs {
    ($test:expr) => {
        needs_strace!($test);
        if !can(&["chrt", "-f", "1", "true"]) {
            return skipped($test, "no real-time priority is to be had");
        }
    };
}

fn stage() -> Stage {
    Stage::new(&QemuOptions { iothreads: 1, vcpus_max: 2, ..QemuOptions::default() })
        .with_policy(POLICY)
}

/// Policy, priority and nice value by the kernel's own file (`man 5 proc_pid_stat`, 41, 40 and 19).
fn scheduled(stage: &Stage, tid: Tid) -> Option<(i32, i32, i32)> {
    let pid = stage.qemu.pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let field = |number: usize| fields[number - 3].parse().unwrap();
    Some((field(41), field(40), field(19)))
}

/// Policy, real-time priority and nice value, which QEMU has from these tests.
fn other() -> (i32, i32, i32) {
    (0, 0, own_nice())
}

fn fifo() -> (i32, i32, i32) {
    (1, 1, own_nice())
}

fn own_nice() -> i32 {
    let stat = fs::read_to_string("/proc/self/stat").expect("there");
    let fields = stat.rsplit(')').next().expect("fields");
    fields.split_whitespace().nth(19 - 3).expect("a nice value").parse().expect("a number")
}

/// How every thread of the VM is scheduled.
fn all(stage: &Stage) -> BTreeMap<Tid, (i32, i32, i32)> {
    let threads = stage.qemu.threads();
    threads.keys().filter_map(|tid| Some((*tid, scheduled(stage, *tid)?))).collect()
}

fn chrt(args: &[&str], tid: Tid) {
    assert!(can(&[&["chrt"], args, &[&tid.to_string()]].concat()));
}

fn hot_add(stage: &Stage) {
    let place = json!({"driver": "qemu64-x86_64-cpu", "id": "cpu2", "socket-id": 0, "core-id": 1,
        "thread-id": 0});
    stage.qemu.client().must("device_add", &place);
}

#[test]
fn only_vcpus_have_the_priority_and_lose_it_when_detached() {
    needs!("only_vcpus_have_the_priority_and_lose_it_when_detached");
    let stage = stage();
    // A nice value of one's own is kept all the while.
    let (vcpu, iothread) = (stage.vcpu(0), stage.iothread("iothread-virtioscsi0"));
    assert!(can(&["renice", "-n", "5", "-p", &vcpu.to_string()]));
    // And so is another program's own priority for an iothread.
    chrt(&["-f", "-p", "1"], iothread);
    let before = all(&stage);
    stage.run(&["plan", "100", "--explain"]).says(0, &["sched", "1 vCPU runs as fifo:1"]);
    let mut attached = stage.attach(&[]);
    let mut wanted = before.clone();
    wanted.insert(vcpu, (1, 1, 5));
    assert_eq!(all(&stage), wanted, "{}", attached.err());
    assert_eq!(Kernel.scheduling(vcpu).unwrap().on_fork, OnFork::Reset);
    stage.run(&["verify", "100"]).says(0, &["1 vCPU is fifo:1"]);
    let status = stage.run(&["status", "--json"]);
    let status: Value = serde_json::from_str(&status.says(0, &[]).out).unwrap();
    assert_eq!(status["vms"][0]["sched"], "fifo:1");
    // An external change is corrected, and counted.
    chrt(&["-o", "-p", "0"], vcpu);
    wait_until("it is fifo again", || scheduled(&stage, vcpu) == Some((1, 1, 5)));
    attached.wait_told("drift 1");
    attached.end();
    assert_eq!(all(&stage), before);
    assert_eq!(Kernel.scheduling(vcpu).unwrap().on_fork, OnFork::Inherit);
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn a_plugged_vcpu_gets_it_only_where_it_has_a_cpu_to_itself() {
    needs!("a_plugged_vcpu_gets_it_only_where_it_has_a_cpu_to_itself");
    let stage = stage();
    let before = all(&stage);
    let attached = stage.attach(&[]);
    // There is one CPU for vCPUs: the second goes to the host's.
    hot_add(&stage);
    let added = stage.vcpu(1);
    wait_until("it is in its place", || stage.mask(added) == "0");
    let words = "1 vCPU has not: no CPU that the VM's other threads leave to it";
    wait_until("it is said", || attached.lines_with(words) == 1);
    assert_eq!(scheduled(&stage, added), Some(other()));
    assert_eq!(scheduled(&stage, stage.vcpu(0)), Some(fifo()));
    attached.end();
    let mut after = all(&stage);
    after.remove(&added);
    assert_eq!(after, before);
}

#[test]
fn external_priority_is_kept_and_named() {
    needs!("external_priority_is_kept_and_named");
    let stage = stage();
    let vcpu = stage.vcpu(0);
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    assert_eq!(scheduled(&stage, vcpu), Some(fifo()));
    chrt(&["-r", "-p", "7"], vcpu);
    let said = format!("thread {vcpu} was changed externally to rr:7 and is left as it is");
    stage.run(&["verify", "100"]).says(1, &["vCPU 0 is rr:7 and not fifo:1"]);
    stage.run(&["detach", "100"]).says(0, &[&said, "before qmpin: other"]);
    assert_eq!(scheduled(&stage, vcpu), Some((2, 7, own_nice())));
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn a_policy_that_no_longer_asks_for_it_takes_it_back() {
    needs!("a_policy_that_no_longer_asks_for_it_takes_it_back");
    let stage = stage();
    let before = all(&stage);
    let attached = stage.attach(&[]);
    assert_eq!(scheduled(&stage, stage.vcpu(0)), Some(fifo()));
    attached.kill();
    let stage = stage.with_policy("sched = \"other\"\n");
    let attached = stage.attach(&[]);
    assert_eq!(all(&stage), before);
    attached.end();
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn killed_or_refused_anywhere_it_is_undone() {
    needs!("killed_or_refused_anywhere_it_is_undone");
    let stage = stage();
    let before = all(&stage);
    let once = ["attach", "100", "--once"];
    let met = |args: &[&str], call: &str, with: &str, n: usize| {
        let log = stage.place.path().join("strace");
        let log = log.to_str().unwrap();
        let inject = format!("inject={call}:{with}:when={n}");
        let trace = format!("trace={call}");
        let strace = ["strace", "-f", "-qq", "-o", log, "-e", &trace, "-e", &inject];
        let done = stage.run_under(&strace, args);
        let log = fs::read_to_string(log).unwrap();
        let was_met = log.contains("(INJECTED)") || log.contains("killed by SIGKILL");
        was_met.then_some(done)
    };
    for call in ["sched_setscheduler", "sched_getscheduler", "fdatasync"] {
        let mut n = 1;
        while met(&once, call, "signal=SIGKILL", n).is_some() {
            stage.run(&["detach", "100"]).says(0, &[]);
            assert_eq!(all(&stage), before, "{call} {n}");
            assert_eq!(stage.place.left_behind(), [""; 0], "{call} {n}");
            n += 1;
            assert!(n < CALLS_MAX, "{call}");
        }
        assert!(n > 1, "{call} is not called");
        // That one came through.
        assert_eq!(scheduled(&stage, stage.vcpu(0)), Some(fifo()));
        let mut n = 1;
        while met(&["detach", "100"], call, "signal=SIGKILL", n).is_some() {
            stage.run(&["detach", "100"]).says(0, &[]);
            assert_eq!(all(&stage), before, "{call} {n}");
            stage.run(&once).says(0, &[]);
            n += 1;
            assert!(n < CALLS_MAX, "{call}");
        }
        assert_eq!(all(&stage), before, "{call}");
    }
    let refused = met(&once, "sched_setscheduler", "error=EPERM", 1).expect("met");
    refused.says(6, &["refused: vCPU 0", "other → fifo:1 was refused", "not permitted"]);
    stage.run(&["detach", "100"]).says(0, &[]);
    assert_eq!(all(&stage), before);
    // And on the way back: nothing is forgotten.
    stage.run(&once).says(0, &[]);
    let refused = met(&["detach", "100"], "sched_setscheduler", "error=EPERM", 1).expect("met");
    refused.says(6, &["could not be restored to other", "not permitted"]);
    assert_eq!(scheduled(&stage, stage.vcpu(0)), Some(fifo()));
    stage.run(&["detach", "100"]).says(0, &["1 thread scheduled as before"]);
    assert_eq!(all(&stage), before);
    assert_eq!(stage.place.left_behind(), [""; 0]);
}
