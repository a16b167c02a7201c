//! A socket whose listener is not what the number of its process says by now: an unprivileged user's listener ends or
//! gains rights, and root attaches the "VM" behind its socket. No thread of another process is moved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::zombie_processes)] // one outlives its parent, and init reaps it

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use crate::support::qemu::wait_until;
use crate::support::qmp_peer::{cpu, iothread};
use crate::support::run::{POLICY, Place, Reaped, finish, masks, needs_two_cpus};
use crate::support::skipped;
use nix::sys::signal::{Signal, kill};
use qmpin::ids::{Pid, Tid};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use serde_json::{Value, json};

const ROLE: &str = "QMPIN_PEER_ROLE";
const DIR: &str = "QMPIN_PEER_DIR";
/// The unprivileged user that attacks.
const NOBODY: u32 = 65534;

/// This test binary, run once more in another role.
fn actor(role: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["trust_peer::the_other_roles_of_this_binary", "--exact", "--nocapture"]);
    command.env(ROLE, role).env(DIR, dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn the_other_roles_of_this_binary() {
    let (Ok(role), Ok(dir)) = (std::env::var(ROLE), std::env::var(DIR)) else { return };
    let dir = PathBuf::from(dir);
    match role.as_str() {
        // Listens as the unprivileged user, leaves the socket to a child, and ends.
        "listener that ends" => {
            set_thread_res_uid(uid(NOBODY), uid(NOBODY), uid(NOBODY)).unwrap();
            let listener = UnixListener::bind(dir.join("socket")).unwrap();
            let mut server = actor("server", &dir);
            // It outlives its parent: that is the attack.
            drop(server.stdin(OwnedFd::from(listener)).spawn().unwrap());
        }
        // Listens as the unprivileged user and runs as root later, as by a program with the set-user-ID bit.
        "listener that gains rights" => {
            set_thread_res_uid(None, uid(NOBODY), None).unwrap();
            let listener = UnixListener::bind(dir.join("socket")).unwrap();
            set_thread_res_uid(None, uid(0), None).unwrap();
            sleepers(&dir);
            serve(&listener, &dir);
        }
        // Listens and stays as it is.
        "honest listener" => {
            let listener = UnixListener::bind(dir.join("socket")).unwrap();
            sleepers(&dir);
            serve(&listener, &dir);
        }
        "server" => {
            let listener = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
            fs::write(dir.join("server"), std::process::id().to_string()).unwrap();
            serve(&UnixListener::from(listener), &dir);
        }
        "victim" => {
            sleepers(&dir);
            loop {
                thread::park();
            }
        }
        role => panic!("{role}"),
    }
}

fn uid(uid: u32) -> Uid {
    Uid::from_raw(uid)
}

/// Makes two threads that sleep, and writes down their numbers.
fn sleepers(dir: &Path) {
    let (send, receive) = std::sync::mpsc::channel();
    for _ in 0..2 {
        let send = send.clone();
        thread::spawn(move || {
            send.send(nix::unistd::gettid().as_raw()).unwrap();
            loop {
                thread::park();
            }
        });
    }
    let tids: Vec<i32> = (0..2).map(|_| receive.recv().unwrap()).collect();
    fs::write(dir.join("tids.new"), serde_json::to_string(&tids).unwrap()).unwrap();
    fs::rename(dir.join("tids.new"), dir.join("tids")).unwrap();
}

/// Answers as QEMU would, with the threads that were written down as vCPU and iothread.
fn serve(listener: &UnixListener, dir: &Path) -> ! {
    loop {
        let (stream, _) = listener.accept().unwrap();
        let _ = visit(stream, dir);
    }
}

fn visit(mut stream: UnixStream, dir: &Path) -> std::io::Result<()> {
    let qemu = json!({"major": 9, "minor": 2, "micro": 0});
    let greeting = json!({"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": []}});
    stream.write_all(format!("{greeting}\r\n").as_bytes())?;
    let tids: Vec<i64> = serde_json::from_str(&fs::read_to_string(dir.join("tids"))?)?;
    for line in BufReader::new(stream.try_clone()?).lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let answer = match command["execute"].as_str() {
            Some("query-cpus-fast") => json!([cpu(0, tids[0])]),
            Some("query-iothreads") => json!([iothread("io0", tids[1])]),
            _ => json!({}),
        };
        let reply = json!({"return": answer, "id": command["id"]});
        stream.write_all(format!("{reply}\r\n").as_bytes())?;
    }
    Ok(())
}

/// A folder that the attacker can write, and those of qmpin.
fn world() -> (tempfile::TempDir, Place) {
    let dir = tempfile::Builder::new().prefix("qmpin-peer-").tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), None).unwrap();
    let place = Place::new();
    place.config("qmpin.toml", POLICY);
    (dir, place)
}

