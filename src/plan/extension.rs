//! Hot-add and hot-remove: what is held stays, and only the rest is placed.
//!
//! ```text
//!   a new vCPU ─▶ beside its guest sibling
//!              ─▶ a core of its own, of a group in use
//!              ─▶ an idle sibling of the VM's cores   (a guest with siblings of its own: at last)
//!              ─▶ a core of its own, of another group: the same kind, the nearest
//!              ─▶ with share = true, the CPU with the fewest vCPUs
//! ```
//!
//! "In use" and "nearest" are meant for the guest NUMA node the vCPU belongs to.

use std::collections::BTreeMap;

use super::groups;
use super::machine::{Group, free_cpus};
use super::report::{Placed, Why};
use super::vcpus::{GuestCore, Placement, guest_cores, threads};
use crate::cpuset::CpuSet;
use crate::guest::Guest;
use crate::ids::{CpuId, NodeId, VcpuIndex};
use crate::policy::{Sharing, Smt, VmPolicy};
use crate::topology::{CoreKind, Topology};

/// Places the vCPUs that hold nothing, or nothing valid, around those that do, and those that are `fixed` where that
/// says.
/// `None`: nothing is fixed, and nothing that is held is valid, so it is a fresh start.
pub(super) fn extended(
    topology: &Topology,
    groups: &[Group<'_>],
    guest: &Guest,
    [fixed, held]: [&BTreeMap<VcpuIndex, CpuId>; 2],
    vm: &VmPolicy,
) -> Option<Placement> {
    let sharing = vm.share.value;
    if held.is_empty() && fixed.is_empty() {
        return None;
    }
    let mut state = Extension {
        topology,
        groups,
        smt: vm.smt.value,
        free: free_cpus(groups),
        on: BTreeMap::new(),
        used: CpuSet::EMPTY,
        homes: BTreeMap::new(),
    };
    for vcpu in &guest.vcpus {
        if let Some(cpu) = fixed.get(&vcpu.index) {
            state.put(vcpu.index, vcpu.node, *cpu, Why::ByHand);
        }
    }
    // Whichever thread of a core it had: which of them are idle is another's choice.
    let cores = groups.iter().flat_map(|group| &group.free);
    let may_stay = cores.fold(CpuSet::EMPTY, |all, core| all | core.free());
    for vcpu in guest.vcpus.iter().filter(|vcpu| !fixed.contains_key(&vcpu.index)) {
        let Some(cpu) = held.get(&vcpu.index).copied() else { continue };
        // Shared by an earlier policy; this one gives each vCPU its own.
        let core = topology.core_of(cpu).filter(|_| vm.smt.value == Smt::Isolate);
        let has_user =
            |used: &CpuSet| core.map_or(used.contains(cpu), |core| core.cpus.intersects(used));
        let doubled = sharing == Sharing::Refuse && has_user(&state.used);
        if may_stay.contains(cpu) && !doubled {
            state.put(vcpu.index, vcpu.node, cpu, Why::Held);
        }
    }
    if state.on.is_empty() {
        return None;
    }
    let cores = guest_cores(&guest.vcpus);
    let threads = threads(&cores);
    let mut rest: Vec<(VcpuIndex, &GuestCore)> = cores
        .iter()
        .flat_map(|core| core.vcpus.iter().map(move |vcpu| (*vcpu, core)))
        .filter(|(vcpu, _)| !state.on.contains_key(vcpu))
        .collect();
    rest.sort_by_key(|(vcpu, _)| *vcpu);
    let mut unplaced = Vec::new();
    for (vcpu, core) in rest {
        let node = core.node;
        // The guest's scheduler believes in its siblings: a false one misleads it for good, so a core
        // of its own is better, even a far one.
        let found = state
            .beside_sibling(core)
            .or_else(|| {
                let fills = vm.smt.value == Smt::Siblings && threads == 1;
                if fills { state.filling(node) } else { None }
            })
            .or_else(|| state.own_core(node, Reach::GroupsInUse, threads))
            .or_else(|| if threads == 1 { state.idle_sibling(node) } else { None })
            .or_else(|| state.own_core(node, Reach::Anywhere, threads))
            .or_else(|| state.own_core(node, Reach::Anywhere, 1))
            .or_else(|| state.idle_sibling(node))
            .or_else(|| if sharing == Sharing::Wrap { state.wrap() } else { None });
        match found {
            Some((cpu, why)) => state.put(vcpu, node, cpu, why),
            None => unplaced.push(vcpu),
        }
    }
    Some(Placement::of(topology, &cores, state.on.into_values().collect(), unplaced))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    GroupsInUse,
    Anywhere,
}

struct Extension<'a> {
    topology: &'a Topology,
    groups: &'a [Group<'a>],
    smt: Smt,
    free: CpuSet,
    on: BTreeMap<VcpuIndex, Placed>,
    used: CpuSet,
    /// What the vCPUs of each guest node use.
    homes: BTreeMap<Option<u32>, CpuSet>,
}

