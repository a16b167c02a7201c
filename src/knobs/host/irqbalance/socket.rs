//! irqbalance over its own socket: from which CPUs it excludes interrupts, and from which it is to exclude them
//! others. Thin: it decides nothing.
//!
//! ```text
//!   `setup`                      ─▶ `SLEEP 10 IRQ 7 LOAD 0 DIFF 0 CLASS 0 BANNED 000ff000`
//!   `settings cpus 12-19`        ─▶ nothing; NULL for the CPUs: those of its own choice
//! ```
//!
//! This is `sock_handle` in irqbalance.c of 1.9.4; 1.9.2 does the same on the test host. One line each way
//! for each connection, from root alone, and with credentials beside it. In turn only root is believed (or the user who
//! runs qmpin): any user can bind the abstract name. It applies a setting at the end
//! of its interval, 10 s unless `-t` says otherwise, and then tries all interrupts anew (`scan`); until then
//! `setup` says what was before.

use std::ffi::OsStr;
use std::io;
use std::io::{IoSlice, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixCredentials, sendmsg};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_to, socket_with,
    sockopt,
};
use rustix::process::geteuid;

use crate::cpuset::CpuSet;
use crate::ids::Pid;
use crate::peer::Peer;
use crate::sysroot::SysRoot;
use crate::{peer, shown};

/// Where its sockets are (`SOCKET_TMPFS` in irqbalance.h).
pub const SOCKETS: &str = "run/irqbalance";

/// How long all that run may take to answer, together. One does so between two scans, which take milliseconds.
pub const PATIENCE: Duration = Duration::from_millis(300);
/// The longest interval between two scans that is believed. Others wait for its end.
const INTERVAL_S_MAX: u32 = 3600;
/// How long one may take that does not ignore SIGPIPE, as those not started by systemd: to answer where
/// has been closed would end it.
const PATIENCE_WITH_THE_FRAGILE: Duration = Duration::from_secs(10);
/// The bit of SIGPIPE, 13, in `SigIgn` (`Documentation/filesystems/proc.rst`).
const SIGPIPE: u64 = 1 << 12;
/// The longest answer that is read: some 80 bytes for each interrupt that it is to leave alone.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// The longest request that it reads.
const REQUEST_BYTES_MAX: usize = 500;
/// The socket of one that cannot write to [`SOCKETS`] is in the abstract namespace, and the whole of its
/// name is zeros (`init_socket` in irqbalance.c).
const ABSTRACT: [u8; 108] = [0; 108];

/// How irqbalance is set up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setup {
    /// Between two scans, in seconds.
    pub interval_s: u32,
    /// The CPUs from which it excludes interrupts.
    pub banned: CpuSet,
}

