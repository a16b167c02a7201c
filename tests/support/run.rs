//! The whole binary, run beside a real QEMU in folders of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;
use qmpin::ids::{Pid, Tid};

use super::qemu::{PATIENCE, Qemu, QemuOptions, wait_until};

/// CPU 0 is the host's, CPU 1 the vCPUs', whatever else the machine has. Nothing of the machine is
/// changed but the VM's threads: tests run side by side, and the rest of a host is there only once.
pub(crate) const POLICY: &str = "isolation = \"pinned\"\nvcpus = \"1\"\niothreads = \"0\"\nemulator = \"0\"\n[host]\nreserved = \"0\"\n";

/// Whether the machine has CPUs 0 and 1, and this process may use them.
pub(crate) fn has_two_cpus() -> bool {
    let cpus = nix::sched::sched_getaffinity(NixPid::from_raw(0)).unwrap();
    [0, 1].iter().all(|cpu| cpus.is_set(*cpu).unwrap())
}

/// Returns from a test where the machine is too small for it.
#[allow(unused_macros)] // not every test is of such a kind
macro_rules! needs_two_cpus {
    ($test:expr) => {
        if !crate::support::run::has_two_cpus() {
            return crate::support::skipped($test, "CPUs 0 and 1 are not to be had");
        }
    };
}
#[allow(unused_imports)]
pub(crate) use needs_two_cpus;

