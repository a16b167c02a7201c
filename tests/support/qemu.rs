//! A real QEMU, started the way Proxmox VE does it, and killed when the test is over.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use qmpin::ids::{Pid, Tid, VmName};
use qmpin::qmp::ChannelPaths;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

/// How long a real QEMU may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accel {
    Kvm,
    Tcg,
}

/// Whether KVM can be used here.
pub(crate) fn has_kvm() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The Debian tree with a newer QEMU, from the environment.
pub(crate) fn newer_qemu_root() -> Option<PathBuf> {
    std::env::var_os("QMPIN_QEMU_ROOT").filter(|root| !root.is_empty()).map(PathBuf::from)
}

/// What to start.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)] // each is named where it is given
pub(crate) struct QemuOptions {
    pub(crate) accel: Accel,
    pub(crate) vcpus: u32,
    pub(crate) vcpus_max: u32,
    pub(crate) iothreads: u32,
    /// Whether the VM waits for `cont` (`-S`).
    pub(crate) paused: bool,
    /// Whether the command line has the socket `100.qmpin`, as a Proxmox user's `args:` would.
    pub(crate) own_socket: bool,
    /// A tree whose QEMU is taken instead of the machine's.
    pub(crate) root: Option<PathBuf>,
    pub(crate) extra: Vec<String>,
    /// Whether threads have names (`debug-threads`).
    pub(crate) named_threads: bool,
    /// Whether the pid file is `100.pid`, as on Proxmox, or another that qmpin does not know.
    pub(crate) pid_file: bool,
    /// Whether it is in a PID namespace of its own, where it has other numbers.
    pub(crate) pid_namespace: bool,
}

impl Default for QemuOptions {
    fn default() -> QemuOptions {
        QemuOptions {
            accel: Accel::Tcg,
            vcpus: 1,
            vcpus_max: 0,
            iothreads: 0,
            paused: true,
            own_socket: false,
            root: None,
            extra: Vec::new(),
            named_threads: true,
            pid_file: true,
            pid_namespace: false,
        }
    }
}

/// A running QEMU: VM 100.
pub(crate) struct Qemu {
    dir: tempfile::TempDir,
    pid: Pid,
    pidfd: OwnedFd,
}

impl Qemu {
    /// Starts QEMU and returns when its sockets listen.
    pub(crate) fn start(options: &QemuOptions) -> Qemu {
        let dir = tempfile::Builder::new().prefix("qmpin-qemu-").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let mut command = qemu_command(options.root.as_deref());
        let debug_threads = if options.named_threads { "on" } else { "off" };
        command.args(["-name", &format!("vm100,debug-threads={debug_threads}"), "-no-shutdown"]);
        command
            .arg("-chardev")
            .arg(format!("socket,id=qmp,path={},server=on,wait=off", at("100.qmp")));
        command.args(["-mon", "chardev=qmp,mode=control"]);
        let pid_file = if options.pid_file { "100.pid" } else { "other.pid" };
        command.args(["-pidfile", &at(pid_file)]);
        command.args(["-M", "q35", "-nodefaults", "-display", "none", "-m", "64"]);
        match options.accel {
            Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"]),
            Accel::Tcg => command.args(["-accel", "tcg"]),
        };
        let vcpus_max = options.vcpus_max.max(options.vcpus);
        command.arg("-smp").arg(format!(
            "{},sockets=1,cores={vcpus_max},threads=1,maxcpus={vcpus_max}",
            options.vcpus
        ));
        for number in 0..options.iothreads {
            command.arg("-object").arg(format!("iothread,id=iothread-virtioscsi{number}"));
        }
        if options.paused {
            command.arg("-S");
        }
        command.args(&options.extra);
        if options.own_socket {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", at("100.qmpin")));
        }
        let pid = if options.pid_namespace {
            // QEMU makes its monitors in the order of its command line.
            let last = dir.path().join(if options.own_socket { "100.qmpin" } else { "100.qmp" });
            start_in_namespace(&command, &last)
        } else {
            let output = command.arg("-daemonize").output().expect("QEMU is installed");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            fs::read_to_string(dir.path().join(pid_file)).unwrap().trim().parse().unwrap()
        };
        let pidfd =
            pidfd_open(rustix::process::Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        Qemu { dir, pid: Pid(pid), pidfd }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// What stands for `/run/qemu-server`.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn paths(&self) -> ChannelPaths {
        ChannelPaths::proxmox(self.dir(), &"100".parse::<VmName>().unwrap())
    }

    /// The process's threads and their names.
    pub(crate) fn threads(&self) -> BTreeMap<Tid, String> {
        let entries = fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap();
        let mut threads = BTreeMap::new();
        for entry in entries {
            let entry = entry.unwrap();
            let tid = entry.file_name().to_str().unwrap().parse().unwrap();
            if let Ok(comm) = fs::read_to_string(entry.path().join("comm")) {
                threads.insert(Tid(tid), comm.trim_end().to_owned());
            }
        }
        threads
    }

    /// The shared libraries the process has loaded.
    pub(crate) fn libraries(&self) -> Vec<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap();
        let mut found: Vec<String> = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .filter(|path| path.contains(".so"))
            .map(str::to_owned)
            .collect();
        found.sort();
        found.dedup();
        found
    }

