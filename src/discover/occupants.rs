//! Who else may run on some CPUs: every thread of the host is asked for its mask, as the scheduler has
//! it, and those that may are named.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;

use super::stat::Stat;
use super::{cgroup, children_of, online_cpus, stat};
use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::ids::{KTHREADD, Pid, Tid};
use crate::sched::Sched;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ThreadKey;

/// The links of a folder with one folder in it.
const LINKS_OF_ONE: u64 = 3;

/// What kind of thread it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum OccupantKind {
    /// Of a process.
    User,
    /// Of the kernel's, and it can be moved.
    Movable,
    /// Of the kernel's, and it cannot (`PF_NO_SETAFFINITY`).
    Bound,
}

/// A thread that may run there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Occupant {
    /// Its number.
    pub tid: Tid,
    /// Its name, for display only.
    pub comm: String,
    /// What kind it is.
    pub kind: OccupantKind,
    /// Where it may run.
    pub allowed: CpuSet,
}

/// All threads that may run on any of these CPUs, but those of one process. Threads that end meanwhile
/// are left out.
///
/// # Errors
/// [`ReadError`] where the processes cannot be listed.
pub fn occupants(
    root: &SysRoot,
    sched: &dyn Sched,
    cpus: &CpuSet,
    but: Pid,
) -> Result<Vec<Occupant>, ReadError> {
    let mut found = Vec::new();
    for pid in root.folder("proc")?.numbers()? {
        if pid == but.0 {
            continue;
        }
        let Ok(tasks) = root.folder(&format!("proc/{pid}/task")) else { continue };
        for tid in tasks.numbers().unwrap_or_default() {
            let tid = Tid(tid);
            let Ok(allowed) = sched.affinity(tid) else { continue };
            if !allowed.intersects(cpus) {
                continue;
            }
            let Ok(stat) = stat::read_in(&tasks, &format!("{tid}/stat")) else { continue };
            if !stat.is_dead() {
                let kind = kind(&stat);
                found.push(Occupant { tid, comm: stat.comm, kind, allowed });
            }
        }
    }
    Ok(found)
}

fn kind(stat: &Stat) -> OccupantKind {
    match (stat.is_kernel_thread(), stat.is_bound()) {
        (false, _) => OccupantKind::User,
        (true, false) => OccupantKind::Movable,
        (true, true) => OccupantKind::Bound,
    }
}

/// A thread of a process that has a mask of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnMask {
    /// Of which process.
    pub pid: Pid,
    /// Which thread.
    pub key: ThreadKey,
    /// Its mask.
    pub cpus: CpuSet,
}

/// The threads of processes that have a mask of their own: less than their cpuset leaves them. Those of
/// these processes are left out, and masks that lack no more than `usual`.
#[must_use]
pub fn with_own_masks(
    root: &SysRoot,
    sched: &dyn Sched,
    but: &[Pid],
    usual: &CpuSet,
) -> Vec<OwnMask> {
    let mut found = Vec::new();
    let mut cpusets = Cpusets::of(root);
    // Most threads have all CPUs, or all that partitions leave. Nothing more is read of these.
    let usual_masks = [cpusets.all, cpusets.all - *usual, cpusets.root, cpusets.root - *usual];
    let mut kernels = kernel_threads(root);
    kernels.sort_unstable();
    let is_left_out =
        |pid: &Pid| but.contains(pid) || kernels.binary_search(&pid.main_thread()).is_ok();
    let processes = root.folder("proc").and_then(|folder| folder.numbers()).unwrap_or_default();
    for pid in processes.into_iter().map(Pid).filter(|pid| !is_left_out(pid)) {
        for tid in threads_of(root, pid) {
            let Ok(allowed) = sched.affinity(tid) else { continue };
            if usual_masks.contains(&allowed) {
                continue;
            }
            // Some of the kernel's may be missing in the list of them.
            let Ok(stat) = stat::of(root, format!("{pid}/task/{tid}")) else { continue };
            if stat.is_dead() || stat.is_kernel_thread() {
                continue;
            }
            let mut limits = cpusets.of_process(root, pid).iter();
            if !limits.any(|limit| allowed == *limit || allowed == *limit - *usual) {
                let key = ThreadKey { tid, start: stat.start };
                found.push(OwnMask { pid, key, cpus: allowed });
            }
        }
    }
    found
}

/// The kernel's own threads, as far as they can be had with one read; none where process 2 is another's.
fn kernel_threads(root: &SysRoot) -> Vec<Tid> {
    let parent = stat::of(root, KTHREADD);
    let children = || children_of(root, KTHREADD).unwrap_or_default();
    if parent.is_ok_and(|stat| stat.is_kernel_thread()) { children() } else { Vec::new() }
}

/// The threads of a process. Most have one, which the number of links says without a list
/// (`proc_task_getattr` in fs/proc/base.c).
fn threads_of(root: &SysRoot, process: Pid) -> Vec<Tid> {
    let path = format!("proc/{process}/task");
    let links =
        root.path(&path).ok().and_then(|path| path.metadata().ok()).map(|data| data.nlink());
    if links == Some(LINKS_OF_ONE) {
        return vec![process.main_thread()];
    }
    let tids = root.folder(&path).and_then(|folder| folder.numbers()).unwrap_or_default();
    tids.into_iter().map(Tid).collect()
}

/// What cpusets leave to processes, read once for each cgroup.
struct Cpusets {
    tree: CgroupTree,
    all: CpuSet,
    /// What is left to a process in no other group.
    root: CpuSet,
    of: BTreeMap<String, Vec<CpuSet>>,
}

impl Cpusets {
    fn of(root: &SysRoot) -> Cpusets {
        let tree = CgroupTree::of(root);
        let all = online_cpus(root).unwrap_or_default();
        let left = cgroup::effective(&tree, "").map_or(all, |(_, cpus)| cpus);
        Cpusets { tree, all, root: left, of: BTreeMap::new() }
    }

    /// What a thread of the process may run on that has no mask of its own; on a host without cpusets that is every
    /// CPU.
    fn of_process(&mut self, root: &SysRoot, process: Pid) -> &[CpuSet] {
        let cgroup = root.read(&format!("proc/{process}/cgroup")).unwrap_or_default();
        let Cpusets { tree, all, of, .. } = self;
        of.entry(cgroup).or_insert_with(|| {
            let mut limits = cgroup::cpuset_limits(root, tree, process);
            if limits.is_empty() {
                limits.push(*all);
            }
            limits
        })
    }
}
