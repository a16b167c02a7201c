//! A process that says it is QEMU: its name, its pid file, its socket and its threads are its own, and
//! what it says over QMP is a lie of the test's choice. It is the test's own binary, run once more.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use qmpin::ids::{Pid, Tid};
use serde_json::{Value, json};

use super::qemu::wait_until;
use super::qmp_peer::{cpu, iothread};

const DIR: &str = "QMPIN_FAKE_QEMU_DIR";
const LIE: &str = "QMPIN_FAKE_QEMU_LIE";
const VICTIM: &str = "QMPIN_FAKE_QEMU_VICTIM";

/// How many threads a fake with many of them has.
pub(crate) const THREADS_MAX: usize = 15_000;

/// The test that a fake is.
const SERVING_TEST: &str = "support::fake_qemu::a_fake_is_this_test_in_a_process_of_its_own";

/// A running fake: VM 100. A second process is there to be lied about.
pub(crate) struct FakeQemu {
    dir: tempfile::TempDir,
    child: Child,
    victim: Child,
}

impl FakeQemu {
    /// Starts one.
    pub(crate) fn start(lie: &str) -> FakeQemu {
        let dir = tempfile::Builder::new().prefix("qmpin-fake-").tempdir().unwrap();
        let victim = super::clean::command("sleep").arg("1000").spawn().unwrap();
        let mut command = super::clean::command(std::env::current_exe().unwrap());
        command.arg0("qemu-fake");
        command.args([SERVING_TEST, "--exact", "--nocapture", "--", "-pidfile"]);
        command.arg(dir.path().join("100.pid"));
        command.env(DIR, dir.path()).env(LIE, lie).env(VICTIM, victim.id().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let fake = FakeQemu { dir, child, victim };
        wait_until("the fake listens", || fake.dir().join("ready").exists());
        fake
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir().join("100.qmp")
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(i32::try_from(self.child.id()).unwrap())
    }

    pub(crate) fn victim(&self) -> Pid {
        Pid(i32::try_from(self.victim.id()).unwrap())
    }

    /// Lets it bear a thread.
    pub(crate) fn bear(&self) {
        let created = self.dir().join("created");
        fs::write(self.dir().join("create"), "").unwrap();
        wait_until("a thread is created", || fs::remove_file(&created).is_ok());
    }
}

#[test]
fn a_fake_is_this_test_in_a_process_of_its_own() {
    serve();
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        for child in [&mut self.child, &mut self.victim] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The threads it has, and the lie.
#[derive(Clone)]
struct Fake {
    lie: String,
    vcpu: Tid,
    /// Of the lie that has a second vCPU now and then.
    other_vcpu: Tid,
    iothread: Tid,
    victim: i64,
}

/// What the fake does; in any other process, nothing.
fn serve() {
    let (Ok(dir), Ok(lie)) = (std::env::var(DIR), std::env::var(LIE)) else { return };
    let dir = Path::new(&dir);
    let victim = std::env::var(VICTIM).unwrap().parse().unwrap();
    let fake = Fake { lie, vcpu: sleeper(), other_vcpu: sleeper(), iothread: sleeper(), victim };
    fs::write(dir.join("100.pid"), std::process::id().to_string()).unwrap();
    let shared = UnixListener::bind(dir.join("100.qmp")).unwrap();
    if fake.lie.starts_with("own: ") {
        let own = UnixListener::bind(dir.join("100.qmpin")).unwrap();
        let fake = fake.clone();
        thread::spawn(move || visits(&own, &fake));
    }
    let helper = dir.to_owned();
    thread::spawn(move || {
        loop {
            if fs::remove_file(helper.join("create")).is_ok() {
                sleeper();
                fs::write(helper.join("created"), "").unwrap();
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
    if fake.lie == "many threads" {
        let count = many_threads();
        fs::write(dir.join("many"), count.to_string()).unwrap();
    }
    if fake.lie == "threads without end" {
        // Begun by the test, since it is attached first.
        let begin = dir.join("begin");
        thread::spawn(move || {
            while !begin.exists() {
                thread::sleep(Duration::from_millis(5));
            }
            loop {
                thread::spawn(|| {}).join().unwrap();
            }
        });
    }
    // All its threads are there now.
    fs::write(dir.join("ready"), "").unwrap();
    visits(&shared, &fake);
}

/// Creates as many threads as the machine allows, up to the number in [`THREADS_MAX`]. How many there are.
fn many_threads() -> usize {
    let sleep = || loop {
        thread::park();
    };
    let more = |_: &usize| thread::Builder::new().stack_size(16 << 10).spawn(sleep).is_ok();
    (0..THREADS_MAX).take_while(more).count()
}

/// A thread that sleeps for good.
fn sleeper() -> Tid {
    let (send, receive) = std::sync::mpsc::channel();
    thread::spawn(move || {
        send.send(Tid(nix::unistd::gettid().as_raw())).unwrap();
        loop {
            thread::park();
        }
    });
    receive.recv().unwrap()
}

fn visits(listener: &UnixListener, fake: &Fake) {
    for number in 0.. {
        let (stream, _) = listener.accept().unwrap();
        // A client that goes is no fault.
        let _ = visit(stream, fake, number);
    }
}

fn visit(mut stream: UnixStream, fake: &Fake, number: usize) -> std::io::Result<()> {
    let tid = |tid: Tid| i64::from(tid.0);
    let (vcpu, io) = (tid(fake.vcpu), tid(fake.iothread));
    let main = i64::from(std::process::id());
    let greeting = json!({"QMP": {"version": {"qemu": {"major": 9, "minor": 2, "micro": 0},
        "package": "fake"}, "capabilities": []}});
    match fake.lie.as_str() {
        "silence" => return keep(&stream),
        "half a greeting and silence" => {
            stream.write_all(b"{\"QMP\": {\"vers")?;
            return keep(&stream);
        }
        "half a greeting" => return stream.write_all(b"{\"QMP\": {\"vers"),
        "no greeting" => return stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n"),
        "an endless line" => return endless(&mut stream, b"{\"QMP\": \"", b"xxxxxxxxxxxxxxxx"),
        _ => {}
    }
    stream.write_all(format!("{greeting}\r\n").as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    let mut questions = 0;
    while reader.read_line(&mut line)? > 0 {
        let command: Value = serde_json::from_str(&line)?;
        line.clear();
        let id = &command["id"];
        let name = command["execute"].as_str().unwrap_or_default();
        let (mut cpus, mut iothreads) = (vec![cpu(0, vcpu)], vec![iothread("io0", io)]);
        match (name, fake.lie.as_str()) {
            ("qmp_capabilities", _) => {}
            ("query-cpus-fast", "own: to and fro") => {
                questions += 1;
                if questions % 2 == 0 {
                    cpus.push(cpu(1, tid(fake.other_vcpu)));
                }
            }
            ("query-cpus-fast", "more vCPUs than it was given") => {
                cpus.push(cpu(1, tid(fake.other_vcpu)));
            }
            ("query-cpus-fast", "100 MB") => {
                stream.write_all(b"{\"return\": [")?;
                let row = cpu(0, vcpu).to_string().repeat(5000);
                for _ in 0..(100_000_000 / row.len()) {
                    stream.write_all(row.as_bytes())?;
                }
                return stream.write_all(b"]}\r\n");
            }
            ("query-cpus-fast", "nothing but events") => {
                let event = json!({"event": "NEW_THING", "data": {},
                    "timestamp": {"seconds": -1, "microseconds": -1}});
                let events = format!("{event}\r\n").repeat(100);
                return endless(&mut stream, b"", events.as_bytes());
            }
            ("query-cpus-fast", "half a reply") => return stream.write_all(b"{\"return\": [{\"cp"),
            ("query-cpus-fast", "no reply") => return keep(&stream),
            ("query-cpus-fast", "no JSON") => return stream.write_all(b"hello\r\n"),
            ("query-cpus-fast", "a reply of another shape") => {
                stream.write_all(format!("{}\r\n", json!({"return": 7, "id": id})).as_bytes())?;
                continue;
            }
            (_, "process 1") => cpus = vec![cpu(0, 1)],
            (_, "another process") => cpus = vec![cpu(0, fake.victim)],
            (_, "another process's iothread") => iothreads = vec![iothread("io0", fake.victim)],
            (_, "the main thread") => cpus = vec![cpu(0, main)],
            (_, "one thread twice") => cpus = vec![cpu(0, vcpu), cpu(1, vcpu)],
            (_, "one thread, two roles") => iothreads = vec![iothread("io0", vcpu)],
            (_, "thread 0") => cpus = vec![cpu(0, 0)],
            (_, "thread -1") => cpus = vec![cpu(0, -1)],
            (_, "thread 2^40") => cpus = vec![cpu(0, 1 << 40)],
            (_, "a turncoat") if number > 0 => cpus = vec![cpu(0, fake.victim)],
            _ => {}
        }
        let reply = match name {
            "query-cpus-fast" => json!({"return": cpus, "id": id}),
            "query-iothreads" => json!({"return": iothreads, "id": id}),
            "qmp_capabilities" => json!({"return": {}, "id": id}),
            _ => json!({"error": {"class": "CommandNotFound", "desc": name}, "id": id}),
        };
        stream.write_all(format!("{reply}\r\n").as_bytes())?;
        if name == "query-iothreads" && fake.lie == "own: to and fro" {
            let event = json!({"event": "DEVICE_DELETED", "data": {"path": "/x"},
                "timestamp": {"seconds": 1, "microseconds": 1}});
            stream.write_all(format!("{event}\r\n").as_bytes())?;
        }
        if name == "query-iothreads" && fake.lie == "own: noise" {
            // In large pieces: it is there before it is wanted.
            return endless(&mut stream, b"", "{\"x\": 1}\r\n".repeat(10_000).as_bytes());
        }
        if name == "query-iothreads" && fake.lie == "own: a flood" {
            let event = json!({"event": "NEW_THING", "data": {"x": "y"},
                "timestamp": {"seconds": 1, "microseconds": 1}});
            let reset = json!({"event": "RESET", "data": {"guest": true, "reason": "guest-reset"},
                "timestamp": {"seconds": 1, "microseconds": 1}});
            return endless(&mut stream, b"", format!("{event}\r\n{reset}\r\n").as_bytes());
        }
    }
    Ok(())
}

/// Holds the connection until the client has gone.
fn keep(stream: &UnixStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    while !reader.fill_buf()?.is_empty() {
        let length = reader.buffer().len();
        reader.consume(length);
    }
    Ok(())
}

fn endless(stream: &mut UnixStream, first: &[u8], then: &[u8]) -> std::io::Result<()> {
    stream.write_all(first)?;
    loop {
        stream.write_all(then)?;
    }
}
