//! The VM's files, kept while it is attached: those that were removed are written again, from memory.

use crate::attachment::Attachment;
use crate::attachment::error::PassError;
use crate::discover::tasks::is_thread_of;
use crate::error::chain;
use crate::knobs::host::kernel_threads::is_kernel_thread;

use crate::attachment::replan::this_process;

impl Attachment<'_> {
    /// Writes the VM's files again where they were removed: the lock, the journal, the lease. The lease also where
    /// another program changed it. A journal that is mostly history is written anew.
    ///
    /// # Errors
    /// [`PassError`]; then nothing more may be changed.
    pub(crate) fn keep_files(&mut self) -> Result<(), PassError> {
        let state = self.known.settings.state.clone();
        let vm = &self.known.settings.vm;
        if !state.path().exists() {
            tracing::warn!(
                "{} was removed: VM {vm}'s files are written again",
                state.path().display()
            );
            state.create()?;
        }
        self.lock.renew(this_process(self.known.host.root))?;
        if self.journal.ensure_file()? {
            tracing::warn!("{} was removed: it is written again", state.journal_path(vm).display());
        }
        // Before the first lease there is none to keep.
        let leased = self.leased.get();
        if leased.is_some() && state.lease_state(vm) != leased {
            tracing::warn!(
                "{} was changed or removed: it is written again",
                state.lease_path(vm).display()
            );
            self.relet()?;
        }
        if self.journal.is_long() {
            self.shorten_journal();
        }
        Ok(())
    }

    fn shorten_journal(&mut self) {
        let (root, pid) = (self.known.host.root, self.known.process.pid);
        // A thread of which it cannot be learnt is taken to live.
        let written = self.journal.compact(|key| {
            is_thread_of(root, pid, key).unwrap_or(true)
                || is_kernel_thread(root, key).unwrap_or(true)
        });
        if let Err(error) = written {
            tracing::warn!("the VM's journal is long and stays so for now: {}", chain(&error));
        }
    }
}