/// Why irqbalance could not be asked or configured.
#[derive(Debug, thiserror::Error)]
pub enum IrqbalanceError {
    /// There is no socket, or no process listens.
    #[error("there is no socket to reach it")]
    Reach(#[source] io::Error),
    /// Another process listens.
    #[error("process {found} listens on its socket")]
    OtherPeer {
        /// Which one.
        found: Pid,
    },
    /// A process of an unprivileged user listens.
    #[error("process {found} of user {uid} listens on its socket, and only root is believed")]
    NotRoot {
        /// Which one.
        found: Pid,
        /// Its user.
        uid: u32,
    },
    /// It did not answer in time, or the line broke.
    #[error("it does not answer")]
    Talk(#[source] io::Error),
    /// It closes the line without a word, as to everybody but root.
    #[error("it does not let us ask")]
    Refused,
    /// It answers, and that is not what the versions known answer.
    #[error("its answer is not understood: `{answer}`")]
    NotUnderstood {
        /// The beginning of what it said.
        answer: String,
    },
    /// It reads no more than so many bytes.
    #[error("the list of CPUs takes {bytes} bytes, and it reads {REQUEST_BYTES_MAX}")]
    TooLong {
        /// How many the request has.
        bytes: usize,
    },
}

/// The socket of the irqbalance with that pid.
#[must_use]
pub fn socket_name(pid: Pid) -> String {
    format!("irqbalance{pid}.sock")
}

/// The pid in the name of a socket.
#[must_use]
pub fn pid_of_socket(name: &str) -> Option<Pid> {
    let pid = name.strip_prefix("irqbalance")?.strip_suffix(".sock")?.parse().ok()?;
    (pid > 0).then_some(Pid(pid))
}

/// Returns how it is set up. It is waited for until `deadline`.
///
/// # Errors
/// [`IrqbalanceError`]. An answer that is not understood is never guessed at.
pub fn ask(root: &SysRoot, pid: Pid, deadline: Instant) -> Result<Setup, IrqbalanceError> {
    Line::to(root, pid, deadline)?.setup(root, deadline)
}

/// Sets the CPUs from which it excludes interrupts; none: those of its own choice, which are those that the
/// kernel was booted to isolate, unless its environment says otherwise (`setup_banned_cpus` in cputree.c).
/// It says nothing to that, and takes it at the end of its interval.
///
/// # Errors
/// [`IrqbalanceError`].
pub fn tell(
    root: &SysRoot,
    pid: Pid,
    banned: &CpuSet,
    deadline: Instant,
) -> Result<(), IrqbalanceError> {
    // An empty list would be read as CPU 0, or as no word at all, which ends it (`__bitmap_parselist`,
    // `strtok`).
    let cpus = if banned.is_empty() { "NULL".to_owned() } else { banned.to_string() };
    let request = format!("settings cpus {cpus}");
    if request.len() > REQUEST_BYTES_MAX {
        return Err(IrqbalanceError::TooLong { bytes: request.len() });
    }
    let answer = Line::to(root, pid, deadline)?.talk(&request, deadline)?;
    if answer.is_empty() { Ok(()) } else { Err(not_understood(&answer)) }
}

/// A line to an irqbalance, good for one request.
#[derive(Debug)]
pub struct Line {
    socket: UnixStream,
    pid: Pid,
}

impl Line {
    /// To the one with that pid.
    ///
    /// # Errors
    /// [`IrqbalanceError`] where no process, another one or an unprivileged one listens.
    pub fn to(root: &SysRoot, pid: Pid, deadline: Instant) -> Result<Line, IrqbalanceError> {
        let path = root.path(&format!("{SOCKETS}/{}", socket_name(pid)));
        let path = path.map_err(|error| IrqbalanceError::Reach(error.source))?;
        let line = match Line::of(&path, deadline) {
            Err(IrqbalanceError::Reach(error))
                if error.kind() == io::ErrorKind::NotFound && root.is_live() =>
            {
                Line::of(OsStr::from_bytes(&ABSTRACT).as_ref(), deadline)
            }
            line => line,
        }?;
        if line.pid == pid { Ok(line) } else { Err(IrqbalanceError::OtherPeer { found: line.pid }) }
    }

    /// To the one without a path; `None`: there is no such socket.
    ///
    /// # Errors
    /// [`IrqbalanceError::NotRoot`] where the socket is of a process that is not to be believed.
    pub fn to_unnamed(root: &SysRoot, deadline: Instant) -> Result<Option<Line>, IrqbalanceError> {
        if !root.is_live() {
            return Ok(None);
        }
        match Line::of(OsStr::from_bytes(&ABSTRACT).as_ref(), deadline) {
            Ok(line) => Ok(Some(line)),
            Err(error @ IrqbalanceError::NotRoot { .. }) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// Who listens.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    fn of(path: &Path, deadline: Instant) -> Result<Line, IrqbalanceError> {
        let reached = || {
            let asked = peer::now();
            let socket = connect(path, deadline)?;
            let peer = Peer::of(&socket, asked)?;
            io::Result::Ok((socket, peer))
        };
        let (socket, peer) = reached().map_err(IrqbalanceError::Reach)?;
        let (pid, uid) = (peer.pid(), peer.uid());
        if peer.is_root() || uid == geteuid().as_raw() {
            Ok(Line { socket, pid })
        } else {
            Err(IrqbalanceError::NotRoot { found: pid, uid })
        }
    }

    /// As [`ask`].
    ///
    /// # Errors
    /// [`IrqbalanceError`].
    pub fn setup(self, root: &SysRoot, deadline: Instant) -> Result<Setup, IrqbalanceError> {
        let deadline = if ignores_sigpipe(root, self.pid) {
            deadline
        } else {
            Instant::now() + PATIENCE_WITH_THE_FRAGILE
        };
        let answer = self.talk("setup", deadline)?;
        if answer.is_empty() {
            return Err(IrqbalanceError::Refused);
        }
        parse_setup(&answer).ok_or_else(|| not_understood(&answer))
    }

    /// One request, and all that is answered until it closes the line.
    fn talk(self, request: &str, deadline: Instant) -> Result<Vec<u8>, IrqbalanceError> {
        let credentials = UnixCredentials::new();
        let beside = [ControlMessage::ScmCredentials(&credentials)];
        let bytes = [IoSlice::new(request.as_bytes())];
        let (fd, no_signal) = (self.socket.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
        // So short a message is taken whole by a line that is empty, or not at all.
        sendmsg::<()>(fd, &bytes, &beside, no_signal, None)
            .map_err(|errno| IrqbalanceError::Talk(errno.into()))?;
        read_all(self.socket, deadline).map_err(IrqbalanceError::Talk)
    }
}

fn ignores_sigpipe(root: &SysRoot, pid: Pid) -> bool {
    let status = root.read_lossy(&format!("proc/{pid}/status")).unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & SIGPIPE != 0)
}

fn not_understood(answer: &[u8]) -> IrqbalanceError {
    let start = String::from_utf8_lossy(&answer[..answer.len().min(80)]).into_owned();
    IrqbalanceError::NotUnderstood { answer: shown::line(&start).into_owned() }
}

/// The time that is left; none is an error, and would mean to wait for ever.
fn left_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A path that begins with a zero byte is a name in the abstract namespace (`unix(7)`).
fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = match path.as_os_str().as_bytes().strip_prefix(&[0]) {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(path)?,
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // It holds for `connect`, too: a backlog is full where irqbalance hangs (`unix_stream_connect`).
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left_until(deadline)?))?;
    connect_to(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn read_all(mut socket: UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut room = [0; 4096];
    loop {
        socket.set_read_timeout(Some(left_until(deadline)?))?;
        match socket.read(&mut room) {
            Ok(0) => return Ok(answer),
            Ok(length) => answer.extend_from_slice(&room[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
        if answer.len() > ANSWER_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer has no end"));
        }
    }
}

/// `SLEEP 10 `, then what there is of `IRQ 7 LOAD 0 DIFF 0 CLASS 0 `, then `BANNED 000ff000`.
fn parse_setup(answer: &[u8]) -> Option<Setup> {
    let words: Vec<&str> = std::str::from_utf8(answer).ok()?.split(' ').collect();
    let ["SLEEP", interval_s, irqs @ .., "BANNED", banned] = words.as_slice() else { return None };
    let is_number = |word: &str| word.parse::<i128>().is_ok();
    let is_irq = |words: &[&str]| match words {
        ["IRQ", irq, "LOAD", load, "DIFF", diff, "CLASS", class] => {
            [irq, load, diff, class].into_iter().all(|word| is_number(word))
        }
        _ => false,
    };
    irqs.chunks(8).all(is_irq).then_some(())?;
    let banned = CpuSet::parse_cpumask(banned)?;
    let interval_s = interval_s.parse().ok().filter(|interval_s| *interval_s <= INTERVAL_S_MAX)?;
    Some(Setup { interval_s, banned })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(answer: &str) -> Option<(u32, String)> {
        let setup = parse_setup(answer.as_bytes())?;
        Some((setup.interval_s, setup.banned.to_string()))
    }

    #[test]
    fn what_irqbalance_answers_is_understood() {
        for (answer, interval_s, banned) in [
            ("SLEEP 10 BANNED 00000000", 10, ""),
            ("SLEEP 1 BANNED 000ff000", 1, "12-19"),
            ("SLEEP 10 BANNED 00000001,00000000,00000003", 10, "0-1,64"),
            ("SLEEP 10 IRQ 9 LOAD 0 DIFF 18446744073709551615 CLASS -1 BANNED 00000002", 10, "1"),
            (
                "SLEEP 10 IRQ 9 LOAD 0 DIFF 0 CLASS 0 IRQ 24 LOAD 7 DIFF 1 CLASS 5 BANNED 00000002",
                10,
                "1",
            ),
        ] {
            assert_eq!(parsed(answer), Some((interval_s, banned.to_owned())), "{answer}");
        }
    }

    #[test]
    fn anything_else_is_not_guessed_at() {
        for answer in [
            "",
            "SLEEP 10",
            "SLEEP 10 BANNED",
            "SLEEP 10 BANNED ",
            "SLEEP x BANNED 00000000",
            "SLEEP -1 BANNED 00000000",
            "SLEEP 3601 BANNED 00000000",
            "SLEEP 4294967295 BANNED 00000000",
            "SLEEP 10 BANNED 00000000 MORE 1",
            "SLEEP 10 MODE fast BANNED 00000000",
            "SLEEP 10 IRQ 9 LOAD 0 BANNED 00000002",
            "SLEEP 10 IRQ 9 LOAD 0 DIFF 0 CLASS x BANNED 00000002",
            "SLEEP 10 BANNED 4-5",
            "BANNED 00000000 SLEEP 10",
        ] {
            assert_eq!(parsed(answer), None, "{answer:?}");
        }
    }

    #[test]
    fn a_socket_is_named_after_its_process() {
        assert_eq!(pid_of_socket(&socket_name(Pid(812))), Some(Pid(812)));
        for name in ["irqbalance.sock", "irqbalance-1.sock", "irqbalance0.sock", "other812.sock"] {
            assert_eq!(pid_of_socket(name), None, "{name}");
        }
    }
}
