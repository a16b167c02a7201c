//! Which process is the VM's QEMU, and may it be believed?
//!
//! ```text
//!   Proxmox: pid file ─▶ PID ─▶ its command line has `-pidfile <that file>` ─▶ it listens on the socket
//!   --qmp:                                                         the process that listens on the socket
//! ```
//!
//! The kernel says who listens, and `peer.rs` proves it. A process is (pid, start time) from then on: pids are used
//! again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid as RustixPid, PidfdFlags, pidfd_open};

use super::{stat, tasks};
use crate::ids::{Pid, Tid, VmName};
use crate::state_file::read_config;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::{ProcessKey, ThreadKey};

/// Where to find a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VmLocation {
    /// A Proxmox VM: `<dir>/<vmid>.pid` and `<dir>/<vmid>.qmp`.
    Proxmox {
        /// `/run/qemu-server`.
        dir: PathBuf,
    },
    /// Any QEMU, by its QMP socket.
    Socket {
        /// The socket.
        path: PathBuf,
    },
}

/// Why a process is not taken for the VM's QEMU.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no pid file.
    #[error("VM {vm} is not running: there is no {}", path.display())]
    NoPidFile {
        /// Which VM.
        vm: VmName,
        /// Where its pid file would be.
        path: PathBuf,
    },
    /// The pid file cannot be read, or holds no pid.
    #[error("the pid file {} cannot be used", path.display())]
    BadPidFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The pid file is a leftover.
    #[error("VM {vm} is not running: {} says {pid}, and {reason}", path.display())]
    Stale {
        /// Which VM.
        vm: VmName,
        /// The pid file.
        path: PathBuf,
        /// What it says.
        pid: Pid,
        /// Why that is not the VM's QEMU.
        reason: String,
    },
    /// Another program listens on the socket.
    #[error("process {found} listens on the QMP socket, but the VM's QEMU is process {expected}")]
    WrongPeer {
        /// Who listens.
        found: Pid,
        /// Who should.
        expected: Pid,
    },
    /// The process that made the socket has ended, and another one serves it.
    #[error(
        "process {pid} made the socket and has ended; its number may be another process's by now"
    )]
    PeerEnded {
        /// Its number.
        pid: Pid,
    },
    /// The process of the listener's number runs as a user that cannot have made the socket.
    #[error("user {listener} made the socket, but process {pid} runs as user {}", in_words(*found))]
    PeerUser {
        /// The process.
        pid: Pid,
        /// The user that the kernel recorded at `listen`.
        listener: u32,
        /// Its real, effective and saved user now.
        found: [u32; 3],
    },
    /// The process ended, and its number is another's.
    #[error("process {pid} is no longer the one it was")]
    Replaced {
        /// Which number.
        pid: Pid,
    },
    /// The socket answered, and no process was seen to serve it.
    #[error("could not tell which process serves {}", socket.display())]
    NoPeer {
        /// The socket.
        socket: PathBuf,
    },
    /// The process ended meanwhile.
    #[error("process {pid} has ended")]
    Gone {
        /// Which one.
        pid: Pid,
        /// What the kernel said.
        #[source]
        source: Box<ReadError>,
    },
}

fn in_words(uids: [u32; 3]) -> String {
    let [real, effective, saved] = uids;
    if real == effective && effective == saved {
        real.to_string()
    } else {
        format!("{real} (effective {effective}, saved {saved})")
    }
}

impl ProcessError {
    /// Whether the VM simply does not run, as opposed to looking wrong.
    #[must_use]
    pub fn is_not_running(&self) -> bool {
        matches!(
            self,
            ProcessError::NoPidFile { .. } | ProcessError::Stale { .. } | ProcessError::Gone { .. }
        )
    }

    /// Whether it may be a pid file that is just being written, possibly over a leftover.
    #[must_use]
    pub fn may_be_young(&self) -> bool {
        match self {
            ProcessError::Stale { .. } => true,
            ProcessError::BadPidFile { source, .. } => source.kind() == io::ErrorKind::InvalidData,
            _ => false,
        }
    }
}

