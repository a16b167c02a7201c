//! What it costs to be there: wake-ups, memory; and how long `qmpin threads` takes beside `cat`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use qmpin::policy::CHECK_INTERVAL_S_DEFAULT;

use crate::figures::{Samples, Table};
use crate::vm::{Vm, await_placed, stop, vcpu_cpu};

/// So many turns of the slow timer are watched.
const TURNS: u64 = 4;
/// After the start: a first question, a try for a live channel, a second look.
const SETTLE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 60;

pub(crate) fn measure(table: &mut Table) {
    for vcpus in [16, 64] {
        let vm = Vm::with_vcpus(vcpus);
        let qmpin = vm.attach().spawn().unwrap();
        await_placed(vm.last_vcpu(), vcpu_cpu()).expect("attached");
        sleep(SETTLE);
        if vcpus == 16 {
            let before = sleeps(qmpin.id());
            sleep(Duration::from_secs(TURNS * CHECK_INTERVAL_S_DEFAULT));
            let woken = sleeps(qmpin.id()).saturating_sub(before);
            table.row(
                &format!("idle: wake-ups in {} s", TURNS * CHECK_INTERVAL_S_DEFAULT),
                &woken.to_string(),
                &format!("{TURNS} turns of the slow timer"),
                &format!("{} more", woken.saturating_sub(TURNS)),
                "0 more",
            );
        }
        let peak_kib = status(&format!("/proc/{}/status", qmpin.id()))["VmHWM"];
        let peak = format!("{:.1} MiB", peak_kib as f64 / 1024.0);
        table.row(&format!("peak memory of attach, {vcpus} vCPUs"), &peak, "", &peak, "< 8 MiB");
        stop(qmpin);
    }
}

/// How often the process has gone to sleep, all its threads together.
fn sleeps(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let path = task.unwrap().path().join("status");
            status(&path.display().to_string())["voluntary_ctxt_switches"]
        })
        .sum()
}

fn status(path: &str) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(path).unwrap();
    let number = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(number).collect()
}

pub(crate) fn measure_threads(table: &mut Table) {
    let vm = Vm::with_vcpus(16);
    let files = files_of_threads(&vm);
    let (mut ours, mut cat) = (Samples::default(), Samples::default());
    for _ in 0..ROUNDS {
        ours.add(to_end(&mut vm.qmpin("threads")));
        let mut program = Command::new("cat");
        program.args(&files).stdin(Stdio::null()).stdout(Stdio::null());
        cat.add(to_end(&mut program));
    }
    let what =
        format!("threads, 16 vCPUs; cat of the {} files of /proc that it reads", files.len());
    table.at_most(&what, &ours, &cat, "< 3 x");
}

fn to_end(program: &mut Command) -> Duration {
    let start = Instant::now();
    assert!(program.status().unwrap().success());
    start.elapsed()
}

/// A line for each thread of the VM, and for each kernel thread, among which its helpers are found.
fn files_of_threads(vm: &Vm) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    let pid = vm.qemu.pid();
    files.extend(
        vm.qemu.threads().keys().map(|tid| PathBuf::from(format!("/proc/{pid}/task/{tid}/stat"))),
    );
    let children = fs::read_to_string("/proc/2/task/2/children").unwrap_or_default();
    files.extend(children.split_whitespace().map(|pid| PathBuf::from(format!("/proc/{pid}/stat"))));
    // Kernel threads come and go; `cat` is not to fail by one that has gone.
    files
        .retain(|path| fs::read(path).is_ok_and(|text| !text.windows(8).any(|w| w == b"kworker/")));
    files
}
