//! Where the interrupts of a VM's own devices go (`vfio_irqs`). They are part of the knob *irqs*, and are
//! not treated as any other: they carry the VM's own work.

use crate::cpuset::CpuSet;
use crate::knobs::host::kept_off;
use crate::knobs::host::places::VfioIrq;
use crate::leases::Lease;
use crate::policy::VfioIrqs;

/// What one VM wants of its own devices' interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VfioWant {
    /// Where they are to go.
    pub to: VfioIrqs,
    /// Where its iothreads are.
    pub iothreads: CpuSet,
    /// Where its vCPUs are.
    pub vcpus: CpuSet,
    /// The CPUs that are its alone.
    pub exclusive: CpuSet,
}

impl VfioWant {
    /// What is wanted, from what a lease says.
    #[must_use]
    pub fn of(lease: &Lease) -> VfioWant {
        let Lease { vfio_irqs: to, iothreads, exclusive, .. } = *lease;
        VfioWant { to, iothreads, vcpus: lease.vcpu_cpus(), exclusive }
    }
}

/// Where the interrupt should be; `None`: where it is. Where what is wanted has no CPU that is online it
/// is treated as any other. `off` are the CPUs of all VMs.
pub(crate) fn target(
    irq: &VfioIrq,
    want: &VfioWant,
    original: &CpuSet,
    off: &CpuSet,
    online: &CpuSet,
) -> Option<CpuSet> {
    let wishes = match want.to {
        VfioIrqs::Iothreads => {
            let away = want.iothreads - *off;
            vec![away & irq.local, away]
        }
        VfioIrqs::Vcpus => vec![want.vcpus],
        VfioIrqs::Leave => return kept_off(original, &(*off - want.exclusive), online),
    };
    let wish = wishes.into_iter().find(|cpus| cpus.intersects(online));
    wish.or_else(|| kept_off(original, off, online))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Pid, StartTicks};
    use crate::threads::ProcessKey;

    fn cpus(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    fn target_of(to: VfioIrqs, iothreads: &str, local: &str, original: &str) -> Option<CpuSet> {
        let vm = ProcessKey { pid: Pid(7), start: StartTicks(1) };
        let irq = VfioIrq { vm, device: "0000:0a:00.0".to_owned(), local: cpus(local) };
        let (iothreads, own) = (cpus(iothreads), cpus("4-5"));
        let want = VfioWant { to, iothreads, vcpus: own, exclusive: own };
        target(&irq, &want, &cpus(original), &cpus("4-5,8"), &cpus("0-9"))
    }

    #[test]
    fn it_goes_with_the_iothreads_of_the_devices_node() {
        let of = |iothreads, local| target_of(VfioIrqs::Iothreads, iothreads, local, "0-9");
        assert_eq!(of("0-3", "2-5"), Some(cpus("2-3")));
        assert_eq!(of("0-3", "6-9"), Some(cpus("0-3")), "none of them is there");
        assert_eq!(of("0-3", ""), Some(cpus("0-3")), "it has no node");
        assert_eq!(of("3-5", "0-9"), Some(cpus("3")), "not where vCPUs are");
        assert_eq!(of("4-5", "0-9"), Some(cpus("0-3,6-7,9")), "nowhere else: as any other");
        assert_eq!(of("10-11", "0-9"), Some(cpus("0-3,6-7,9")), "all are offline");
    }

    #[test]
    fn it_goes_with_the_vcpus_where_that_is_wanted() {
        assert_eq!(target_of(VfioIrqs::Vcpus, "0-3", "0-3", "0-9"), Some(cpus("4-5")));
    }

    #[test]
    fn it_is_left_but_for_the_cpus_of_other_vms() {
        assert_eq!(target_of(VfioIrqs::Leave, "0-3", "0-3", "0-5"), None);
        assert_eq!(target_of(VfioIrqs::Leave, "0-3", "0-3", "0-9"), Some(cpus("0-7,9")));
    }
}
