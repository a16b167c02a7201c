//! vCPUs on CPUs by hand whose order counts (`vcpus = "5,3,1"`): vCPU 0 on the first, vCPU 1 on the second.
//!
//! ```text
//!   a vCPU whose index is a place of the list ─▶ the CPU of that place
//!   another (the guest's indices have gaps)   ─▶ where it was before, else the first CPU of the list that is left
//!   none is left                              ─▶ with share = true round the list, else refused or overflow
//! ```
//!
//! A place is an index, so hotplug moves no other vCPU.

use std::collections::BTreeMap;

use super::machine::{Group, free_cpus};
use super::report::{Placed, Why};
use super::vcpus::{Placement, guest_cores};
use crate::cpuset::CpuSet;
use crate::guest::Guest;
use crate::ids::{CpuId, VcpuIndex};
use crate::policy::{CpuOrder, Sharing};
use crate::topology::Topology;

/// Places every vCPU. `None`: the list does not hold a VM that has nothing yet.
pub(super) fn place(
    topology: &Topology,
    groups: &[Group<'_>],
    guest: &Guest,
    held: &BTreeMap<VcpuIndex, CpuId>,
    order: &CpuOrder,
    sharing: Sharing,
) -> Option<Placement> {
    let mut vcpus: Vec<VcpuIndex> = guest.vcpus.iter().map(|vcpu| vcpu.index).collect();
    vcpus.sort_unstable();
    let list = List { order: order.as_slice(), free: free_cpus(groups) };
    let mut seats = Seats { sharing, on: BTreeMap::new(), used: CpuSet::EMPTY };
    // A vCPU beyond the list keeps the CPU of a vCPU that is only now plugged.
    let owner = |cpu: CpuId| vcpus.iter().find(|vcpu| list.place(**vcpu) == Some(cpu));
    for vcpu in vcpus.iter().filter(|vcpu| list.place(**vcpu).is_none()) {
        let before = held.get(vcpu).copied().filter(|cpu| list.cpus().any(|free| free == *cpu));
        let is_new = |cpu| owner(cpu).is_none_or(|owner| !held.contains_key(owner));
        seats.offer(*vcpu, before.filter(|cpu| sharing == Sharing::Wrap || is_new(*cpu)));
    }
    for vcpu in &vcpus {
        seats.offer(*vcpu, list.place(*vcpu));
    }
    for vcpu in &vcpus {
        let left = list.cpus().find(|cpu| !seats.used.contains(*cpu));
        seats.offer(*vcpu, left.or_else(|| list.round(*vcpu)));
    }
    let unplaced: Vec<VcpuIndex> =
        vcpus.iter().copied().filter(|vcpu| !seats.on.contains_key(vcpu)).collect();
    if !unplaced.is_empty() && held.is_empty() {
        return None;
    }
    Some(Placement::of(topology, &guest_cores(&guest.vcpus), seats.placed(), unplaced))
}

/// The CPUs in their order, and those of them that the VM may have now.
struct List<'a> {
    order: &'a [CpuId],
    free: CpuSet,
}

impl List<'_> {
    fn cpus(&self) -> impl Iterator<Item = CpuId> {
        self.order.iter().copied().filter(|cpu| self.free.contains(*cpu))
    }

    /// The CPU of a vCPU's place.
    fn place(&self, vcpu: VcpuIndex) -> Option<CpuId> {
        let at = usize::try_from(vcpu.0).ok()?;
        self.order.get(at).copied().filter(|cpu| self.free.contains(*cpu))
    }

    /// The CPU of a vCPU where the list is gone through again and again.
    fn round(&self, vcpu: VcpuIndex) -> Option<CpuId> {
        let cpus = self.cpus().count();
        let at = usize::try_from(vcpu.0).ok()?.checked_rem(cpus)?;
        self.cpus().nth(at)
    }
}

/// Who has which CPU.
struct Seats {
    sharing: Sharing,
    on: BTreeMap<VcpuIndex, CpuId>,
    used: CpuSet,
}

impl Seats {
    /// Gives the vCPU that CPU, unless it has one, or the CPU is another's and is not to be shared.
    fn offer(&mut self, vcpu: VcpuIndex, cpu: Option<CpuId>) {
        let Some(cpu) = cpu else { return };
        let is_free = self.sharing == Sharing::Wrap || !self.used.contains(cpu);
        if is_free && !self.on.contains_key(&vcpu) {
            self.used.insert(cpu);
            self.on.insert(vcpu, cpu);
        }
    }

    fn placed(self) -> Vec<Placed> {
        let users = |cpu: CpuId| self.on.values().filter(|other| **other == cpu).count();
        let why = |cpu| if users(cpu) > 1 { Why::Wrapped } else { Why::ByHand };
        self.on
            .iter()
            .map(|(vcpu, cpu)| Placed { vcpu: *vcpu, cpu: *cpu, why: why(*cpu) })
            .collect()
    }
}