impl Extension<'_> {
    fn put(&mut self, vcpu: VcpuIndex, node: Option<u32>, cpu: CpuId, why: Why) {
        self.used.insert(cpu);
        self.homes.entry(node).or_default().insert(cpu);
        self.on.insert(vcpu, Placed { vcpu, cpu, why });
    }

    /// What the guest node uses, or the whole guest where the node has nothing yet.
    fn home(&self, node: Option<u32>) -> CpuSet {
        self.homes.get(&node).copied().unwrap_or(self.used)
    }

    /// An unused CPU of the core that this one belongs to.
    fn idle_beside(&self, cpu: CpuId) -> Option<CpuId> {
        let core = self.topology.core_of(cpu).filter(|_| self.smt != Smt::Isolate)?;
        ((core.cpus & self.free) - self.used).first()
    }

    fn beside_sibling(&self, guest: &GuestCore) -> Option<(CpuId, Why)> {
        guest.vcpus.iter().find_map(|other| {
            let placed = self.on.get(other)?;
            Some((self.idle_beside(placed.cpu)?, Why::SiblingOf(*other)))
        })
    }

    /// An unused core that has room for a guest core.
    fn own_core(&self, node: Option<u32>, reach: Reach, threads: usize) -> Option<(CpuId, Why)> {
        let home = self.home(node);
        let in_use = |group: &Group<'_>| group.cpus.intersects(&home);
        let ours = || self.groups.iter().filter(|group| in_use(group));
        let near: Vec<NodeId> = ours().filter_map(|group| group.node).collect();
        let kinds: Vec<Option<CoreKind>> = ours().map(|group| group.kind).collect();
        let mut order: Vec<&Group<'_>> =
            self.groups.iter().filter(|group| reach == Reach::Anywhere || in_use(group)).collect();
        order.sort_by_key(|group| {
            let distance = groups::distance(self.topology, group.node, &near);
            (!kinds.contains(&group.kind), distance, group.has_reserved, group.order)
        });
        let found = order
            .iter()
            .flat_map(|group| &group.free)
            .find(|core| core.threads >= threads && !core.intersects(&self.used));
        Some((found?.thread(0)?, Why::OwnCore))
    }

    /// The idle thread of a core where cores are to be filled.
    fn filling(&self, node: Option<u32>) -> Option<(CpuId, Why)> {
        let fills = |(cpu, why)| match why {
            Why::SecondThreadBeside(vcpu) => (cpu, Why::Fills(vcpu)),
            why => (cpu, why),
        };
        self.idle_sibling(node).map(fills)
    }

    fn idle_sibling(&self, node: Option<u32>) -> Option<(CpuId, Why)> {
        let home = self.home(node);
        let beside = |placed: &Placed| {
            Some((self.idle_beside(placed.cpu)?, Why::SecondThreadBeside(placed.vcpu)))
        };
        let mut at_home = self.on.values().filter(|placed| home.contains(placed.cpu));
        at_home.find_map(beside).or_else(|| self.on.values().find_map(beside))
    }

    /// Shares the CPU that has the fewest vCPUs of this VM.
    fn wrap(&self) -> Option<(CpuId, Why)> {
        let users = |cpu: CpuId| self.on.values().filter(|placed| placed.cpu == cpu).count();
        self.used.iter().min_by_key(|cpu| users(*cpu)).map(|cpu| (cpu, Why::Wrapped))
    }
}
