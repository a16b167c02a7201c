//! The QMP session: how qmpin asks QEMU which host thread is which.
//!
//! Called by `discover` (who is which thread) and `supervise` (hints that something changed). It
//! knows the wire and nothing of pinning.
//!
//! ```text
//!              connect               open                    close, timeout, bad line
//!   (nothing) --------> Connected ----------> Open <--+ ----------------------------> Ended
//!                        |  the caller checks  |      | execute, query_roles,
//!                        |  peer() here        +------+ next_event
//!                        +---- close, timeout, bad line --------------------------> Ended
//! ```
//!
//! *Theory of operation.* QMP is lines of JSON over a Unix socket
//! (`docs/interop/qmp-spec.rst` in QEMU). Every command carries an id of ours and only a reply with
//! that id is taken. Whatever else arrives (events, strays of an earlier client, lines we do not
//! know) is kept or dropped, counted in [`Tolerated`], and bounded. Anything that leaves the stream
//! in doubt, a timeout first of all, ends the session: later calls fail at once with
//! [`QmpError::Ended`]. "QEMU said no" ([`QmpError::Refused`]) does not.
//!
//! A socket that Proxmox shares with us is visited by a [`lease()`] of a few milliseconds. A
//! [`Channel`] picks the best way there is and falls back to leases.

mod channel;
mod connect;
mod error;
mod event;
mod greeting;
mod lease;
mod line;
mod memory;
mod roles;
mod runtime_monitor;
mod session;
mod wire;

pub use channel::{Channel, ChannelKind, ChannelPaths, Happening, PeerCheck, Upgrade};
pub use error::{Awaited, CheckError, QmpError};
pub use event::{EVENTS_KNOWN, QmpEvent};
pub use greeting::Greeting;
pub use lease::{LeaseReport, lease};
pub use memory::Backend;
pub use roles::{GuestPosition, Iothread, Roles, Vcpu};
pub use runtime_monitor::{
    MONITOR_CHARDEV_ID, MONITOR_OBJECT_ID, RuntimeMonitor, add_runtime_monitor,
};
pub use session::Session;

use std::time::Duration;

use serde::Serialize;

/// Whether QEMU is asked for the guest's memory, too. Each byte that is sent holds a shared monitor a little longer,
/// and on a host with one memory node the answer makes no difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AskMemory {
    /// It is not asked.
    #[default]
    No,
    /// It is asked each time.
    Yes,
}

/// What is asked of a QMP peer and accepted, and for how long it is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest line read, in bytes without the newline. No more than this is ever buffered.
    pub line_bytes_max: usize,
    /// The most vCPUs accepted, and the bound of `cpu-index`.
    pub vcpus_max: usize,
    /// The most vCPUs that are taken for such; `None`: all. The rest is in [`Roles::beyond`].
    pub vcpus_named_max: Option<usize>,
    /// The most iothreads accepted.
    pub iothreads_max: usize,
    /// Whether the guest's memory is asked for.
    pub memory: AskMemory,
    /// The most lines that are not the awaited one, while a greeting or reply is awaited.
    pub noise_lines_max: u64,
    /// How long the greeting of a socket of our own may take, its connection included.
    pub greeting_timeout: Duration,
    /// How long the reply to a command may take.
    pub reply_timeout: Duration,
    /// The longest a lease may hold a shared socket, from the greeting on.
    pub hold_max: Duration,
    /// The longest wait while another client holds a shared socket.
    pub wait_turn_max: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            line_bytes_max: 1 << 20,
            vcpus_max: 4096,
            vcpus_named_max: None,
            iothreads_max: 1024,
            memory: AskMemory::No,
            noise_lines_max: 4096,
            greeting_timeout: Duration::from_secs(1),
            reply_timeout: Duration::from_secs(5),
            hold_max: Duration::from_secs(1),
            wait_turn_max: Duration::from_secs(60),
        }
    }
}

/// What was odd and let pass. All are counts since the session or channel began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tolerated {
    /// Events whose name is not in [`EVENTS_KNOWN`].
    pub unknown_events: u64,
    /// Known events whose data is not as QEMU's schema has it (a new enum value, a lost member).
    pub odd_events: u64,
    /// Events with data too long or too deep to keep; they are delivered without it.
    pub stripped_events: u64,
    /// Events like one already waiting, which were put together with it.
    pub coalesced_events: u64,
    /// Events pushed out of a full queue by newer ones.
    pub dropped_events: u64,
    /// Events with no usable timestamp (QEMU's -1 means "the host clock failed").
    pub bad_timestamps: u64,
    /// Events that came before the greeting.
    pub events_before_greeting: u64,
    /// Replies and errors without an id of a command we wait for.
    pub stray_replies: u64,
    /// JSON objects that are no greeting, reply, error or event, and blank lines.
    pub unknown_lines: u64,
    /// Sessions that another client had negotiated already (QEMU's race with clients that leave early).
    pub already_negotiated: u64,
}

impl Tolerated {
    /// Adds another session's counts.
    pub fn add(&mut self, other: &Tolerated) {
        self.unknown_events += other.unknown_events;
        self.odd_events += other.odd_events;
        self.stripped_events += other.stripped_events;
        self.coalesced_events += other.coalesced_events;
        self.dropped_events += other.dropped_events;
        self.bad_timestamps += other.bad_timestamps;
        self.events_before_greeting += other.events_before_greeting;
        self.stray_replies += other.stray_replies;
        self.unknown_lines += other.unknown_lines;
        self.already_negotiated += other.already_negotiated;
    }
}
