//! What is not QEMU, or lies, through the whole binary: a clear word, exit code 5 or 3, in time, and
//! no other program's thread is moved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::fake_qemu::FakeQemu;
use crate::support::qemu::{PATIENCE, QemuOptions, wait_until};
use crate::support::run::{
    Attached, Done, POLICY, Place, Stage, finish, masks, needs_two_cpus, taskset,
};
use crate::support::skipped;
use nix::sys::signal::Signal;
use qmpin::ids::{Pid, Tid};

/// The masks of all threads of the machine, but for those of VMs, which others may be pinning.
fn masks_of_others() -> BTreeMap<(Pid, Tid), String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let name = entry.unwrap().file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).map(Pid) else { continue };
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        let of_a_vm = |text: &[u8]| {
            let text = String::from_utf8_lossy(text);
            ["qemu", "qmpin", "kvm", "vhost"].iter().any(|word| text.contains(word))
        };
        if !of_a_vm(&words) && !of_a_vm(&comm) {
            all.extend(masks(pid).into_iter().map(|(tid, mask)| ((pid, tid), mask)));
        }
    }
    all
}

#[track_caller]
fn assert_same(before: &BTreeMap<(Pid, Tid), String>, after: &BTreeMap<(Pid, Tid), String>) {
    for (thread, mask) in before {
        if let Some(now) = after.get(thread) {
            assert_eq!(now, mask, "{thread:?}");
        }
    }
}

fn place() -> Place {
    let place = Place::new();
    place.config("qmpin.toml", POLICY);
    place
}

/// Runs the commands that meet a lie, by both ways to it.
fn meet(fake: &FakeQemu, mut then: impl FnMut(&str, &Done)) {
    let socket = fake.socket().display().to_string();
    let place = place();
    let ways: [&[&str]; 6] = [
        &["threads", "100"],
        &["threads", "x", "--qmp", &socket],
        &["attach", "100"],
        &["attach", "x", "--qmp", &socket],
        &["attach", "100", "--once"],
        &["plan", "100", "--json"],
    ];
    for words in ways {
        let mut words = words.to_vec();
        words.extend(["--wait-s", "1"]);
        let started = Instant::now();
        let done = finish(&mut place.command(&[], fake.dir(), &words));
        assert!(started.elapsed() < PATIENCE, "{words:?}");
        then(&words.join(" "), &done);
        assert_eq!(place.left_behind(), [""; 0], "{words:?}");
    }
}

const LIES: [(&str, &[&str]); 20] = [
    ("silence", &["for 1000 ms, the limit"]),
    ("half a greeting and silence", &["for 1000 ms, the limit"]),
    ("half a greeting", &["closed the connection", "greeting", "bytes into a line"]),
    ("no greeting", &["does not greet as a QMP monitor", "SSH-2.0"]),
    ("an endless line", &["a line longer than 1048576 bytes", "greeting"]),
    ("100 MB", &["a line longer than 1048576 bytes", "query-cpus-fast"]),
    ("nothing but events", &["4096 other lines came", "query-cpus-fast"]),
    ("half a reply", &["closed the connection", "query-cpus-fast", "bytes into a line"]),
    ("no reply", &["timeout: the reply to query-cpus-fast did not come within 1000 ms"]),
    ("no JSON", &["bad JSON", "`hello`"]),
    ("a reply of another shape", &["the reply to query-cpus-fast is not as"]),
    ("process 1", &["vCPU 0 is thread 1, but process"]),
    ("another process", &["vCPU 0 is thread", "has no such thread"]),
    ("another process's iothread", &["iothread io0 is thread", "has no such thread"]),
    ("the main thread", &["vCPU 0 is thread", "its main thread"]),
    ("one thread twice", &["for two vCPUs or iothreads"]),
    ("one thread, two roles", &["for two vCPUs or iothreads"]),
    ("thread 0", &["vCPU 0", "0"]),
    ("thread -1", &["vCPU 0", "-1"]),
    ("thread 2^40", &["vCPU 0", "1099511627776"]),
];

