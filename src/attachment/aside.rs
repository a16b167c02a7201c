//! Where qmpin itself runs: nowhere near a VM's CPUs, also where no partition excludes it.

use crate::attachment::Attachment;
use crate::attachment::settings::Follow;
use crate::cpuset::CpuSet;
use crate::discover;
use crate::discover::tasks;
use crate::ids::Pid;
use crate::sysroot::SysRoot;

impl Attachment<'_> {
    /// Takes all threads of this process off the CPUs of all VMs, whether or not something else excludes it: each
    /// supervisor does that for itself. What it is not permitted is not needed: a cpuset that leaves it nothing else is
    /// its limit, too.
    pub(crate) fn step_aside(&mut self) {
        if self.known.settings.follow != Follow::Stay {
            return;
        }
        let ground = self.known.ground();
        let leases = discover::live_leases(ground.host.root, ground.state, ground.boot_id);
        let taken = leases.iter().fold(CpuSet::EMPTY, |all, lease| all | lease.exclusive);
        let cpus = self.online - taken;
        if cpus.is_empty() || cpus == self.own_cpus {
            return;
        }
        self.own_cpus = cpus;
        let own = Pid(i32::try_from(std::process::id()).unwrap_or_default());
        let threads = tasks::list(&SysRoot::live(), own).unwrap_or_default();
        for thread in threads {
            if let Err(error) = self.known.host.sched.set_affinity(thread, &cpus) {
                tracing::debug!("qmpin itself stays where it is: {error}");
            }
        }
    }
}