fn is_root(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skipped(test, "not root");
    }
    is_root
}

/// Starts a victim whose number is `pid`, as root. `None`: another process got the number.
fn victim_with_number(pid: Pid, dir: &Path) -> Option<Reaped> {
    fs::write("/proc/sys/kernel/ns_last_pid", (pid.0 - 1).to_string()).ok()?;
    let victim = Reaped(actor("victim", dir).spawn().unwrap());
    (victim.pid() == pid).then_some(victim)
}

const WAYS: [&[&str]; 4] = [&["threads"], &["plan"], &["attach"], &["attach", "--once"]];

/// Every command refuses the socket for this reason, and no thread of the victim is moved.
fn assert_refused(dir: &Path, place: &Place, victim: Pid, why: &[&str]) {
    let before = masks(victim);
    assert!(before.len() >= 3, "{before:?}");
    let socket = dir.join("socket").display().to_string();
    for way in WAYS {
        let mut words = vec![way[0], "x", "--qmp", &socket];
        words.extend(&way[1..]);
        finish(&mut place.command(&[], dir, &words)).says(5, why);
        assert_eq!(masks(victim), before, "{words:?}");
    }
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn a_listener_that_has_ended_is_not_the_process_with_its_number() {
    let test = "a_listener_that_has_ended_is_not_the_process_with_its_number";
    needs_two_cpus!(test);
    if !is_root(test) {
        return;
    }
    let mut tries = 0;
    let (dir, place, victim) = loop {
        let (dir, place) = world();
        let mut listener = actor("listener that ends", dir.path()).spawn().unwrap();
        let pid = Pid(i32::try_from(listener.id()).unwrap());
        assert!(listener.wait().unwrap().success());
        if let Some(victim) = victim_with_number(pid, dir.path()) {
            break (dir, place, victim);
        }
        tries += 1;
        if tries == 100 {
            return skipped(test, "the listener's number could not be had again");
        }
    };
    let tids = dir.path().join("tids");
    wait_until("the victim has its threads", || tids.exists());
    let why = format!("process {} made the socket and has ended", victim.pid());
    assert_refused(dir.path(), &place, victim.pid(), &[&why]);
    stop_server(dir.path());
}

#[test]
fn a_listener_that_has_gained_rights_since_is_refused() {
    let test = "a_listener_that_has_gained_rights_since_is_refused";
    needs_two_cpus!(test);
    if !is_root(test) {
        return;
    }
    let (dir, place) = world();
    let listener = Reaped(actor("listener that gains rights", dir.path()).spawn().unwrap());
    wait_until("it has its threads", || dir.path().join("tids").exists());
    let why = format!("user {NOBODY} made the socket, but process {} runs as", listener.pid());
    assert_refused(dir.path(), &place, listener.pid(), &[&why]);
}

#[test]
fn a_listener_of_another_user_that_stays_as_it_is_is_attached() {
    let test = "a_listener_of_another_user_that_stays_as_it_is_is_attached";
    needs_two_cpus!(test);
    if !is_root(test) {
        return;
    }
    let (dir, place) = world();
    let command = actor("honest listener", dir.path());
    let binary = std::env::current_exe().unwrap();
    let copy = dir.path().join("binary");
    fs::copy(binary, &copy).unwrap();
    let mut as_nobody = Command::new("setpriv");
    as_nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(copy);
    as_nobody.args(command.get_args());
    as_nobody.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    as_nobody.stdin(Stdio::null()).stdout(Stdio::null());
    let Ok(mut listener) = as_nobody.spawn().map(Reaped) else {
        return skipped(test, "no setpriv");
    };
    wait_until("it has its threads", || {
        // A child of another test may have the copy open for writing for a moment: it cannot be run then.
        if listener.0.try_wait().unwrap().is_some() {
            listener = Reaped(as_nobody.spawn().unwrap());
        }
        dir.path().join("tids").exists()
    });
    let before = masks(listener.pid());
    let socket = dir.path().join("socket").display().to_string();
    let run = |words: &[&str]| finish(&mut place.command(&[], dir.path(), words));
    run(&["attach", "x", "--qmp", &socket, "--once"]).says(0, &[]);
    let pinned: Vec<i32> =
        serde_json::from_str(&fs::read_to_string(dir.path().join("tids")).unwrap()).unwrap();
    assert_eq!(masks(listener.pid())[&Tid(pinned[0])], "1");
    run(&["detach", "x"]).says(0, &[]);
    assert_eq!(masks(listener.pid()), before);
}

/// The server is no child of the test.
fn stop_server(dir: &Path) {
    let pid = fs::read_to_string(dir.join("server")).unwrap().parse().unwrap();
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}