    pub(crate) fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// Kills it and returns when it is gone.
    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        wait_until("QEMU is gone", || !self.is_alive());
    }

    /// A client of the shared socket.
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.paths().shared)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// Starts QEMU as the first process of a PID namespace, and waits until it listens on `socket`. Returns its process
/// number outside.
fn start_in_namespace(qemu: &Command, socket: &Path) -> i32 {
    let mut command = super::clean::command("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--"]);
    let mut outside = command.arg(qemu.get_program()).args(qemu.get_args()).spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", outside.id());
    // Reaps it, so that no zombie stays.
    std::thread::spawn(move || outside.wait());
    wait_until("QEMU listens", || UnixStream::connect(socket).is_ok());
    fs::read_to_string(children).unwrap().trim().parse().unwrap()
}

fn qemu_command(root: Option<&Path>) -> Command {
    let Some(root) = root else { return super::clean::command("qemu-system-x86_64") };
    // By the tree's own loader: no chroot, so the sockets have one name inside and outside.
    let mut command = super::clean::command(root.join("usr/lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(root.join("usr/lib/x86_64-linux-gnu"));
    command.arg(root.join("usr/bin/qemu-system-x86_64"));
    command.arg("-L").arg(root.join("usr/share/qemu"));
    command.arg("-L").arg(root.join("usr/share/seabios"));
    command
}

/// How many clients are connected to a socket, those included that wait in its backlog. Each has a line in
/// `/proc/net/unix` with the path of the one that listens, which has one itself.
pub(crate) fn clients_of(path: &Path) -> usize {
    let path = path.display().to_string();
    let lines = fs::read_to_string("/proc/net/unix").unwrap();
    let of_path = lines.lines().filter(|line| line.split_ascii_whitespace().last() == Some(&path));
    of_path.count() - 1
}

/// Waits for a state, in real time, and says which one did not come.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// So many lines of the session before are skipped.
const LINES_BEFORE_MAX: usize = 8;

/// A simple blocking QMP client, as others on the host would use.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects and negotiates.
    pub(crate) fn connect(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Client { stream: BufReader::new(stream) };
        // An event or a reply of the session before may come first (proto-notes/quirks.md).
        let is_greeting = (0..LINES_BEFORE_MAX).any(|_| client.line().get("QMP").is_some());
        assert!(is_greeting, "QEMU does not greet");
        client.ask("qmp_capabilities", &json!({}));
        client
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: `{line}`"))
    }

    /// Executes a command and returns its whole answer; events are skipped.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
        loop {
            let message = self.line();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    /// Sends a command that may be the last: the answer is not waited for.
    pub(crate) fn ask_last(&mut self, command: &str) {
        let text = json!({"execute": command}).to_string();
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
        let _ = self.stream.read_line(&mut String::new());
    }

    /// Executes a command that must succeed.
    pub(crate) fn must(&mut self, command: &str, arguments: &Value) -> Value {
        let mut answer = self.ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// Plugs the vCPU of that index, as Proxmox does: what it takes is asked of QEMU.
    pub(crate) fn plug_vcpu(&mut self, index: u32) {
        let slots = self.must("query-hotpluggable-cpus", &json!({}));
        let is_free =
            |slot: &&Value| slot["props"]["core-id"] == index && slot.get("qom-path").is_none();
        let slot = slots.as_array().and_then(|slots| slots.iter().find(is_free));
        let slot = slot.unwrap_or_else(|| panic!("no slot for vCPU {index}: {slots}"));
        let mut arguments = slot["props"].clone();
        arguments["driver"] = slot["type"].clone();
        arguments["id"] = json!(format!("cpu{}", index + 1));
        self.must("device_add", &arguments);
    }
}
