//! The masks that threads have of their own: what is to be restored.

use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::cgroup;
use crate::ids::{StartTicks, Tid};
use crate::sysroot::SysRoot;
use crate::threads::{ProcessKey, Thread};

/// Tells a mask of a thread's own from one that a cpuset has cut.
pub(crate) struct Originals {
    limits: Vec<CpuSet>,
    online: CpuSet,
}

impl Originals {
    /// Where cpusets leave these threads less than all: another VM's partition takes CPUs away from
    /// everybody, and that is not for us to make permanent.
    pub(crate) fn of(
        root: &SysRoot,
        process: ProcessKey,
        threads: &[Thread],
        online: CpuSet,
    ) -> Originals {
        let limits = if threads.iter().all(|thread| thread.allowed == online) {
            Vec::new()
        } else {
            cgroup::cpuset_limits(root, &CgroupTree::of(root), process.pid)
        };
        Originals { limits, online }
    }

    /// The threads, as the journal records them.
    pub(crate) fn of_all(&self, threads: &[Thread]) -> Vec<(Tid, StartTicks, CpuSet)> {
        let own =
            |thread: &Thread| (thread.key.tid, thread.key.start, self.of_mask(*thread.allowed));
        threads.iter().map(own).collect()
    }

    /// One that may run on all that a cpuset leaves it has no mask of its own, and would be everywhere.
    pub(crate) fn of_mask(&self, allowed: CpuSet) -> CpuSet {
        let is_cut = self.limits.iter().any(|limit| *limit & self.online == allowed);
        if is_cut { self.online } else { allowed }
    }
}
