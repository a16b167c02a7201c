//! What a QEMU that never stops talking, or creating threads, costs: below 5 % of a CPU, and a thread that is new is
//! placed all the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout)] // the figures

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::fake_qemu::FakeQemu;
use crate::support::qemu::wait_until;
use crate::support::run::{Attached, POLICY, Place, masks, needs_two_cpus};
use qmpin::ids::Pid;

/// How long a flood is watched.
const WATCHED: Duration = Duration::from_secs(10);
/// What of a CPU it may cost.
const SHARE_MAX: f64 = 0.05;
/// How soon a new thread is placed; three times as much as is promised, for a busy machine.
const PLACED_WITHIN: Duration = Duration::from_secs(3);

/// The CPU time that a process has used.
fn cpu_time(pid: Pid) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // Fields 14 and 15, the first here being 3.
    let ticks: u64 = [11, 12].iter().map(|at| fields[*at].parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

/// Watches what a supervisor uses while `lie` goes on, and that a new thread is placed.
fn watch(lie: &str) {
    let place = Place::new();
    place.config("qmpin.toml", POLICY);
    let fake = FakeQemu::start(lie);
    let command = place.command(&[], fake.dir(), &["attach", "100"]);
    let mut attached = Attached::spawn(command, place.path());
    attached.wait_ready();
    fs::write(fake.dir().join("begin"), "").unwrap();
    let (since, before) = (Instant::now(), cpu_time(attached.pid()));
    let mut slowest = Duration::ZERO;
    while since.elapsed() < WATCHED {
        let known = masks(fake.pid());
        fake.bear();
        let created = Instant::now();
        wait_until("the new thread is placed", || {
            let now = masks(fake.pid());
            let new = now.iter().filter(|(tid, _)| !known.contains_key(tid));
            // Threads that come and go are seen before they are placed.
            let placed = new.filter(|(_, mask)| *mask == "0" || *mask == "1").count();
            placed > 0 && known.keys().all(|tid| now.get(tid).is_none_or(|mask| mask.len() == 1))
        });
        slowest = slowest.max(created.elapsed());
        thread::sleep(Duration::from_millis(500));
    }
    let used = cpu_time(attached.pid()).checked_sub(before).unwrap();
    let share = used.as_secs_f64() / since.elapsed().as_secs_f64();
    println!("{lie}: {:.1} % of a CPU, a new thread placed in {slowest:?} at most", share * 100.0);
    assert!(share < SHARE_MAX, "{lie}: {used:?} in {:?}", since.elapsed());
    assert!(slowest < PLACED_WITHIN, "{lie}: {slowest:?}");
    attached.end();
}

#[test]
fn events_without_end_cost_little() {
    needs_two_cpus!("events_without_end_cost_little");
    watch("own: a flood");
}

#[test]
fn noise_without_end_costs_little() {
    needs_two_cpus!("noise_without_end_costs_little");
    watch("own: noise");
}

#[test]
fn threads_without_end_cost_little() {
    needs_two_cpus!("threads_without_end_cost_little");
    watch("threads without end");
}
