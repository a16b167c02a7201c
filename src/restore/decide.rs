//! What to do with one thread, from what the journal remembers. Pure.

use crate::cpuset::CpuSet;
use crate::journal::{HostMemory, Memory};
use crate::places::Value;
use crate::threads::ThreadKey;

/// What kind of thread it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of QEMU's process.
    OfProcess,
    /// One of the kernel's that works for the VM.
    OfKernel,
}

/// What there is around the VM.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// Masks are compared on these: the kernel shows no others.
    pub online: CpuSet,
    /// What cpusets leave the VM's threads now: put back already, they have no more than that.
    pub limits: &'a [CpuSet],
    /// What the host's journal remembers.
    pub host: &'a HostMemory,
}

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

/// What to do with a thread that now has the mask `found`.
#[must_use]
pub fn decide(
    memory: &Memory,
    key: ThreadKey,
    kind: Kind,
    found: &CpuSet,
    around: &Around<'_>,
) -> Decision {
    let same = |other: &CpuSet| *found & around.online == *other & around.online;
    let Some(before) = memory.before(key) else { return Decision::Nothing };
    // The kernel cuts a mask to the process's cpuset, and if qmpin is killed right after the write, the
    // journal does not say so. The cpuset is what a thread has that nobody has pinned: the main
    // thread, most often.
    let cut = [Some(before), memory.main()];
    let ours = |ours: &CpuSet| same(ours) || cut.iter().flatten().any(|cut| same(&(*ours & *cut)));
    if same(&before) {
        Decision::Nothing
    } else if memory.is_ours(key, ours) || is_kernels_doing(memory, key, kind, found, around) {
        Decision::PutBack { to: before }
    } else if around.limits.iter().any(|limit| same(&(before & *limit))) {
        Decision::Nothing
    } else {
        Decision::LeaveAlone { before }
    }
}

/// Whether the kernel has changed the mask by itself, and that was our doing: its own threads' as a
/// partition comes or goes, and before 6.2 all of a process as a unit of systemd's is limited or no longer is.
fn is_kernels_doing(
    memory: &Memory,
    key: ThreadKey,
    kind: Kind,
    found: &CpuSet,
    around: &Around<'_>,
) -> bool {
    let online = &around.online;
    let is_all_of = |all: &CpuSet| *found & *online == *all & *online;
    let is_fenced = |from: &CpuSet| around.host.is_fenced(&Value::Cpus(*found), from, online);
    let by_partitions = kind == Kind::OfKernel
        && (is_all_of(online)
            || is_fenced(online)
            || memory.before(key).is_some_and(|before| is_fenced(&before))
            || memory.is_ours(key, is_fenced));
    by_partitions || memory.has_slices() && around.limits.iter().chain([online]).any(is_all_of)
}
