//! What can go wrong on the wire, one variant each.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::ids::{IothreadId, Pid, Tid, VcpuIndex};
use crate::shown;

/// Why a caller did not accept the process at the other end.
pub type CheckError = Box<dyn StdError + Send + Sync>;

/// The most bytes of a peer's text that are shown in a message.
const EXCERPT_BYTES_MAX: usize = 160;

/// What was awaited when something went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// The greeting that QEMU sends to a new client.
    Greeting,
    /// The reply to the command of that name.
    Reply(Cow<'static, str>),
    /// Any event.
    Event,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Awaited::Greeting => f.write_str("the QMP greeting"),
            Awaited::Reply(command) => write!(f, "the reply to {command}"),
            Awaited::Event => f.write_str("events"),
        }
    }
}

/// Why QEMU could not be asked, or its answer not be used.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be connected to.
    #[error("could not connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel did not say which process is at the other end.
    #[error("could not tell which process serves {}", path.display())]
    PeerUnknown {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The caller did not accept the process at the other end; nothing was sent to it.
    #[error("process {pid} serves {} and is not the VM's QEMU", path.display())]
    WrongPeer {
        /// The socket.
        path: PathBuf,
        /// The process that listens on it.
        pid: Pid,
        /// Why the caller refused it.
        #[source]
        source: CheckError,
    },
    /// Another client had the socket all the time we were ready to wait.
    #[error("another client held {} for {} ms, the limit", path.display(), waited.as_millis())]
    Held {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// The first thing said was not a QMP greeting: not a QMP monitor.
    #[error("{} does not greet as a QMP monitor: `{excerpt}`", path.display())]
    NotAGreeting {
        /// The socket.
        path: PathBuf,
        /// The beginning of what was said instead.
        excerpt: String,
    },
    /// The peer was silent for too long. The session has ended.
    #[error("timeout: {awaited} did not come within {} ms{}", limit.as_millis(), dropped(*strays))]
    Timeout {
        /// What did not come.
        awaited: Awaited,
        /// How long we waited.
        limit: Duration,
        /// How many replies without an id of ours came in the session's time.
        strays: u64,
    },
    /// The peer closed the connection.
    #[error("QEMU closed the connection while {awaited} was awaited{}", partial(*partial_bytes))]
    Closed {
        /// What was awaited.
        awaited: Awaited,
        /// How much of an unfinished line had come, in bytes.
        partial_bytes: usize,
    },
    /// Reading or writing failed.
    #[error("the connection failed while {awaited} was awaited")]
    Io {
        /// What was awaited.
        awaited: Awaited,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A line was longer than we take.
    #[error("a line longer than {limit_bytes} bytes came while {awaited} was awaited")]
    LineTooLong {
        /// What was awaited.
        awaited: Awaited,
        /// The limit.
        limit_bytes: usize,
    },
    /// A line was not a JSON object with the members QMP gives them.
    #[error("bad JSON came while {awaited} was awaited: `{excerpt}`")]
    BadJson {
        /// What was awaited.
        awaited: Awaited,
        /// The beginning of the line.
        excerpt: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The awaited reply came and does not have the shape it must have.
    #[error("the reply to {command} is not as QEMU's schema has it: `{excerpt}`")]
    BadReply {
        /// The command.
        command: Cow<'static, str>,
        /// The beginning of the reply.
        excerpt: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// So much came that was not the awaited line that we stopped reading.
    #[error("{lines} other lines came while {awaited} was awaited")]
    Flood {
        /// What was awaited.
        awaited: Awaited,
        /// How many lines.
        lines: u64,
    },
    /// QEMU reports more vCPUs than we take.
    #[error("QEMU reports {count} vCPUs; the limit is {limit}")]
    TooManyVcpus {
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// QEMU reports more iothreads than we take.
    #[error("QEMU reports {count} iothreads; the limit is {limit}")]
    TooManyIothreads {
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// A vCPU's number, or a part of its place in the guest, is negative or beyond the limit.
    #[error("QEMU reports a vCPU with {member} {value}")]
    BadVcpuNumber {
        /// The member of the reply.
        member: &'static str,
        /// Its value.
        value: i64,
    },
    /// A thread number that no thread can have.
    #[error("QEMU reports thread {tid} for {owner}")]
    BadTid {
        /// Whose thread it would be.
        owner: String,
        /// The number.
        tid: i64,
    },
    /// An iothread's id that QEMU would not accept itself (`id_wellformed` in util/id.c).
    #[error("QEMU reports an iothread with the id `{excerpt}`, which is no id")]
    BadIothreadId {
        /// The beginning of the id.
        excerpt: String,
    },
    /// Two vCPUs with one number.
    #[error("QEMU reports vCPU {index} twice")]
    DuplicateVcpu {
        /// The number.
        index: VcpuIndex,
    },
    /// Two iothreads with one id.
    #[error("QEMU reports iothread {id} twice")]
    DuplicateIothread {
        /// The id.
        id: IothreadId,
    },
    /// Two roles for one thread. TCG with `thread=single` or `icount` runs all vCPUs in one thread.
    #[error("QEMU reports thread {tid} for two vCPUs or iothreads (TCG in one thread does that)")]
    DuplicateTid {
        /// The thread.
        tid: Tid,
    },
    /// QEMU said no. The session goes on.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: Cow<'static, str>,
        /// QEMU's class of the error, such as `GenericError`.
        class: String,
        /// QEMU's sentence.
        desc: String,
    },
    /// A command could not be written as JSON.
    #[error("could not write the command {command} as JSON")]
    Encode {
        /// The command.
        command: Cow<'static, str>,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The session had ended before this call.
    #[error("the QMP session has ended: {reason}")]
    Ended {
        /// The message of the error that ended it.
        reason: String,
    },
    /// Called in the wrong order: a command before [`open`](super::Session::open), or `open` twice.
    #[error("the QMP session is {state}")]
    WrongState {
        /// The state it is in.
        state: &'static str,
    },
}

impl QmpError {
    /// Whether the session goes on after it: QEMU said no, or its answer is of no use, but the
    /// stream is whole.
    #[must_use]
    pub fn leaves_session_usable(&self) -> bool {
        match self {
            QmpError::Refused { .. }
            | QmpError::BadReply { .. }
            | QmpError::TooManyVcpus { .. }
            | QmpError::TooManyIothreads { .. }
            | QmpError::BadVcpuNumber { .. }
            | QmpError::BadTid { .. }
            | QmpError::BadIothreadId { .. }
            | QmpError::DuplicateVcpu { .. }
            | QmpError::DuplicateIothread { .. }
            | QmpError::DuplicateTid { .. }
            | QmpError::Encode { .. }
            | QmpError::WrongState { .. } => true,
            QmpError::Connect { .. }
            | QmpError::PeerUnknown { .. }
            | QmpError::WrongPeer { .. }
            | QmpError::Held { .. }
            | QmpError::NotAGreeting { .. }
            | QmpError::Timeout { .. }
            | QmpError::Closed { .. }
            | QmpError::Io { .. }
            | QmpError::LineTooLong { .. }
            | QmpError::BadJson { .. }
            | QmpError::Flood { .. }
            | QmpError::Ended { .. } => false,
        }
    }

    /// Whether no process listens on the socket: it is not there, or what made it is gone.
    #[must_use]
    pub fn is_nobody_there(&self) -> bool {
        matches!(self, QmpError::Connect { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        ))
    }
}

fn dropped(strays: u64) -> String {
    match strays {
        0 => String::new(),
        1 => " (a reply without an id of ours was dropped)".to_owned(),
        n => format!(" ({n} replies without an id of ours were dropped)"),
    }
}

fn partial(bytes: usize) -> String {
    if bytes == 0 { String::new() } else { format!(", {bytes} bytes into a line") }
}

/// The beginning of a peer's bytes, safe to print: bounded, hidden characters escaped.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    let start = bytes.get(..EXCERPT_BYTES_MAX).unwrap_or(bytes);
    let mut text = shown::line(String::from_utf8_lossy(start).trim_end()).into_owned();
    if start.len() < bytes.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_short_and_cannot_drive_a_terminal() {
        let text = excerpt(&[b"\x1b[2J\xff".as_slice(), &[b'x'; 1000]].concat());
        assert!(text.starts_with("\\u{1b}[2J\u{fffd}x"), "{text}");
        assert!(text.chars().count() < EXCERPT_BYTES_MAX + 10);
        assert!(text.ends_with('…'));
        assert_eq!(excerpt(b"{}\r"), "{}");
    }
}
