//! *restore*: restores the mask of every living thread, from the journal alone.
//!
//! ```text
//!   a thread that was written     qmpin wrote its mask    ─▶ the mask before the first write
//!   a thread created later        qmpin wrote its mask    ─▶ the main thread's mask before
//!   a kernel thread's             its mask is the kernel's, as it took CPUs away or gave them back ─▶ as ours
//!   either                        its mask is as before   ─▶ nothing to do
//!   either                        its mask is another     ─▶ another program's: kept, reported
//! ```
//!
//! It needs no policy, no QMP and no VM, and may run twice. A thread created while it works inherits from
//! threads not yet restored, so it lists them again until there is nothing left to do.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::tasks::LOOKS_MAX;
use crate::discover::{Grips, cgroup, lives, tasks};
use crate::ids::{CPUS_MAX, CpuId};
use crate::journal::{JournalError, Memory, UnknownLines};
use crate::knobs::affinity::decide::{Around, Decision, Kind, decide, is_back};
use crate::knobs::bench::Bench;
use crate::knobs::host::kernel_threads;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::outcome::HostApplied;
use crate::knobs::outcome::{Foreign, Restored};
use crate::knobs::partition::restore::PartitionRestore;
use crate::mask::Mask;
use crate::sched::{Sched, is_gone};
use crate::scheduling::{ItsCookie, Scheduling};
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::{ProcessKey, ThreadKey};
use crate::{discover, journal};

/// What came of it.
#[derive(Debug, Default)]
pub struct RestoreReport {
    /// What came of the threads' masks.
    pub masks: Restored<Mask>,
    /// How many threads were as before already.
    pub unchanged: usize,
    /// Places of the host that no VM needs changed any more, and what became of them.
    pub host: Vec<HostApplied>,
    /// Why nothing was done about the host, in sentences.
    pub host_left: Vec<String>,
    /// Lines of the VM's journal, and of the host's where no VM is left, that this qmpin does not know how to undo.
    pub unknown: Vec<UnknownLines>,
    /// Why there was nothing to restore, where that is so.
    pub nothing: Option<Nothing>,
    /// What came of the VM's partition.
    pub partition: PartitionRestore,
    /// What came of its threads' priorities.
    pub priority: Restored<Scheduling>,
    /// What came of its core-scheduling cookie.
    pub cookie: Restored<ItsCookie>,
}

/// Why there was nothing to restore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nothing {
    /// No journal.
    NeverAttached,
    /// The journal is of an earlier boot: all of its threads are gone.
    OtherBoot,
    /// The QEMU process is gone, and its threads with it.
    ProcessGone,
}

/// Why it could not be restored. Nothing may be forgotten then.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The journal is there and cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The VM's threads could not be looked at.
    #[error("could not list the VM's threads to restore them")]
    Look(#[source] ReadError),
}

impl RestoreReport {
    fn nothing(why: Nothing) -> RestoreReport {
        RestoreReport { nothing: Some(why), ..RestoreReport::default() }
    }

    /// With what a second restore has come to.
    pub fn add(&mut self, again: RestoreReport) {
        let put_back = std::mem::take(&mut self.masks.put_back);
        self.masks = again.masks;
        self.masks.put_back.extend(put_back);
    }

    /// Whether all is back that could be: the journal may go.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.masks.failed.is_empty()
            && self.priority.failed.is_empty()
            && self.cookie.failed.is_empty()
            && self.partition.refused.is_empty()
            && self.unknown.is_empty()
            && self.host_left.is_empty()
            && self.host.iter().all(|applied| !applied.is_left_changed())
    }
}

/// Restores what the journal at `path` remembers. `host`: what the host's journal remembers.
///
/// # Errors
/// [`RestoreError`].
pub fn restore(
    root: &SysRoot,
    sched: &dyn Sched,
    boot_id: &str,
    path: &Path,
    host: &HostMemory,
) -> Result<RestoreReport, RestoreError> {
    let content = match journal::read(path) {
        Ok(content) => content,
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(RestoreReport::nothing(Nothing::NeverAttached));
        }
        Err(JournalError::NeverBegun { .. }) => {
            return Ok(RestoreReport::nothing(Nothing::NeverAttached));
        }
        Err(error) => return Err(error.into()),
    };
    if content.header.boot_id != boot_id {
        return Ok(RestoreReport::nothing(Nothing::OtherBoot));
    }
    restore_process(root, sched, content.header.process, &content.memory, host)
}

