//! When the rest of the host was last compared with the leases, and with what these wanted: one supervisor's pass
//! serves all. It is the content of `.host.lock`, so that it goes with the last VM.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::knobs::host::Wants;
use crate::knobs::host::places::HostView;
use crate::leases::{Lease, StateDir};
use crate::locks::HostLock;
use crate::state_file;
use crate::threads::ProcessKey;

/// The longest that is read.
const BYTES_MAX: u64 = 1 << 20;

/// A pass over the rest of the host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostPass {
    /// When it began, in ms since the host was booted.
    began_ms: u64,
    /// The VMs that have devices with interrupts.
    with_devices: BTreeSet<ProcessKey>,
    /// What the leases wanted, as a number. Another version of qmpin may have another one, and does a pass of its own.
    wanted: u64,
}

impl HostPass {
    /// One that began at `began_ms`, and has found, or made, the host as it is wanted.
    pub(crate) fn done(began_ms: u64, wants: &Wants, view: &HostView) -> HostPass {
        let with_devices = view.vfio.values().map(|irq| irq.vm).collect();
        let wanted = number(wants.clone(), &with_devices);
        HostPass { began_ms, with_devices, wanted }
    }

    /// Reads what the last one has left; `None`: there was none, or it is not known.
    #[must_use]
    pub fn last(state: &StateDir) -> Option<HostPass> {
        let text = state_file::read_state(&state.host_lock_path(), BYTES_MAX).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Notes that it has been done.
    ///
    /// # Errors
    /// The kernel's answer. Then the next supervisor does a pass of its own.
    pub fn note(&self, lock: &HostLock) -> io::Result<()> {
        let file = &lock.file;
        file.set_len(0)?;
        file.write_all_at(&serde_json::to_vec(self)?, 0)
    }

    /// Whether it began less than `within` ago.
    #[must_use]
    pub fn is_recent(&self, within: Duration) -> bool {
        let age_ms = now_ms().checked_sub(self.began_ms);
        age_ms.is_some_and(|age_ms| Duration::from_millis(age_ms) < within)
    }

    /// Whether these leases want what the pass went by. Helpers that move are no matter of the host's.
    #[must_use]
    pub fn went_by(&self, leases: &[Lease]) -> bool {
        self.wanted == number(Wants::of(leases), &self.with_devices)
    }
}

fn number(mut wants: Wants, with_devices: &BTreeSet<ProcessKey>) -> u64 {
    // What the others want of interrupts of their own devices makes no difference.
    wants.vfio.retain(|vm, _| with_devices.contains(vm));
    let mut hasher = DefaultHasher::new();
    wants.hash(&mut hasher);
    hasher.finish()
}

/// The time since the host was booted, in ms.
pub(crate) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1000 + nanoseconds.unwrap_or(0) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuset::CpuSet;
    use crate::ids::{Pid, StartTicks};
    use crate::knobs::host::places::{Place, VfioIrq};
    use crate::policy::Knob;

    fn lease(pid: i32, iothreads: &str) -> Lease {
        let set = |list: &str| -> CpuSet { list.parse().expect("a cpulist") };
        let qemu = ProcessKey { pid: Pid(pid), start: StartTicks(7) };
        let vm = pid.to_string().parse().expect("a name");
        Lease {
            exclusive: set("4-5"),
            iothreads: set(iothreads),
            knobs: [Knob::Irqs].into(),
            ..Lease::new(vm, "this-boot".to_owned(), qemu)
        }
    }

    #[test]
    fn iothreads_that_move_count_where_the_vm_has_devices() {
        let leases = [lease(500, "0"), lease(600, "1")];
        let irq = VfioIrq { vm: leases[0].qemu, device: String::new(), local: CpuSet::EMPTY };
        let mut view = HostView::default();
        view.vfio.insert(Place::CpuList("proc/irq/9/smp_affinity_list".to_owned()), irq);
        let pass = HostPass::done(now_ms(), &Wants::of(&leases), &view);
        assert!(pass.went_by(&leases));
        assert!(pass.went_by(&[lease(500, "0"), lease(600, "2")]));
        assert!(!pass.went_by(&[lease(500, "2"), lease(600, "1")]));
        assert!(!pass.went_by(&leases[..1]));
    }
}
