//! Leases that cannot be read. What their VMs have is not known to be free, so it is not free.
//!
//! ```text
//!   the boot, or the process, of the lease or of its VM's journal is gone    ─▶ dead: it is swept
//!   its CPUs are known from what is left of the lease                       ─▶ these are the VM's
//!   its journal says that qmpin has moved the main thread                    ─▶ all CPUs but the main thread's are
//!   else                                                                     ─▶ all CPUs are
//! ```

use std::path::PathBuf;

use super::{lives, present_cpus, tasks};
use crate::cpuset::CpuSet;
use crate::ids::VmName;
use crate::journal::{self, Memory};
use crate::leases::{Salvaged, StateDir, StateError};
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// A lease that cannot be read, of a VM that may live. In one sentence: which lease, why, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "cannot read the lease of VM {vm}, {}: {reason}; delete it if no qmpin runs for that VM",
    path.display()
)]
pub struct Doubt {
    /// Which VM.
    pub vm: VmName,
    /// The lease's path.
    pub path: PathBuf,
    /// Why it cannot be read.
    pub reason: String,
    /// The CPUs that may be the VM's alone.
    pub cpus: CpuSet,
}

/// Examines a lease that cannot be read; `None`: its VM has ended, or its boot has.
#[must_use]
pub fn doubt_of(
    root: &SysRoot,
    sched: &dyn Sched,
    state: &StateDir,
    vm: &VmName,
    error: &StateError,
    boot_id: &str,
) -> Option<Doubt> {
    let Salvaged { boot_id: boot, qemu, exclusive } = state.salvage_lease(vm);
    let is_gone = |process: ProcessKey| lives(root, process).is_ok_and(|lives| !lives);
    let journal = journal::read(&state.journal_path(vm)).ok();
    let of_journal = journal.as_ref().map(|content| &content.header);
    if boot.as_deref().is_some_and(|boot| boot != boot_id)
        || of_journal.is_some_and(|header| header.boot_id != boot_id)
        || qemu.is_some_and(is_gone)
        || of_journal.is_some_and(|header| is_gone(header.process))
    {
        return None;
    }
    let free = || {
        let content = journal.as_ref()?;
        known_free(root, sched, content.header.process, &content.memory)
    };
    let cpus = exclusive.unwrap_or_else(|| present_cpus(root) - free().unwrap_or_default());
    let reason = match error {
        StateError::NotALease { reason, .. } => reason.clone(),
        StateError::Io { source, .. } => source.to_string(),
        busy @ StateError::Busy { .. } => busy.to_string(),
    };
    Some(Doubt { vm: vm.clone(), path: state.lease_path(vm), reason, cpus })
}

/// CPUs that are not the VM's alone: where its main thread is by qmpin's doing, because helpers of a VM are excluded
/// its own CPUs. CPUs that any of its threads has for itself are not among them.
fn known_free(
    root: &SysRoot,
    sched: &dyn Sched,
    process: ProcessKey,
    memory: &Memory,
) -> Option<CpuSet> {
    let main = sched.affinity(process.pid.main_thread()).ok()?;
    if !memory.masks().any(|mask| mask == main) {
        return None;
    }
    let threads = tasks::keys(root, process.pid).ok()?;
    let masks = threads.iter().filter_map(|thread| sched.affinity(thread.tid).ok());
    Some(masks.filter(|mask| *mask != main).fold(main, |free, mask| free - mask))
}