/// Names the process with this pid for good.
///
/// # Errors
/// [`ProcessError::Gone`].
pub fn process_key(root: &SysRoot, pid: Pid) -> Result<ProcessKey, ProcessError> {
    let gone = |source| ProcessError::Gone { pid, source: Box::new(source) };
    let stat = stat::of(root, pid).map_err(gone)?;
    Ok(ProcessKey { pid, start: stat.start })
}

/// Whether the process is known to be still the one it was.
#[must_use]
pub fn is_alive(root: &SysRoot, process: ProcessKey) -> bool {
    lives(root, process).unwrap_or(false)
}

/// Opens the pidfd of a process; `None`: it has ended.
///
/// # Errors
/// Those of `pidfd_open(2)`.
pub(crate) fn pidfd_of(root: &SysRoot, process: ProcessKey) -> io::Result<Option<OwnedFd>> {
    let pid = RustixPid::from_raw(process.pid.0).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Err(Errno::SRCH) => return Ok(None),
        opened => opened?,
    };
    // Only now: the descriptor is of the process that has the number, and that must be this one.
    Ok(is_alive(root, process).then_some(pidfd))
}

/// Whether the process is still the one it was. A zombie is not: its threads are gone.
///
/// # Errors
/// [`ReadError`] where that could not be learnt. Nothing may be forgotten then.
pub fn lives(root: &SysRoot, process: ProcessKey) -> Result<bool, ReadError> {
    let main = ThreadKey { tid: process.pid.main_thread(), start: process.start };
    tasks::is_thread(root, main)
}

/// The QEMU process of a Proxmox VM, by its pid file and its command line.
///
/// # Errors
/// [`ProcessError`]: no VM of that name runs here, or the file is not to be believed.
pub fn proxmox_process(
    root: &SysRoot,
    dir: &Path,
    vm: &VmName,
) -> Result<ProcessKey, ProcessError> {
    let path = dir.join(format!("{vm}.pid"));
    let bad = |source| ProcessError::BadPidFile { path: path.clone(), source };
    let text = match read_config(&path, 64) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ProcessError::NoPidFile { vm: vm.clone(), path });
        }
        Err(error) => return Err(bad(error)),
    };
    let pid = text.trim().parse::<i32>().ok().filter(|pid| *pid > 0).ok_or_else(|| {
        let text = format!("`{}` is not a process number", text.trim().escape_default());
        bad(io::Error::new(io::ErrorKind::InvalidData, text))
    })?;
    let pid = Pid(pid);
    let stale = |reason: &str| ProcessError::Stale {
        vm: vm.clone(),
        path: path.clone(),
        pid,
        reason: reason.to_owned(),
    };
    let stat = stat::of(root, pid)
        .ok()
        .filter(|stat| !stat.is_dead())
        .ok_or_else(|| stale("there is no such process"))?;
    let line = root
        .read_lossy(&format!("proc/{pid}/cmdline"))
        .map_err(|_| stale("its command line cannot be read"))?;
    if !is_qemu_of(&line, &path) {
        return Err(stale("that process is no QEMU started with this pid file"));
    }
    Ok(ProcessKey { pid, start: stat.start })
}

/// Proxmox's own check (`PVE/QemuServer/Helpers.pm: parse_cmdline`): the program is `kvm` or
/// `qemu-*`, and its `-pidfile` is this file.
fn is_qemu_of(command_line: &str, pid_file: &Path) -> bool {
    let mut words = command_line.split('\0');
    let program = words.next().unwrap_or("").rsplit('/').next().unwrap_or("");
    if program != "kvm" && !program.starts_with("qemu-") {
        return false;
    }
    while let Some(word) = words.next() {
        if word == "-pidfile" || word == "--pidfile" {
            return words.next().is_some_and(|path| same_run_path(Path::new(path), pid_file));
        }
    }
    false
}

