//! The connection against a real bus of its own, and a systemd that answers when it is let.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use tokio_stream::StreamExt as _;
use zbus::{Message, MessageStream};

use super::*;
use crate::systemd::{MANAGER, SYSTEMD, call};

const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
const PATIENCE: Duration = Duration::from_secs(10);

struct Daemon {
    folder: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// `None`: this machine has no dbus-daemon, and the test is skipped.
    fn start(test: &str) -> Option<Daemon> {
        let folder = tempfile::tempdir().expect("a folder");
        match Daemon::run(folder.path()) {
            Ok(child) => Some(Daemon { folder, child }),
            Err(error) => {
                // Past the capture of the test harness and off its line of dots, to be counted.
                let text = format!("\nskipped: {test}: no dbus-daemon: {error}\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                None
            }
        }
    }

    fn run(folder: &Path) -> std::io::Result<Child> {
        let address = format!("--address=unix:path={}", folder.join("bus").display());
        let child = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--nosyslog", &address])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let begun = Instant::now();
        while std::os::unix::net::UnixStream::connect(folder.join("bus")).is_err() {
            assert!(begun.elapsed() < PATIENCE, "no bus");
            thread::yield_now();
        }
        Ok(child)
    }

    fn stop(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    /// Starts it anew after [`Daemon::stop`].
    fn start_again(&mut self) {
        std::fs::remove_file(self.folder.path().join("bus")).expect("removed");
        self.child = Daemon::run(self.folder.path()).expect("dbus-daemon");
    }

    fn bus(&self) -> Bus {
        let address = Some(format!("unix:path={}", self.folder.path().join("bus").display()));
        Bus { address, ..Bus::new() }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The calls that the systemd of a test has seen: the connection it came by, and the method.
type Seen = Mutex<Vec<(String, String)>>;

/// A systemd that keeps each `Keep` until it is asked to `Release` all of them, and answers anything else at once.
/// Returns when the bus has ended, or after `End`.
fn systemd(bus: &Bus, seen: &Seen, is_there: &mpsc::Sender<()>) -> Result<(), SystemdError> {
    bus.ask("be systemd", PATIENCE, async |connection| {
        let mut calls = MessageStream::from(connection);
        connection.request_name(SYSTEMD).await?;
        let _ = is_there.send(());
        let mut kept: Vec<Message> = Vec::new();
        while let Some(message) = calls.next().await.transpose()? {
            let header = message.header();
            let (Some(sender), Some(MANAGER)) =
                (header.sender(), header.interface().map(|name| name.as_str()))
            else {
                continue;
            };
            let method = header.member().map(ToString::to_string).unwrap_or_default();
            seen.lock().expect("no panic").push((sender.to_string(), method.clone()));
            match method.as_str() {
                "Keep" => kept.push(message.clone()),
                "Release" => {
                    for late in kept.drain(..) {
                        connection.reply(&late.header(), &"Keep").await?;
                    }
                    connection.reply(&header, &"Release").await?;
                }
                _ => connection.reply(&header, &method).await?,
            }
            if method == "End" {
                break;
            }
        }
        Ok(())
    })
}

/// Runs a test beside a systemd on that bus.
fn beside_systemd(daemon: &Daemon, seen: &Seen, test: impl FnOnce()) {
    let bus = daemon.bus();
    thread::scope(|scope| {
        let (sender, is_there) = mpsc::channel();
        let (bus, sender) = (&bus, sender);
        scope.spawn(move || systemd(bus, seen, &sender));
        is_there.recv_timeout(PATIENCE).expect("systemd is there");
        test();
    });
}

/// Calls a method of the systemd above; its answer is the method's name.
fn ask(bus: &Bus, method: &str, limit: Duration) -> Result<String, SystemdError> {
    bus.ask(method, limit, async |connection| {
        let answer = call(connection, method, &()).await?;
        answer.body().deserialize()
    })
}

fn await_seen(seen: &Seen, method: &str, count: usize) {
    let begun = Instant::now();
    let is_method = |(_, found): &&(String, String)| found == method;
    while seen.lock().expect("no panic").iter().filter(is_method).count() < count {
        assert!(begun.elapsed() < PATIENCE, "{method} has not come");
        thread::yield_now();
    }
}

/// The names of all connections to the bus.
fn connections(bus: &Bus) -> Result<Vec<String>, SystemdError> {
    bus.ask("list its connections", PATIENCE, async |connection| {
        let found =
            connection.call_method(Some(BUS), BUS_PATH, Some(BUS), "ListNames", &()).await?;
        let names: Vec<String> = found.body().deserialize()?;
        Ok(names.into_iter().filter(|name| name.starts_with(':')).collect())
    })
}

#[test]
fn all_calls_share_one_connection_from_any_thread_and_below_a_runtime() {
    let test = "all_calls_share_one_connection_from_any_thread_and_below_a_runtime";
    let Some(daemon) = Daemon::start(test) else { return };
    let bus = daemon.bus();
    let first = connections(&bus).expect("asked");
    assert_eq!(first.len(), 1);
    thread::scope(|scope| {
        let ask = || connections(&bus).expect("asked");
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        for thread in threads {
            assert_eq!(thread.join().expect("no panic"), first);
        }
    });
    let runtime = crate::runtime::build().expect("a runtime");
    runtime.block_on(async {
        // More than a task may do at a time (`tokio::task::coop`).
        for _ in 0..300 {
            assert_eq!(connections(&bus).expect("asked"), first);
        }
    });
}

#[test]
fn first_call_after_the_bus_was_restarted_is_answered() {
    let test = "first_call_after_the_bus_was_restarted_is_answered";
    let Some(mut daemon) = Daemon::start(test) else { return };
    let bus = daemon.bus();
    connections(&bus).expect("asked");
    daemon.stop();
    daemon.start_again();
    assert_eq!(connections(&bus).expect("asked").len(), 1);
}

#[test]
fn call_does_not_use_a_connection_that_the_bus_has_just_closed() {
    let test = "call_does_not_use_a_connection_that_the_bus_has_just_closed";
    let Some(mut daemon) = Daemon::start(test) else { return };
    let bus = daemon.bus();
    connections(&bus).expect("asked");
    // The thread is kept from its socket until the call has begun.
    let (sender, is_kept) = mpsc::channel();
    let has_ended = Arc::new(AtomicBool::new(false));
    let runtime = bus.runtime().expect("a runtime");
    bus.runtime().expect("a runtime").spawn({
        let has_ended = Arc::clone(&has_ended);
        async move {
            let _ = sender.send(());
            while runtime.metrics().global_queue_depth() == 0 && !has_ended.load(Ordering::Relaxed)
            {
                thread::yield_now();
            }
        }
    });
    is_kept.recv_timeout(PATIENCE).expect("the thread runs");
    daemon.stop();
    // A call over the old connection would be `Refused`.
    let gone = connections(&bus);
    has_ended.store(true, Ordering::Relaxed);
    assert!(matches!(gone, Err(SystemdError::Reach(_))), "{gone:?}");
}

#[test]
fn call_under_way_fails_with_the_bus_and_is_not_sent_again() {
    let test = "call_under_way_fails_with_the_bus_and_is_not_sent_again";
    let Some(mut daemon) = Daemon::start(test) else { return };
    let (bus, seen) = (daemon.bus(), Seen::default());
    let kept = thread::scope(|scope| {
        let (other, (sender, is_there)) = (daemon.bus(), mpsc::channel());
        let seen = &seen;
        scope.spawn(move || systemd(&other, seen, &sender));
        is_there.recv_timeout(PATIENCE).expect("systemd is there");
        let kept = scope.spawn(|| ask(&bus, "Keep", PATIENCE));
        await_seen(seen, "Keep", 1);
        daemon.stop();
        kept.join().expect("no panic")
    });
    // At once, and not when its time is over.
    assert!(matches!(kept, Err(SystemdError::Refused { .. })), "{kept:?}");
    daemon.start_again();
    beside_systemd(&daemon, &seen, || {
        assert_eq!(ask(&bus, "End", PATIENCE).expect("answered"), "End");
    });
    let methods: Vec<String> =
        seen.into_inner().expect("no panic").into_iter().map(|it| it.1).collect();
    assert_eq!(methods, ["Keep", "End"]);
}

#[test]
fn late_call_is_an_error_and_its_answer_goes_to_no_other_call() {
    let test = "late_call_is_an_error_and_its_answer_goes_to_no_other_call";
    let Some(daemon) = Daemon::start(test) else { return };
    let (bus, seen) = (daemon.bus(), Seen::default());
    beside_systemd(&daemon, &seen, || {
        for count in 1..=3 {
            let late = ask(&bus, "Keep", Duration::from_millis(50));
            assert!(matches!(late, Err(SystemdError::Late { .. })), "{late:?}");
            await_seen(&seen, "Keep", count);
        }
        assert_eq!(ask(&bus, "GetUnit", PATIENCE).expect("answered"), "GetUnit");
        // Now the three late answers come, before these.
        assert_eq!(ask(&bus, "Release", PATIENCE).expect("answered"), "Release");
        assert_eq!(ask(&bus, "End", PATIENCE).expect("answered"), "End");
    });
    let seen = seen.into_inner().expect("no panic");
    assert_eq!(seen.len(), 6);
    assert!(seen.iter().all(|(sender, _)| *sender == seen[0].0), "several connections: {seen:?}");
}

#[test]
fn call_does_not_wait_for_another_threads_call() {
    let test = "call_does_not_wait_for_another_threads_call";
    let Some(daemon) = Daemon::start(test) else { return };
    let (bus, seen) = (daemon.bus(), Seen::default());
    beside_systemd(&daemon, &seen, || {
        thread::scope(|scope| {
            let slow = scope.spawn(|| ask(&bus, "Keep", PATIENCE));
            await_seen(&seen, "Keep", 1);
            assert_eq!(ask(&bus, "GetUnit", PATIENCE).expect("answered"), "GetUnit");
            let late = ask(&bus, "Keep", Duration::from_millis(50));
            assert!(matches!(late, Err(SystemdError::Late { .. })), "{late:?}");
            assert!(!slow.is_finished());
            ask(&bus, "Release", PATIENCE).expect("answered");
            assert_eq!(slow.join().expect("no panic").expect("answered"), "Keep");
        });
        ask(&bus, "End", PATIENCE).expect("answered");
    });
}

#[test]
fn call_does_not_wait_for_another_that_cannot_connect() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bus");
    let mute = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let bus = Bus { address: Some(format!("unix:path={}", path.display())), ..Bus::new() };
    thread::scope(|scope| {
        let long = scope.spawn(|| ask(&bus, "GetUnit", PATIENCE));
        let short = ask(&bus, "GetUnit", Duration::from_millis(50));
        assert!(matches!(short, Err(SystemdError::Late { .. })), "{short:?}");
        assert!(!long.is_finished(), "both have ended");
        drop(mute);
        let long = long.join().expect("no panic");
        assert!(matches!(long, Err(SystemdError::Reach(_))), "{long:?}");
    });
}

#[test]
fn idle_connection_does_not_wake_the_process() {
    let Some(daemon) = Daemon::start("idle_connection_does_not_wake_the_process") else { return };
    let (bus, other) = (daemon.bus(), daemon.bus());
    connections(&bus).expect("asked");
    let thread = bus.runtime().expect("a runtime").spawn(async { nix::unistd::gettid() });
    let path = format!("/proc/self/task/{}/status", wait_for(thread).expect("the thread runs"));
    let sleeps = || -> u32 {
        let status = std::fs::read_to_string(&path).expect("a status");
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.and_then(|count| count.trim().parse().ok()).expect("a count")
    };
    let before = sleeps();
    let broadcast = other.ask("broadcast", PATIENCE, async |connection| {
        for _ in 0..200 {
            connection.emit_signal(None::<&str>, "/", "org.example.Bus", "Changed", &()).await?;
            // When this is answered, the signal has gone to all that wanted it.
            connection.call_method(Some(BUS), BUS_PATH, Some(BUS), "GetId", &()).await?;
        }
        Ok(())
    });
    broadcast.expect("sent");
    // It may have been on its way to sleep.
    let slept = sleeps() - before;
    assert!(slept < 5, "it has woken {slept} times");
}

#[test]
fn bus_that_is_not_there_is_an_error() {
    let bus = Bus { address: Some("unix:path=/nowhere/bus".to_owned()), ..Bus::new() };
    assert!(matches!(connections(&bus), Err(SystemdError::Reach(_))));
}
