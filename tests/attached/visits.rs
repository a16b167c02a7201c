//! How long a visit holds Proxmox's monitor: as long as QEMU takes to answer, whoever holds qmpin's locks meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use crate::support::clean;
use crate::support::qemu::{QemuOptions, clients_of, wait_until};
use crate::support::run::{Stage, needs_strace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;
use qmpin::ids::Pid;
use qmpin::leases::StateDir;

/// What a visit may take beyond QEMU's own answers, under strace. Without it, it takes less than a millisecond.
const OWN_MAX: Duration = Duration::from_millis(50);
/// A busy machine keeps any process waiting now and then; what qmpin does by itself is there each time.
const TRIES: usize = 5;

/// The calls that a visit is made of, and what QEMU answers with.
const OURS: &str = "trace=connect,sendto,close";
const QEMUS: &str = "trace=sendmsg";

/// One call of a log: when it was made, its name, what is between its brackets, and what it returned.
fn call(line: &str) -> Option<(Duration, &str, &str, &str)> {
    let at = line.split_whitespace().nth(1)?.parse().ok()?;
    let (name, rest) = line.split_once('(')?;
    let (between, returned) = rest.rsplit_once(" = ").unwrap_or((rest, ""));
    Some((Duration::from_secs_f64(at), name.rsplit(' ').next()?, between, returned))
}

/// A visit that is under way.
#[derive(Default)]
struct Visit<'a> {
    descriptor: &'a str,
    own: Duration,
    /// When QEMU has answered or greeted, where it has not been asked since.
    answered: Option<Duration>,
}

/// For each visit in the log of qmpin's calls: from each word of QEMU's to the next question or to the end.
fn own_parts(ours: &str, qemus: &str, monitor: &Path) -> Vec<Duration> {
    let path = format!("sun_path=\"{}\"", monitor.display());
    let mut calls: Vec<_> = ours.lines().chain(qemus.lines()).filter_map(call).collect();
    calls.sort_by_key(|(at, ..)| *at);
    let mut parts = Vec::new();
    let mut open: Option<Visit<'_>> = None;
    for (at, name, between, returned) in calls {
        let descriptor = between.split([',', ')']).next().unwrap_or_default();
        if name == "connect" && between.contains(&path) && returned == "0" {
            open = Some(Visit { descriptor, ..Visit::default() });
        }
        let Some(visit) = &mut open else { continue };
        let is_ours = visit.descriptor == descriptor;
        match name {
            "sendmsg" => visit.answered = Some(at),
            "sendto" | "close" if is_ours => {
                visit.own +=
                    visit.answered.take().map_or(Duration::ZERO, |since| at.saturating_sub(since));
                if name == "close" {
                    parts.push(visit.own);
                    open = None;
                }
            }
            _ => {}
        }
    }
    parts
}

/// strace beside a QEMU; it lets go at the end of the test.
struct Traced(Child);

impl Traced {
    fn of(qemu: Pid, log: &str) -> Traced {
        let pid = qemu.to_string();
        let strace = ["-f", "-ttt", "-qq", "-o", log, "-e", QEMUS, "-p", &pid];
        let child = clean::command("strace").args(strace).stderr(Stdio::null()).spawn().unwrap();
        let tracer = format!("TracerPid:\t{}\n", child.id());
        wait_until("strace to have QEMU's threads", || {
            fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|thread| {
                let status = fs::read_to_string(thread.unwrap().path().join("status"));
                status.is_ok_and(|status| status.contains(&tracer))
            })
        });
        Traced(child)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = kill(NixPid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[test]
fn monitor_is_let_go_as_soon_as_qemu_has_answered_whoever_holds_a_lock() {
    needs_strace!("monitor_is_let_go_as_soon_as_qemu_has_answered_whoever_holds_a_lock");
    let stage = Stage::new(&QemuOptions { iothreads: 1, ..QemuOptions::default() });
    let state = StateDir::at(stage.place.state());
    state.create().unwrap();
    let logs = ["ours", "qemus"].map(|name| stage.place.path().join(name));
    let [ours, qemus] = logs.each_ref().map(|log| log.to_str().unwrap());
    let strace = ["strace", "-f", "-ttt", "-qq", "-o", ours, "-e", OURS];
    let monitor = stage.qemu.paths().shared;
    let is_supervised = || stage.place.left_behind().contains(&"100.lock".to_owned());
    let mut shortest = Duration::MAX;
    for _ in 0..TRIES {
        assert!(!is_supervised(), "the locks would be given up too soon");
        let locks = (state.lock_host().unwrap(), state.lock_leases().unwrap());
        let traced = Traced::of(stage.qemu.pid(), qemus);
        thread::scope(|scope| {
            scope.spawn(|| {
                wait_until("QEMU was asked", || is_supervised() && clients_of(&monitor) == 0);
                drop(locks);
            });
            stage.run_under(&strace, &["attach", "100", "--once"]).says(0, &["vCPUs on 1"]);
        });
        drop(traced);
        let [ours, qemus] = logs.each_ref().map(|log| fs::read_to_string(log).unwrap());
        let longest = own_parts(&ours, &qemus, &monitor).into_iter().max();
        shortest = shortest.min(longest.expect("a visit is in the log"));
        stage.run(&["detach", "100"]).says(0, &[]);
    }
    assert!(shortest > Duration::ZERO && shortest < OWN_MAX, "{shortest:?} beyond QEMU's answers");
}

#[test]
fn what_qemu_takes_to_answer_is_not_counted() {
    let ours = "7 1.000 connect(3, {sa_family=AF_UNIX, sun_path=\"/m.qmpin\"}, 11) = -1 ENOENT (No such file)\n\
                7 1.000 connect(3, {sa_family=AF_UNIX, sun_path=\"/m\"}, 5) = 0\n\
                8 1.012 close(9)                        = 0\n\
                7 1.020 sendto(3, \"{}\", 2, MSG_NOSIGNAL, NULL, 0) = 2\n\
                7 3.040 close(3)                        = 0\n";
    let qemus = "5 1.010 sendmsg(12, {msg_name=NULL}, 0) = 2\n\
                 5 2.500 sendmsg(12, {msg_name=NULL}, 0) = 2\n\
                 5 3.000 sendmsg(12, {msg_name=NULL}, 0) = 2\n";
    let parts = own_parts(ours, qemus, Path::new("/m"));
    assert_eq!(parts.len(), 1);
    assert!((parts[0].as_secs_f64() - 0.05).abs() < 0.001, "{parts:?}");
}