/// Whether this program is there, and may do that here.
#[allow(dead_code)] // not every test asks
pub(crate) fn can(command: &[&str]) -> bool {
    let mut tried = super::clean::command(command[0]);
    let tried = tried.args(&command[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// Returns from a test where the machine is too small for it, or `strace` may not trace.
#[allow(unused_macros)] // as above
macro_rules! needs_strace {
    ($test:expr) => {
        crate::support::run::needs_two_cpus!($test);
        if !crate::support::run::can(&["strace", "-qq", "-o", "/dev/null", "true"]) {
            return crate::support::skipped($test, "strace is not installed, or may not trace");
        }
    };
}
#[allow(unused_imports)]
pub(crate) use needs_strace;

/// Folders for leases and policies.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Done {
    /// Checks the exit code and that every one of these texts was said, on either stream.
    #[track_caller]
    pub(crate) fn says(&self, code: i32, texts: &[&str]) -> &Done {
        assert_eq!(self.code, Some(code), "{self:?}");
        for text in texts {
            assert!(self.out.contains(text) || self.err.contains(text), "no `{text}`: {self:?}");
        }
        self
    }
}

impl Place {
    pub(crate) fn new() -> Place {
        let shm = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("qmpin-state-");
        let dir = if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
        let place = Place { dir: dir.unwrap() };
        fs::create_dir(place.dir.path().join("config")).unwrap();
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn config(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join("config").join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Removes the state folder. A supervisor may write a file meanwhile.
    pub(crate) fn remove_state(&self) {
        wait_until("the state folder is removed", || match fs::remove_dir_all(self.state()) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => false,
            removed => removed.map(|()| true).unwrap(),
        });
    }

    /// What is in the state folder.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.state()) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The binary with its folders; `before` comes before it on the command line.
    pub(crate) fn command(&self, before: &[&str], proxmox: &Path, args: &[&str]) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_qmpin")), before, proxmox, args)
    }

    pub(crate) fn command_of(
        &self,
        binary: &Path,
        before: &[&str],
        proxmox: &Path,
        args: &[&str],
    ) -> Command {
        let mut words = before.iter().map(PathBuf::from).collect::<Vec<_>>();
        words.push(binary.to_owned());
        let mut command = super::clean::command(&words[0]);
        command.args(&words[1..]);
        command.args(args);
        command.arg("--proxmox-dir").arg(proxmox);
        command.arg("--state-dir").arg(self.state());
        command.arg("--config-dir").arg(self.dir.path().join("config"));
        command
    }
}

/// Runs a command to its end, within a limit.
pub(crate) fn finish(command: &mut Command) -> Done {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut child = Reaped(child);
    let (mut out, mut err) = (child.0.stdout.take().unwrap(), child.0.stderr.take().unwrap());
    let out = thread::spawn(move || {
        let mut text = Vec::new();
        out.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let err = thread::spawn(move || {
        let mut text = Vec::new();
        err.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    wait_until("the command has ended", || child.0.try_wait().unwrap().is_some());
    let code = child.0.wait().unwrap().code();
    Done { code, out: out.join().unwrap(), err: err.join().unwrap() }
}

/// Killed when the test is over, whatever became of it.
pub(crate) struct Reaped(pub(crate) Child);

impl Reaped {
    pub(crate) fn pid(&self) -> Pid {
        Pid(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU and the folders for it.
pub(crate) struct Stage {
    pub(crate) qemu: Qemu,
    pub(crate) place: Place,
}

impl Stage {
    /// Starts a QEMU; its policy is [`POLICY`].
    pub(crate) fn new(options: &QemuOptions) -> Stage {
        let place = Place::new();
        place.config("qmpin.toml", POLICY);
        Stage { qemu: Qemu::start(options), place }
    }

    pub(crate) fn with_policy(self, more: &str) -> Stage {
        self.place.config("qmpin.toml", format!("{more}{POLICY}"));
        self
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.place.command(&[], self.qemu.dir(), args)
    }

    pub(crate) fn run(&self, args: &[&str]) -> Done {
        finish(&mut self.command(args))
    }

    /// Runs it under other programs.
    pub(crate) fn run_under(&self, before: &[&str], args: &[&str]) -> Done {
        finish(&mut self.place.command(before, self.qemu.dir(), args))
    }

    /// `attach`, running, and READY.
    pub(crate) fn attach(&self, args: &[&str]) -> Attached {
        let mut attached = self.attach_unready(args);
        attached.wait_ready();
        attached
    }

    /// `attach`, just started.
    pub(crate) fn attach_unready(&self, args: &[&str]) -> Attached {
        let mut words = vec!["attach", "100"];
        words.extend(args);
        Attached::spawn(self.command(&words), self.place.path())
    }

    /// The masks of all threads of the VM, kernel threads beside its process included.
    pub(crate) fn masks(&self) -> BTreeMap<Tid, String> {
        let pid = self.qemu.pid();
        let mut all = masks(pid);
        let children = fs::read_to_string("/proc/2/task/2/children").unwrap_or_default();
        for kernel in children.split_whitespace().map(|pid| Pid(pid.parse().unwrap())) {
            let comm = fs::read_to_string(format!("/proc/{kernel}/comm")).unwrap_or_default();
            if comm.trim_end() == format!("kvm-pit/{pid}") {
                all.extend(masks(kernel));
            }
        }
        all
    }

    pub(crate) fn mask(&self, tid: Tid) -> String {
        mask(self.qemu.pid(), tid).unwrap()
    }

    pub(crate) fn main_thread(&self) -> Tid {
        self.qemu.pid().main_thread()
    }

    /// The vCPU's thread, by QMP.
    pub(crate) fn vcpu(&self, index: usize) -> Tid {
        let rows = self.qemu.client().must("query-cpus-fast", &serde_json::json!({}));
        let rows = rows.as_array().unwrap();
        let row = rows.iter().find(|row| row["cpu-index"] == index).unwrap();
        Tid(i32::try_from(row["thread-id"].as_i64().unwrap()).unwrap())
    }

    /// The iothread's thread, by QMP.
    pub(crate) fn iothread(&self, id: &str) -> Tid {
        let rows = self.qemu.client().must("query-iothreads", &serde_json::json!({}));
        let rows = rows.as_array().unwrap();
        let row = rows.iter().find(|row| row["id"] == id).unwrap();
        Tid(i32::try_from(row["thread-id"].as_i64().unwrap()).unwrap())
    }

    #[track_caller]
    pub(crate) fn assert_untouched(&self, before: &BTreeMap<Tid, String>) {
        assert_eq!(&self.masks(), before);
        assert_eq!(self.place.left_behind(), [""; 0]);
    }
}

/// The masks of all threads of a process, as the kernel lists them.
pub(crate) fn masks(pid: Pid) -> BTreeMap<Tid, String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return BTreeMap::new() };
    let tids = entries.map(|entry| entry.unwrap().file_name());
    let tids = tids.map(|name| Tid(name.to_str().unwrap().parse().unwrap()));
    tids.filter_map(|tid| Some((tid, mask(pid, tid)?))).collect()
}

pub(crate) fn mask(pid: Pid, tid: Tid) -> Option<String> {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    mask.map(|mask| mask.trim().to_owned())
}

/// Moves a thread as `taskset` would.
pub(crate) fn taskset(tid: Tid, cpus: &[usize]) {
    let mut mask = CpuSet::new();
    for cpu in cpus {
        mask.set(*cpu).unwrap();
    }
    sched_setaffinity(NixPid::from_raw(tid.0), &mask).unwrap();
}

/// A running `attach`, and all it has said.
pub(crate) struct Attached {
    child: Reaped,
    notify: UnixDatagram,
    notify_path: PathBuf,
    /// What it has notified the service manager of.
    pub(crate) notified: Vec<String>,
    err: Arc<Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Attached {
    pub(crate) fn spawn(mut command: Command, dir: &Path) -> Attached {
        let notify_path = tempfile::Builder::new()
            .prefix("notify-")
            .make_in(dir, |path| UnixDatagram::bind(path).map(|_| ()))
            .unwrap()
            .into_temp_path()
            .keep()
            .unwrap();
        let _ = fs::remove_file(&notify_path);
        let notify = UnixDatagram::bind(&notify_path).unwrap();
        notify.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        command.env("NOTIFY_SOCKET", &notify_path);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = Reaped(command.spawn().unwrap());
        let stderr = BufReader::new(child.0.stderr.take().unwrap());
        let err = Arc::new(Mutex::new(String::new()));
        let lines = Arc::clone(&err);
        let reader = thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut lines = lines.lock().unwrap();
                lines.push_str(&line);
                lines.push('\n');
            }
        });
        Attached { child, notify, notify_path, notified: Vec::new(), err, reader: Some(reader) }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(i32::try_from(self.child.0.id()).unwrap())
    }

    /// All it has written so far.
    pub(crate) fn err(&self) -> String {
        self.err.lock().unwrap().clone()
    }

    /// How many lines with this text it has written.
    pub(crate) fn lines_with(&self, text: &str) -> usize {
        self.err().lines().filter(|line| line.contains(text)).count()
    }

    /// Waits until it has sent the service manager a line with this text.
    #[track_caller]
    pub(crate) fn wait_told(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        while !self.notified.iter().any(|line| line.contains(text)) {
            if let Ok(length) = self.notify.recv(&mut buffer) {
                let words = String::from_utf8_lossy(&buffer[..length]).into_owned();
                self.notified.extend(words.lines().map(str::to_owned));
                continue;
            }
            let ended = self.child.0.try_wait().unwrap();
            assert!(ended.is_none(), "ended without `{text}`: {ended:?} {}", self.err());
            assert!(Instant::now() < deadline, "no `{text}`: {:?} {}", self.notified, self.err());
        }
    }

    #[track_caller]
    pub(crate) fn wait_ready(&mut self) {
        self.wait_told("READY=1");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(NixPid::from_raw(self.pid().0), signal).unwrap();
    }

    /// Kills it, so that it can restore nothing.
    pub(crate) fn kill(mut self) {
        self.child.0.kill().unwrap();
        self.wait();
    }

    /// Waits for a state, or for its end; whether the state came.
    pub(crate) fn lives_until(&mut self, mut holds: impl FnMut() -> bool) -> bool {
        let child = &mut self.child.0;
        let mut ended = false;
        wait_until("the state, or the end", || {
            ended = child.try_wait().unwrap().is_some();
            ended || holds()
        });
        !ended
    }

    /// Whether it gets to READY.
    pub(crate) fn gets_ready(&mut self) -> bool {
        let notify = self.notify.try_clone().unwrap();
        let mut buffer = [0; 4096];
        self.lives_until(|| {
            let length = notify.recv(&mut buffer).unwrap_or(0);
            buffer[..length].starts_with(b"READY=1")
        })
    }

    /// Waits for its end: the exit code, none where a signal ended it.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let child = &mut self.child.0;
        wait_until("attach has ended", || child.try_wait().unwrap().is_some());
        let code = child.wait().unwrap().code();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        code
    }

    /// Waits for its end, with this exit code.
    #[track_caller]
    pub(crate) fn end_of(mut self, code: i32) {
        assert_eq!(self.wait(), Some(code), "{}", self.err());
    }

    /// Tells it to end, and waits for that.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait(), Some(0), "{}", self.err());
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.notify_path);
    }
}
