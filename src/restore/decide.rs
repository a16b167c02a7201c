//! What to do with one thread, from what the journal remembers. Pure.

use crate::cpuset::CpuSet;
use crate::journal::Memory;
use crate::threads::ThreadKey;

/// What to do with a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is as it was before.
    Nothing,
    /// It is as qmpin left it.
    PutBack {
        /// The mask it had before.
        to: CpuSet,
    },
    /// It is as somebody else left it.
    LeaveAlone {
        /// The mask it had before.
        before: CpuSet,
    },
}

/// What to do with a thread that now has the mask `found`. Masks are compared on the `online` CPUs: the
/// kernel shows no others.
#[must_use]
pub fn decide(memory: &Memory, key: ThreadKey, found: &CpuSet, online: &CpuSet) -> Decision {
    let same = |other: &CpuSet| *found & *online == *other & *online;
    match memory.before(key) {
        None => Decision::Nothing,
        Some(before) if same(&before) => Decision::Nothing,
        Some(before) if memory.is_ours(key, same) => Decision::PutBack { to: before },
        Some(before) => Decision::LeaveAlone { before },
    }
}