/// Proxmox writes `/var/run`, which is a link to `/run`.
fn same_run_path(a: &Path, b: &Path) -> bool {
    fn strip(path: &Path) -> &Path {
        match path.strip_prefix("/var") {
            Ok(rest) if rest.starts_with("run") => rest,
            _ => path.strip_prefix("/").unwrap_or(path),
        }
    }
    a.is_absolute() && b.is_absolute() && strip(a) == strip(b)
}

/// The children of a thread, with one read; `None`: on a kernel without `CONFIG_PROC_CHILDREN`. As processes end while
/// it is read, the kernel may leave out others (`fs/proc/array.c: get_children_pid`).
pub(crate) fn children_of(root: &SysRoot, thread: Tid) -> Option<Vec<Tid>> {
    let text = root.read(&format!("proc/{thread}/task/{thread}/children")).ok()?;
    Some(text.split_ascii_whitespace().filter_map(|tid| tid.parse().ok().map(Tid)).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ids::StartTicks;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Machine {
            Machine(tempfile::tempdir().expect("a temporary folder"))
        }

        fn process(&self, pid: i32, state: char, command_line: &[&str]) {
            let dir = self.0.path().join(format!("proc/{pid}"));
            fs::create_dir_all(&dir).expect("mkdir");
            let zeros = "0 ".repeat(18);
            fs::write(dir.join("stat"), format!("{pid} (kvm) {state} {zeros}777 0 0 0\n"))
                .expect("stat");
            fs::write(dir.join("cmdline"), format!("{}\0", command_line.join("\0")))
                .expect("cmdline");
        }

        fn find(&self, pid_file: Option<&str>) -> Result<ProcessKey, ProcessError> {
            let dir = self.0.path().join("run");
            fs::create_dir_all(&dir).expect("mkdir");
            if let Some(text) = pid_file {
                fs::write(dir.join("100.pid"), text).expect("pid file");
            }
            proxmox_process(&SysRoot::at(self.0.path()), &dir, &"100".parse().expect("a name"))
        }

        fn pid_file(&self) -> String {
            self.0.path().join("run/100.pid").display().to_string()
        }
    }

    #[test]
    fn the_vms_own_qemu_is_found() {
        let machine = Machine::new();
        machine.process(42, 'S', &["/usr/bin/kvm", "-id", "100", "-pidfile", &machine.pid_file()]);
        let found = machine.find(Some("42\n")).expect("found");
        assert_eq!(found, ProcessKey { pid: Pid(42), start: StartTicks(777) });
    }

    #[test]
    fn a_leftover_pid_file_is_not_a_running_vm() {
        let machine = Machine::new();
        assert!(machine.find(None).expect_err("no file").is_not_running());
        assert!(machine.find(Some("42\n")).expect_err("no process").is_not_running());
        let file = machine.pid_file();
        for line in [
            vec!["/usr/bin/kvm", "-pidfile", "/run/qemu-server/101.pid"],
            vec!["/bin/sh", "-pidfile", &file],
            vec!["/usr/bin/kvm", &file],
            vec!["/usr/bin/kvm", "-pidfile"],
            vec![""],
        ] {
            machine.process(42, 'S', &line);
            assert!(machine.find(Some("42\n")).expect_err("stale").is_not_running(), "{line:?}");
        }
        machine.process(42, 'Z', &["/usr/bin/kvm", "-pidfile", &file]);
        assert!(machine.find(Some("42")).expect_err("a zombie").is_not_running());
    }

    #[test]
    fn a_bad_pid_file_is_an_error_with_its_path() {
        let machine = Machine::new();
        for text in ["", "x", "-1", "0", "1 2", "99999999999"] {
            let error = machine.find(Some(text)).expect_err(text);
            assert!(!error.is_not_running() && error.to_string().contains("100.pid"), "{error}");
        }
    }

    #[test]
    fn var_run_and_run_are_the_same_folder() {
        assert!(same_run_path(Path::new("/var/run/q/1.pid"), Path::new("/run/q/1.pid")));
        assert!(!same_run_path(Path::new("/var/lib/q/1.pid"), Path::new("/lib/q/1.pid")));
        assert!(!same_run_path(Path::new("run/q/1.pid"), Path::new("/run/q/1.pid")));
    }
}
