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

use crate::attachment::Attachment;
use crate::attachment::error::PassError;
use crate::attachment::originals::Originals;
use crate::cpuset::CpuSet;
use crate::discover::online_cpus;
use crate::error::chain;
use crate::journal::Record;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads::{KthreadScan, kernel_threads};
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{Place, Value};
use crate::locks::HostLock;
use crate::threads::Thread;

impl Attachment<'_> {
    /// Finds them before the VM has a lease, where other VMs may have moved them: afterwards it is not known
    /// what they had.
    pub(super) fn take_over_outside(&mut self, lock: &HostLock) -> Result<(), PassError> {
        let memory = self.host_memory();
        if memory.has_excluded() { self.find_outside_with(&memory, lock) } else { Ok(()) }
    }

    /// Finds kernel threads that work for the VM. It reads a line for each of the host's, so it is done when the VM has
    /// changed, and not in every pass.
    pub(crate) fn find_outside(&mut self) {
        let lock = self.known.settings.state.lock_host().map_err(PassError::from);
        let found = lock.and_then(|lock| self.find_outside_with(&self.host_memory(), &lock));
        if let Err(error) = found {
            tracing::warn!("kernel threads of the VM are left where they are: {}", chain(&error));
        }
    }

    /// No qmpin takes a CPU offline meanwhile: masks are shown without those.
    ///
    /// # Errors
    /// [`PassError`]; without an undo they are not touched.
    fn find_outside_with(
        &mut self,
        memory: &HostMemory,
        _lock: &HostLock,
    ) -> Result<(), PassError> {
        let (host, process) = (self.known.host, self.known.process);
        let online = online_cpus(host.root)?;
        let found = kernel_threads(host.root, host.sched, process.pid, KthreadScan::All);
        let is_new = |thread: &&Thread| !self.journal.memory().knows(thread.key);
        let mut new: Vec<Thread> = found.iter().filter(is_new).cloned().collect();
        for thread in &mut new {
            thread.allowed = own_mask(thread, online, memory).into();
        }
        if !new.is_empty() {
            let originals = Originals::of(host.root, process, &new, online);
            self.journal.append(vec![Record::Outside(originals.of_all(&new))])?;
        }
        self.outside = found;
        Ok(())
    }

    /// What the host's journal remembers; nothing where it cannot be read: that is said when it is to be written.
    fn host_memory(&self) -> HostMemory {
        let path = self.known.settings.state.host_journal_path();
        HostJournal::read(&path, &self.known.boot_id).unwrap_or_default()
    }
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
