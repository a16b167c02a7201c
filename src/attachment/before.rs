//! What there was before the first write: the masks that are restored when the VM stops.
//!
//! The kernel shows masks without CPUs that are offline at that moment, and another VM's may be, for a moment:
//! such a mask would go back without them. So where a CPU may go offline, masks are read under the host's
//! lock, which a process that takes one offline holds until it is back.

use crate::attachment::error::PassError;
use crate::attachment::originals::Originals;
use crate::attachment::{Attachment, Known};
use crate::cpuset::CpuSet;
use crate::discover::{live_leases, online_cpus, tasks};
use crate::journal::{Baseline, Record};
use crate::locks::HostLock;
use crate::policy::Knob;
use crate::threads::Thread;

impl Attachment<'_> {
    /// Takes down, before there is a lease, what would not be seen as it was any more later.
    ///
    /// # Errors
    /// [`PassError`].
    pub(crate) fn take_down(&mut self, lock: &HostLock) -> Result<(), PassError> {
        self.take_over_outside(lock)?;
        if self.cpus_may_go_offline() {
            self.online = online_cpus(self.known.host.root)?;
            let observed = tasks::observe(self.known.process, self.scan()?, &self.identified);
            self.journal.append(self.first_baseline(&observed.threads).into_iter().collect())?;
        }
        Ok(())
    }

    /// Whether this VM's CPUs are to go offline for a moment, or another's may just be.
    fn cpus_may_go_offline(&self) -> bool {
        let settings = &self.known.settings;
        let mut leases = live_leases(self.known.host.root, &settings.state, &self.known.boot_id);
        leases.retain(|lease| lease.vm != settings.vm);
        settings.policy.vm.wanted_knobs().contains(&Knob::Reonline)
            || leases.iter().any(|lease| lease.knobs.contains(&Knob::Reonline))
    }

    /// Before the first write, all masks as they are.
    pub(crate) fn first_baseline(&self, threads: &[Thread]) -> Option<Record> {
        if self.journal.memory().has_baseline() {
            return None;
        }
        let main = self.known.process.pid.main_thread();
        let main = threads.iter().find(|thread| thread.key.tid == main);
        let all: CpuSet = main.map_or(self.online, |thread| *thread.allowed);
        let Known { host, process, .. } = self.known;
        let originals = Originals::of(host.root, process, threads, self.online);
        let (main, threads) = (originals.of_mask(all), originals.of_all(threads));
        Some(Record::Baseline(Baseline { main, threads }))
    }
}
