//! What to do with one thread, from what the journal remembers. Pure.

use crate::cpuset::CpuSet;
use crate::journal::Memory;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::Value;
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
    /// What cpusets leave the VM's threads now: restored already, they have no more than that.
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
    /// It is as another program left it.
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
    // The kernel cuts a mask to what cpusets leave the process, and if qmpin is killed right after the
    // write, or another VM's partition comes later, the journal does not say so. The cpuset is what a
    // thread has that was never pinned: the main thread, most often.
    let cut =
        || [Some(before), memory.main()].into_iter().flatten().chain(around.limits.iter().copied());
    let ours = |ours: &CpuSet| same(ours) || cut().any(|cut| same(&(*ours & cut)));
    if same(&before) {
        Decision::Nothing
    } else if memory.is_ours(key, ours) || is_kernels_doing(memory, key, kind, found, around) {
        Decision::PutBack { to: before }
    } else if let Some(limit) = around.limits.iter().find(|limit| same(&(before & **limit))) {
        // Where a cpuset leaves a thread nothing of its mask, it has the whole cpuset until some of its
        // mask comes back (`__set_cpus_allowed_ptr_locked()` of `kernel/sched/core.c` keeps `user_cpus_ptr`).
        let is_hidden = |ours: &CpuSet| (*ours & *limit & around.online).is_empty();
        if memory.is_ours(key, is_hidden) {
            Decision::PutBack { to: before }
        } else {
            Decision::Nothing
        }
    } else {
        Decision::LeaveAlone { before }
    }
}

/// Whether a mask that is read back is what the kernel makes of `to`: without CPUs that are offline, those that the
/// cpuset does not have, and for its own threads those of VMs that stay.
#[must_use]
pub fn is_back(to: &CpuSet, kind: Kind, found: &CpuSet, around: &Around<'_>) -> bool {
    let same = |other: CpuSet| *found & around.online == other & around.online;
    let found = Value::Cpus(*found);
    same(*to)
        || around.limits.iter().any(|limit| same(*to & *limit))
        || kind == Kind::OfKernel && around.host.has_exclusion_mask(&found, to, &around.online)
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
    let has_exclusion_mask =
        |from: &CpuSet| around.host.has_exclusion_mask(&Value::Cpus(*found), from, online);
    let by_partitions = kind == Kind::OfKernel
        && (is_all_of(online)
            || has_exclusion_mask(online)
            || memory.before(key).is_some_and(|before| has_exclusion_mask(&before))
            || memory.is_ours(key, has_exclusion_mask));
    by_partitions || memory.has_slices() && around.limits.iter().chain([online]).any(is_all_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StartTicks, Tid};
    use crate::journal::{Baseline, Intent, Record};

    fn set(list: &str) -> CpuSet {
        list.parse().expect("a list of CPUs")
    }

    fn decided(found: &str, limits: &[CpuSet]) -> Decision {
        let key = ThreadKey { tid: Tid(101), start: StartTicks(1) };
        let all = set("0-23");
        let threads = vec![(key.tid, key.start, all)];
        let memory = Memory::of(&[
            Record::Baseline(Baseline { main: all, threads }),
            Record::Intent(Intent { thread: key, from: all, to: set("0-11,20-23") }),
        ]);
        let host = HostMemory::default();
        let around = Around { online: all, limits, host: &host };
        decide(&memory, key, Kind::OfProcess, &set(found), &around)
    }

    #[test]
    fn ours_is_known_beside_a_partition_that_came_later() {
        let back = Decision::PutBack { to: set("0-23") };
        assert_eq!(decided("0-11,20-23", &[]), back);
        assert_eq!(decided("0-7,20-23", &[set("0-7,12-23")]), back);
        // Another program's, with and without that partition.
        let left = Decision::LeaveAlone { before: set("0-23") };
        assert_eq!(decided("0-7,20-23", &[]), left);
        assert_eq!(decided("0-5", &[set("0-7,12-23")]), left);
    }

    #[test]
    fn put_back_already_it_has_what_the_cpuset_leaves() {
        assert_eq!(decided("0-7,12-23", &[set("0-7,12-23")]), Decision::Nothing);
    }

    #[test]
    fn ours_is_known_where_the_cpuset_leaves_nothing_of_it() {
        let back = Decision::PutBack { to: set("0-23") };
        assert_eq!(decided("12-19", &[set("12-19")]), back);
    }
}
