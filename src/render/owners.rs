//! Who owns which CPU: the VMs' leases, as far as drawing them is concerned.

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, VmName};

/// The CPUs that VMs have for themselves. A CPU has at most one owner: where two claim it, the one
/// added first.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    owners: Vec<(VmName, CpuSet)>,
}

impl Owners {
    /// Nothing is owned.
    #[must_use]
    pub fn none() -> Owners {
        Owners::default()
    }

    /// Gives `vm` those of `cpus` that have no owner yet.
    pub fn add(&mut self, vm: VmName, cpus: CpuSet) {
        let free = cpus - self.cpus();
        match self.owners.iter_mut().find(|(name, _)| *name == vm) {
            Some((_, owned)) => *owned |= free,
            None => self.owners.push((vm, free)),
        }
    }

    /// Whose the CPU is.
    #[must_use]
    pub fn of(&self, cpu: CpuId) -> Option<&VmName> {
        self.owners.iter().find(|(_, cpus)| cpus.contains(cpu)).map(|(vm, _)| vm)
    }

    /// All CPUs that have an owner.
    #[must_use]
    pub fn cpus(&self) -> CpuSet {
        self.owners.iter().fold(CpuSet::EMPTY, |all, (_, cpus)| all | *cpus)
    }

    /// The VMs in the order they were added, each with its CPUs.
    pub fn iter(&self) -> impl Iterator<Item = (&VmName, &CpuSet)> {
        self.owners.iter().map(|(vm, cpus)| (vm, cpus))
    }
}

impl FromIterator<(VmName, CpuSet)> for Owners {
    fn from_iter<I: IntoIterator<Item = (VmName, CpuSet)>>(owners: I) -> Owners {
        let mut all = Owners::none();
        for (vm, cpus) in owners {
            all.add(vm, cpus);
        }
        all
    }
}