#[test]
fn false_answer_is_named_and_moves_no_thread() {
    needs_two_cpus!("false_answer_is_named_and_moves_no_thread");
    let next = std::sync::atomic::AtomicUsize::new(0);
    // Some lies take a second each: they are met side by side.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some((lie, words)) = LIES.get(number) else { return };
                    let fake = FakeQemu::start(lie);
                    let (of_fake, of_victim) = (masks(fake.pid()), masks(fake.victim()));
                    let before = masks_of_others();
                    meet(&fake, |command, done| {
                        assert_eq!(done.code, Some(5), "{lie}: {command}: {done:?}");
                        let (error, more) = (&done.err, &done.out);
                        assert!(error.starts_with("error: "), "{lie}: {command}: {done:?}");
                        assert!(
                            error.len() < 2000 && more.is_empty(),
                            "{lie}: {command}: {done:?}"
                        );
                        for word in *words {
                            assert!(error.contains(word), "{lie}: {command}: `{word}`: {done:?}");
                        }
                    });
                    assert_same(&before, &masks_of_others());
                    assert_eq!(masks(fake.victim()), of_victim, "{lie}");
                    assert_eq!(masks(fake.pid()), of_fake, "{lie}");
                }
            });
        }
    });
}

fn attach(fake: &FakeQemu, place: &Place) -> Attached {
    Attached::spawn(place.command(&[], fake.dir(), &["attach", "100"]), place.path())
}

#[test]
fn an_honest_fake_is_attached_and_put_back() {
    needs_two_cpus!("an_honest_fake_is_attached_and_put_back");
    // The measure of the tests beside this one: what they see is the lie's doing.
    let (fake, place) = (FakeQemu::start("none"), place());
    let before = masks(fake.pid());
    let mut attached = attach(&fake, &place);
    attached.wait_ready();
    assert_ne!(masks(fake.pid()), before);
    attached.end();
    assert_eq!(masks(fake.pid()), before);
}

