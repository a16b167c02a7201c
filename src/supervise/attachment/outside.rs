//! Kernel threads of the VM outside its process.

use super::Known;
use crate::cpuset::CpuSet;
use crate::discover::kernel_threads;
use crate::error::chain;
use crate::journal::Journal;
use crate::sched::Sched;
use crate::supervise::originals::Originals;
use crate::threads::Thread;

/// Those that are known.
#[derive(Default)]
pub(super) struct Outside(Vec<Thread>);

impl Outside {
    /// Finds them. It reads a line for each of the host's, so it is done when the VM has changed, and not
    /// at every look.
    pub(super) fn find(&mut self, known: &Known<'_>, online: CpuSet, journal: &mut Journal) {
        let (host, process) = (known.host, known.process);
        let found = kernel_threads::kernel_threads(host.root, host.sched, process.pid);
        let is_new = |thread: &&Thread| !journal.memory().knows(thread.key);
        let new: Vec<Thread> = found.iter().filter(is_new).cloned().collect();
        if !new.is_empty()
            && let Err(error) = journal
                .append(vec![Originals::of(host.root, process, &new, online).record(online, &new)])
        {
            // Without an undo they are not touched.
            tracing::warn!("kernel threads of the VM are left where they are: {}", chain(&error));
            return;
        }
        self.0 = found;
    }

    /// Those that are still there, as they are now.
    pub(super) fn now(&mut self, sched: &dyn Sched) -> impl Iterator<Item = Thread> + '_ {
        self.0.retain_mut(|thread| match sched.affinity(thread.key.tid) {
            Ok(allowed) => {
                thread.allowed = allowed;
                true
            }
            Err(_) => false,
        });
        self.0.iter().cloned()
    }
}
