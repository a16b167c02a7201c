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
/// kernel shows no others. `limits` are what cpusets leave such a thread now: put back already, it has no
/// more than that.
#[must_use]
pub fn decide(
    memory: &Memory,
    key: ThreadKey,
    found: &CpuSet,
    online: &CpuSet,
    limits: &[CpuSet],
) -> Decision {
    let same = |other: &CpuSet| *found & *online == *other & *online;
    let Some(before) = memory.before(key) else { return Decision::Nothing };
    // The kernel cuts a mask to the process's cpuset, and if qmpin is killed right after the write, the
    // journal does not say so. The cpuset is what a thread has that nobody has pinned: the main
    // thread, most often.
    let cut = [Some(before), memory.main()];
    let ours = |ours: &CpuSet| same(ours) || cut.iter().flatten().any(|cut| same(&(*ours & *cut)));
    if same(&before) {
        Decision::Nothing
    } else if memory.is_ours(key, ours) || is_reset(memory, found, online, limits) {
        Decision::PutBack { to: before }
    } else if limits.iter().any(|limit| same(&(before & *limit))) {
        Decision::Nothing
    } else {
        Decision::LeaveAlone { before }
    }
}
/// Whether the kernel gave the thread all that its cpuset has, as kernels before 6.2 do when a cpuset
/// comes or goes: with units of systemd's limited, that was our doing.
fn is_reset(memory: &Memory, found: &CpuSet, online: &CpuSet, limits: &[CpuSet]) -> bool {
    memory.has_slices()
        && limits.iter().chain([online]).any(|all| *found & *online == *all & *online)
}
