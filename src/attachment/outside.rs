//! Kernel threads of the VM outside its process.
//!
//! As long as no VM is attached that they work for, they are the host's like all others, and other VMs'
//! partitions move them: what they had before is in the host's journal then. It goes from one journal to the
//! other under the host's lock:
//!
//! ```text
//!   attached   the host's journal ─▶ the VM's     before the lease says so: then the host forgets them
//!   detached   the VM's journal   ─▶ the host's   before the VM's is forgotten, where there is one
//! ```

use super::known::Known;
use crate::attachment::error::PassError;
use crate::attachment::originals::Originals;
use crate::cpuset::CpuSet;
use crate::discover::online_cpus;
use crate::journal::Journal;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads::{KthreadScan, kernel_threads};
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{Place, Value};
use crate::locks::HostLock;
use crate::threads::Thread;

/// Those that are known.
#[derive(Default)]
pub(super) struct Outside(Vec<Thread>);

impl Outside {
    /// Finds them before the VM has a lease, where other VMs may have moved them: afterwards it is not known
    /// what they had.
    pub(super) fn take_over(
        &mut self,
        known: &Known<'_>,
        journal: &mut Journal,
        lock: &HostLock,
    ) -> Result<(), PassError> {
        if remembered(known).has_excluded() { self.find(known, journal, lock) } else { Ok(()) }
    }

    /// Finds them. It reads a line for each of the host's, so it is done when the VM has changed, and not
    /// in every pass. No qmpin takes a CPU offline meanwhile: masks are shown without those.
    ///
    /// # Errors
    /// [`PassError`]; without an undo they are not touched.
    pub(super) fn find(
        &mut self,
        known: &Known<'_>,
        journal: &mut Journal,
        _lock: &HostLock,
    ) -> Result<(), PassError> {
        let (host, process) = (known.host, known.process);
        let (online, memory) = (online_cpus(host.root)?, remembered(known));
        let found = kernel_threads(host.root, host.sched, process.pid, KthreadScan::All);
        let is_new = |thread: &&Thread| !journal.memory().knows(thread.key);
        let mut new: Vec<Thread> = found.iter().filter(is_new).cloned().collect();
        for thread in &mut new {
            thread.allowed = own_mask(thread, online, &memory).into();
        }
        if !new.is_empty() {
            let originals = Originals::of(host.root, process, &new, online);
            journal.append(vec![originals.outside(&new)])?;
        }
        self.0 = found;
        Ok(())
    }

    /// Those that were found, as they were then.
    pub(super) fn known(&self) -> &[Thread] {
        &self.0
    }
}

/// What the host's journal remembers; nothing where it cannot be read: that is said when it is to be written.
fn remembered(known: &Known<'_>) -> HostMemory {
    let path = known.settings.state.host_journal_path();
    HostJournal::read(&path, &known.boot_id).unwrap_or_default()
}

/// The mask that the thread would have without other VMs.
fn own_mask(thread: &Thread, online: CpuSet, memory: &HostMemory) -> CpuSet {
    match memory.original(&Place::Thread(thread.key)).and_then(Value::cpus) {
        Some(original) => original,
        None if memory.has_exclusion_mask(&Value::Cpus(*thread.allowed), &online, &online) => {
            online
        }
        None => *thread.allowed,
    }
}
