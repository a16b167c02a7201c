//! When the rest of the host was last compared with the leases, and with which: one supervisor's pass serves all.
//! It is the content of `.host.lock`, so that it goes with the last VM.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::ids::VmName;
use crate::leases::{FileState, Lease, StateDir};
use crate::locks::HostLock;
use crate::state_file;
use crate::threads::ProcessKey;

/// The longest that is read.
const BYTES_MAX: u64 = 1 << 20;

/// A pass over the rest of the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostPass {
    /// When it began, in ms since the host was booted.
    began_ms: u64,
    /// The leases that it went by.
    leases: Vec<(VmName, ProcessKey, FileState)>,
}

impl HostPass {
    /// A pass that begins now, and goes by these leases.
    #[must_use]
    pub fn begin(state: &StateDir, leases: &[Lease]) -> HostPass {
        HostPass { began_ms: now_ms(), leases: marks(state, leases) }
    }

    /// Reads what the last one has left; `None`: there was none, or it is not known.
    #[must_use]
    pub fn last(state: &StateDir) -> Option<HostPass> {
        let text = state_file::read_state(&state.host_lock_path(), BYTES_MAX).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Notes that it has found, or made, the host as these leases want it.
    ///
    /// # Errors
    /// The kernel's answer. Then the next supervisor does a pass of its own.
    pub fn note(&self, lock: &HostLock) -> io::Result<()> {
        let file = lock.file();
        file.set_len(0)?;
        file.write_all_at(&serde_json::to_vec(self)?, 0)
    }

    /// Whether it began less than `within` ago.
    #[must_use]
    pub fn is_recent(&self, within: Duration) -> bool {
        let age_ms = now_ms().checked_sub(self.began_ms);
        age_ms.is_some_and(|age_ms| Duration::from_millis(age_ms) < within)
    }

    /// Whether it went by just these leases.
    #[must_use]
    pub fn went_by(&self, state: &StateDir, leases: &[Lease]) -> bool {
        self.leases == marks(state, leases)
    }
}

fn marks(state: &StateDir, leases: &[Lease]) -> Vec<(VmName, ProcessKey, FileState)> {
    let mark = |lease: &Lease| (lease.vm.clone(), lease.qemu, state.lease_state(&lease.vm));
    leases.iter().map(mark).collect()
}

fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1000 + nanoseconds.unwrap_or(0) / 1_000_000
}
