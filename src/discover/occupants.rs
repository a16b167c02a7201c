//! Who else may run on some CPUs: every thread of the host is asked for its mask, as the scheduler has
//! it, and those that may are named.

use super::stat::Stat;
use super::{cgroup, online_cpus, stat};
use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::ids::{Pid, Tid};
use crate::sched::Sched;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ThreadKey;

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
    let online = online_cpus(root).unwrap_or_default();
    let processes = root.folder("proc").and_then(|folder| folder.numbers()).unwrap_or_default();
    for pid in processes.into_iter().map(Pid).filter(|pid| !but.contains(pid)) {
        let Ok(tasks) = root.folder(&format!("proc/{pid}/task")) else { continue };
        let mut limits = None;
        for tid in tasks.numbers().unwrap_or_default() {
            let Ok(allowed) = sched.affinity(Tid(tid)) else { continue };
            let limits = limits.get_or_insert_with(|| limits_of(root, pid, &online));
            if limits.iter().any(|limit| allowed == *limit || allowed == *limit - *usual) {
                continue;
            }
            let Ok(stat) = stat::read_in(&tasks, &format!("{tid}/stat")) else { continue };
            if !stat.is_dead() && !stat.is_kernel_thread() {
                let key = ThreadKey { tid: Tid(tid), start: stat.start };
                found.push(OwnMask { pid, key, cpus: allowed });
            }
        }
    }
    found
}

/// What a thread of the process may run on that has no mask of its own; on a host without cpusets that is every CPU.
fn limits_of(root: &SysRoot, process: Pid, online: &CpuSet) -> Vec<CpuSet> {
    let mut limits = cgroup::cpuset_limits(root, &CgroupTree::of(root), process);
    if limits.is_empty() {
        limits.push(*online);
    }
    limits
}