/// Restores what is remembered of a process of this boot. `host`: what the host's journal remembers.
///
/// # Errors
/// [`RestoreError::Look`].
pub fn restore_process(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &Memory,
    host: &HostMemory,
) -> Result<RestoreReport, RestoreError> {
    let unknown: Vec<UnknownLines> = memory.unknown().cloned().into_iter().collect();
    if !lives(root, process).map_err(RestoreError::Look)? {
        return Ok(RestoreReport { unknown, ..RestoreReport::nothing(Nothing::ProcessGone) });
    }
    let priority = crate::knobs::priority::restore::restore_priorities(
        root,
        sched,
        process,
        memory.scheduling(),
    );
    let priority = priority.map_err(RestoreError::Look)?;
    let cookie = crate::knobs::core_scheduling::restore::clear_cookies(
        root,
        sched,
        process,
        memory.cookie(),
    );
    let cookie = cookie.map_err(RestoreError::Look)?;
    let report = put_back(root, sched, process, memory, host).map_err(RestoreError::Look)?;
    Ok(RestoreReport { unknown, priority, cookie, ..report })
}

fn put_back(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &Memory,
    host: &HostMemory,
) -> Result<RestoreReport, ReadError> {
    let mut report = RestoreReport::default();
    let mut settled: BTreeSet<ThreadKey> = BTreeSet::new();
    let limits_now = || cgroup::cpuset_limits(root, &CgroupTree::of(root), process.pid);
    let limits = limits_now();
    let grips = Grips::default();
    let bench = Bench { root, sched, grips: &grips, process };
    for _ in 0..LOOKS_MAX {
        let mut changed = false;
        for (key, kind) in living(root, process, memory)? {
            if !settled.insert(key) {
                continue;
            }
            let allowed = match sched.affinity(key.tid) {
                Ok(allowed) => allowed,
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    let to = memory.before(key).unwrap_or_default();
                    report.masks.note(key, to.into(), Err(error));
                    continue;
                }
            };
            let around = Around { online: online(root), limits: &limits, host };
            match decide(memory, key, kind, &allowed, &around) {
                Decision::Nothing => report.unchanged += 1,
                Decision::LeaveAlone { before } => {
                    let (found, before) = (allowed.into(), before.into());
                    report.masks.foreign.push(Foreign { thread: key, found, before });
                }
                Decision::PutBack { to } => {
                    changed = true;
                    // The limits may be others by now.
                    let is_back = |now: &CpuSet| {
                        is_back(&to, kind, now, &around) || {
                            let limits = &limits_now();
                            is_back(&to, kind, now, &Around { online: online(root), limits, host })
                        }
                    };
                    let to = Mask::from(to);
                    report.masks.note(
                        key,
                        to.clone(),
                        bench.set(key, &to, |now| is_back(now)).done(),
                    );
                }
            }
        }
        if !changed {
            break;
        }
    }
    Ok(report)
}

/// The threads to check, in the order they were written: the main thread first, so that what is created
/// from then on is created right.
fn living(
    root: &SysRoot,
    process: ProcessKey,
    memory: &Memory,
) -> Result<Vec<(ThreadKey, Kind)>, ReadError> {
    let of_process = tasks::keys(root, process.pid)?;
    let is_of_process = |key: &ThreadKey| of_process.iter().any(|thread| thread.tid == key.tid);
    let mut threads: Vec<_> = of_process.iter().map(|key| (*key, Kind::OfProcess)).collect();
    for key in memory.threads().filter(|key| !is_of_process(key)) {
        if kernel_threads::is_kernel_thread(root, key)? {
            threads.push((key, Kind::OfKernel));
        }
    }
    threads.sort_by_key(|(key, _)| (memory.order(*key), key.tid));
    Ok(threads)
}

/// The CPUs that masks are compared on. Where they cannot be read it is all of them: compared on none,
/// every mask would look as it was before, and nothing would be restored.
fn online(root: &SysRoot) -> CpuSet {
    discover::online_cpus(root)
        .ok()
        .filter(|online| !online.is_empty())
        .unwrap_or_else(|| (0..CPUS_MAX).filter_map(CpuId::from_index).collect())
}