#[test]
fn qemu_that_answers_falsely_later_moves_no_thread() {
    needs_two_cpus!("qemu_that_answers_falsely_later_moves_no_thread");
    let (fake, place) = (FakeQemu::start("a turncoat"), place());
    let before = masks(fake.pid());
    let (of_victim, of_others) = (masks(fake.victim()), masks_of_others());
    let mut attached = attach(&fake, &place);
    attached.wait_ready();
    let pinned = masks(fake.pid());
    fake.bear();
    wait_until("QEMU has lied", || attached.lines_with("is of no use, asking again") > 0);
    assert!(attached.lines_with("has no such thread") > 0, "{}", attached.err());
    // What was learnt before stays, and the new thread is where new threads go.
    let now = masks(fake.pid());
    assert!(pinned.iter().all(|(tid, mask)| now.get(tid) == Some(mask)), "{now:?}");
    assert_eq!(now.len(), pinned.len() + 1);
    attached.end();
    assert_eq!(masks(fake.victim()), of_victim);
    assert_same(&of_others, &masks_of_others());
    let after = masks(fake.pid());
    assert!(before.iter().all(|(tid, mask)| after.get(tid) == Some(mask)), "{after:?}");
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn flood_of_events_delays_no_other_work() {
    needs_two_cpus!("flood_of_events_delays_no_other_work");
    let (fake, place) = (FakeQemu::start("own: a flood"), place());
    let before = masks(fake.pid());
    let mut attached = attach(&fake, &place);
    attached.wait_told("asked over its own socket");
    let pinned = masks(fake.pid());
    fake.bear();
    wait_until("the new thread is placed", || {
        let now = masks(fake.pid());
        now.len() > pinned.len() && now.values().all(|mask| mask == "0" || mask == "1")
    });
    let asked = Instant::now();
    attached.signal(Signal::SIGTERM);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    let after = masks(fake.pid());
    assert!(before.iter().all(|(tid, mask)| after.get(tid) == Some(mask)), "{after:?}");
    // Nothing is kept of a flood: memory stays where it was.
    assert!(attached.err().len() < 10_000, "{}", attached.err());
}

#[test]
fn endless_noise_does_not_stop_passes() {
    needs_two_cpus!("endless_noise_does_not_stop_passes");
    let (fake, place) = (FakeQemu::start("own: noise"), place());
    place.config("qmpin.toml", format!("check_interval_s = 1\n{POLICY}"));
    let mut attached = attach(&fake, &place);
    attached.wait_told("asked over its own socket");
    for _ in 0..2 {
        attached.notified.clear();
        let (tid, home) = masks(fake.pid()).pop_last().unwrap();
        taskset(tid, if home == "0" { &[1] } else { &[0] });
        wait_until("it is moved back", || masks(fake.pid()).get(&tid) == Some(&home));
        attached.wait_told("WATCHDOG=1");
    }
    attached.end();
}

#[test]
fn a_vcpu_that_comes_and_goes_all_day_is_asked_for_ever_less_often() {
    needs_two_cpus!("a_vcpu_that_comes_and_goes_all_day_is_asked_for_ever_less_often");
    let (fake, place) = (FakeQemu::start("own: to and fro"), place());
    place.config("qmpin.toml", format!("share = true\n{POLICY}"));
    let mut attached = attach(&fake, &place);
    attached.wait_told("asked over its own socket");
    let since = Instant::now();
    for _ in 0..16 {
        for status in ["STATUS=2 vCPUs on", "STATUS=1 vCPUs on"] {
            attached.notified.clear();
            attached.wait_told(status);
        }
    }
    // Each time is two questions and two leases: as fast as they may come, that was not a second in all.
    assert!(since.elapsed() > Duration::from_secs(2), "{:?}", since.elapsed());
    attached.end();
}

#[test]
fn a_pid_file_that_lies_is_no_vm() {
    needs_two_cpus!("a_pid_file_that_lies_is_no_vm");
    let stage = Stage::new(&QemuOptions { pid_file: false, ..QemuOptions::default() });
    let before = stage.masks();
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid_file = stage.qemu.dir().join("100.pid");
    let no = |text: &str, code: i32, words: &[&str]| {
        fs::write(&pid_file, text).unwrap();
        for command in [&["threads", "100"][..], &["attach", "100", "--once"], &["plan", "100"]] {
            let done = stage.run(command);
            done.says(code, &["100.pid"]).says(code, words);
            assert!(done.err.starts_with("error: "), "{done:?}");
        }
        stage.assert_untouched(&before);
    };
    let other = "no QEMU started with this pid file";
    // A QEMU whose pid file is another.
    no(&stage.qemu.pid().to_string(), 3, &["VM 100 is not running", other]);
    no(&sleeper.id().to_string(), 3, &["VM 100 is not running", other]);
    no("1", 3, &["VM 100 is not running", other]);
    sleeper.kill().unwrap();
    let stat = format!("/proc/{}/stat", sleeper.id());
    wait_until("it is a zombie", || fs::read_to_string(&stat).unwrap().contains(") Z "));
    no(&sleeper.id().to_string(), 3, &["VM 100 is not running", "no such process"]);
    sleeper.wait().unwrap();
    no(&sleeper.id().to_string(), 3, &["VM 100 is not running", "no such process"]);
    for garbage in ["", "x", "-1", "0", "12 34", "99999999999999999999"] {
        no(garbage, 3, &["cannot be used", "is not a process number"]);
    }
    no(&"1".repeat(1000), 3, &["cannot be used", "larger than"]);
    fs::remove_file(&pid_file).unwrap();
    stage.run(&["threads", "100"]).says(3, &["VM 100 is not running", "100.pid"]);
    stage.run(&["threads", "win"]).says(3, &["win", "--qmp PATH"]);
    // By its socket it is found all the same.
    let socket = stage.qemu.paths().shared.display().to_string();
    stage.run(&["threads", "100", "--qmp", &socket]).says(0, &["vcpu 0"]);
    stage.assert_untouched(&before);
}

#[test]
fn socket_of_another_process_gets_no_bytes() {
    needs_two_cpus!("socket_of_another_process_gets_no_bytes");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let socket = stage.qemu.paths().shared;
    fs::rename(&socket, socket.with_extension("away")).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let me = format!("process {}", std::process::id());
    for command in [&["threads", "100"][..], &["attach", "100"]] {
        stage.run(command).says(5, &[&me, "the VM's QEMU"]);
        let (mut visitor, _) = listener.accept().unwrap();
        let mut heard = Vec::new();
        std::io::Read::read_to_end(&mut visitor, &mut heard).unwrap();
        assert!(heard.is_empty(), "{heard:?}");
    }
    stage.assert_untouched(&before);
}

#[test]
fn what_is_no_socket_is_called_so() {
    let place = place();
    let (file, folder) = (place.path().join("file"), place.path().join("folder"));
    fs::write(&file, "").unwrap();
    fs::create_dir(&folder).unwrap();
    for (path, code, words) in [
        (file.as_path(), 5, "it is not a socket"),
        (folder.as_path(), 5, "it is not a socket"),
        (Path::new("/dev/null"), 5, "it is not a socket"),
        (&place.path().join("none"), 3, "No such file"),
        (&file.join("none"), 5, "Not a directory"),
    ] {
        let path = path.display().to_string();
        for command in ["threads", "attach", "plan"] {
            let mut command = place.command(&[], place.path(), &[command, "x", "--qmp", &path]);
            finish(&mut command).says(code, &["could not connect to", &path, words]);
        }
    }
    // A socket that no process serves any more.
    let dead = place.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    let dead = dead.display().to_string();
    let mut command = place.command(&[], place.path(), &["threads", "x", "--qmp", &dead]);
    finish(&mut command).says(3, &["could not connect to", &dead, "refused"]);
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn lock_of_another_user_on_the_process_keeps_no_supervisor_away() {
    let test = "lock_of_another_user_on_the_process_keeps_no_supervisor_away";
    needs_two_cpus!(test);
    let stage = Stage::new(&QemuOptions::default());
    let folder = format!("/proc/{}", stage.qemu.pid().0);
    let squats = ["--reuid=65534", "--regid=65534", "--clear-groups", "flock", "-F", "-n", &folder];
    let mut squatter = match Command::new("setpriv")
        .args(squats)
        .args(["sleep", "1000"])
        .stdout(Stdio::null())
        .spawn()
    {
        Ok(squatter) => squatter,
        Err(error) => return skipped(test, &format!("no setpriv: {error}")),
    };
    let is_locked = || {
        let file = fs::File::open(&folder).unwrap();
        nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).is_err()
    };
    wait_until("it is locked", || is_locked() || squatter.try_wait().unwrap().is_some());
    if squatter.try_wait().unwrap().is_some() {
        return skipped(test, "not root");
    }
    stage.attach(&[]).end();
    squatter.kill().unwrap();
    squatter.wait().unwrap();
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn missing_permission_is_reported() {
    let test = "missing_permission_is_reported";
    needs_two_cpus!(test);
    let unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let mut can = Command::new(unprivileged[0]);
    if !can
        .args(&unprivileged[1..])
        .arg("true")
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
    {
        return skipped(test, "not root, or no setpriv");
    }
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    // Where it is built, no other program may be able to go.
    let binary = stage.place.path().join("qmpin");
    fs::copy(env!("CARGO_BIN_EXE_qmpin"), &binary).unwrap();
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    open(stage.place.path(), 0o755);
    let socket = stage.qemu.paths().shared.display().to_string();
    let as_nobody = |args: &[&str]| {
        finish(&mut stage.place.command_of(&binary, &unprivileged, stage.qemu.dir(), args))
    };
    let hint = "hint: run it as root";
    for command in [&["threads", "100"][..], &["plan", "100"], &["attach", "100", "--dry-run"]] {
        as_nobody(command).says(4, &["100.pid", "Permission denied", hint]);
    }
    for command in ["threads", "plan"] {
        as_nobody(&[command, "x", "--qmp", &socket]).says(4, &["Permission denied", hint]);
    }
    let state = stage.place.state().display().to_string();
    as_nobody(&["attach", "100"]).says(4, &["100.pid", "Permission denied", hint]);
    as_nobody(&["detach", "100"]).says(0, &["not attached"]);
    // Attached by root: no program may end that.
    let attached = stage.attach(&[]);
    let pinned = stage.masks();
    as_nobody(&["detach", "100"]).says(4, &[&state, "Permission denied", hint]);
    as_nobody(&["attach", "100"]).says(4, &["100.pid", "Permission denied", hint]);
    assert_eq!(stage.masks(), pinned);
    attached.end();
    stage.assert_untouched(&before);
    let policy = stage.place.config("100.toml", "share = true\n");
    open(&policy, 0o600);
    let policy = policy.display().to_string();
    as_nobody(&["threads", "100"]).says(4, &["100.pid"]);
    as_nobody(&["plan", "100"]).says(4, &[&policy, "Permission denied"]);
}
