//! Where qmpin itself runs: nowhere near a VM's CPUs, also where no partition excludes it.

use crate::cpuset::CpuSet;
use crate::discover;
use crate::discover::tasks;
use crate::ids::Pid;
use crate::knobs::ground::Host;
use crate::leases::StateDir;
use crate::sysroot::SysRoot;

/// Takes all threads of this process off the CPUs of all VMs, whether or not something else excludes it. What it is not
/// permitted is not needed: a cpuset that leaves it nothing else is its limit, too.
pub(crate) fn step_aside(
    host: Host<'_>,
    state: &StateDir,
    boot_id: &str,
    online: CpuSet,
    own_cpus: &mut CpuSet,
) {
    let leases = discover::live_leases(host.root, state, boot_id);
    let taken = leases.iter().fold(CpuSet::EMPTY, |all, lease| all | lease.exclusive);
    let cpus = online - taken;
    if cpus.is_empty() || cpus == *own_cpus {
        return;
    }
    *own_cpus = cpus;
    let own = Pid(i32::try_from(std::process::id()).unwrap_or_default());
    let threads = tasks::list(&SysRoot::live(), own).unwrap_or_default();
    for thread in threads {
        if let Err(error) = host.sched.set_affinity(thread, &cpus) {
            tracing::debug!("qmpin itself stays where it is: {error}");
        }
    }
}
