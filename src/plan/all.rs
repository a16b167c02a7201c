//! All VMs of a host at once: those that have CPUs already stay, the others are placed one after the other, the largest
//! first, and what is left is counted.
//!
//! ```text
//!   attached      their CPUs are taken
//!   by hand       first: they have no choice
//!   the others    by their number of vCPUs, then by name
//! ```

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::housekeeping::Claims;
use super::{Machine, Neighbour, Neighbours, Plan, PlanError, Request, Stay, plan};
use crate::cpuset::CpuSet;
use crate::devices::Device;
use crate::guest::Guest;
use crate::ids::{LlcId, NodeId, VmName};
use crate::policy::{CpuChoice, Policy};
use crate::promises::Surroundings;

/// A VM that is to be placed.
#[derive(Clone, Debug)]
pub struct Declared {
    /// Its name.
    pub vm: VmName,
    /// What it would have, once it is started.
    pub guest: Guest,
    /// The devices that it would have for itself.
    pub devices: Vec<Device>,
    /// What it asks for.
    pub policy: Policy,
}

/// What was planned for all.
#[derive(Clone, Debug)]
pub struct AllPlanned {
    /// Each VM that was to be placed, in the order in which that was done.
    pub plans: Vec<(VmName, Result<Plan, PlanError>)>,
    /// What is left behind each cache.
    pub left: Vec<Left>,
    /// The most vCPUs that one more VM could have.
    pub largest_vm_vcpus: usize,
}

/// What is left of a group of cores.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Left {
    /// Which cache it is behind, where that is known.
    pub llc: Option<LlcId>,
    /// On which node.
    pub node: Option<NodeId>,
    /// All its CPUs.
    pub cpus: CpuSet,
    /// Those that a VM could have.
    pub free: CpuSet,
    /// How many cores these are.
    pub free_cores: usize,
}

/// Places all of them beside VMs that are attached. `host` is the policy that a further VM would have.
#[must_use]
pub fn plan_all(
    machine: &Machine<'_>,
    declared: Vec<Declared>,
    mut neighbours: Neighbours,
    surroundings: &Surroundings,
    host: &Policy,
) -> AllPlanned {
    let plans = place_all(machine, declared, &mut neighbours, surroundings);
    let left = left(machine, &neighbours, surroundings, host);
    let largest_vm_vcpus = left.iter().map(|left| left.free.len()).sum();
    AllPlanned { plans, left, largest_vm_vcpus }
}

/// The same without what is left. Who is placed becomes a neighbour of the next one.
pub(super) fn place_all(
    machine: &Machine<'_>,
    mut declared: Vec<Declared>,
    neighbours: &mut Neighbours,
    surroundings: &Surroundings,
) -> Vec<(VmName, Result<Plan, PlanError>)> {
    declared.sort_by_cached_key(|one| {
        let has_choice = one.policy.vm.vcpus.value == CpuChoice::Auto;
        (has_choice, Reverse(one.guest.vcpus.len()), by_number(&one.vm))
    });
    let mut plans = Vec::with_capacity(declared.len());
    for Declared { vm, guest, devices, policy } in declared {
        let around = Surroundings { devices, ..surroundings.clone() };
        let planned = plan(&Request {
            vm: &vm,
            machine,
            guest: &guest,
            policy: &policy,
            neighbours,
            surroundings: &around,
            held: &BTreeMap::new(),
            stay: Stay::Always,
        });
        if let Ok(plan) = &planned {
            neighbours.push(Neighbour {
                vm: vm.clone(),
                exclusive: plan.exclusive,
                helpers: plan.emulator | plan.iothread_cpus,
                doubt: None,
            });
        }
        plans.push((vm, planned));
    }
    plans
}

/// Proxmox's numbers in their order, then other names.
fn by_number(vm: &VmName) -> (u64, VmName) {
    (vm.as_str().parse().unwrap_or(u64::MAX), vm.clone())
}

/// What one more VM with this policy could have.
fn left(
    machine: &Machine<'_>,
    neighbours: &Neighbours,
    surroundings: &Surroundings,
    policy: &Policy,
) -> Vec<Left> {
    let empty = Guest::default();
    let (Ok(vm), held) = ("left".parse(), BTreeMap::new()) else { return Vec::new() };
    let request = Request {
        vm: &vm,
        machine,
        guest: &empty,
        policy,
        neighbours,
        surroundings,
        held: &held,
        stay: Stay::Always,
    };
    // Where the policy names CPUs that are not there, no plan can be made, and that was said.
    let Ok(claims) = Claims::gather(&request) else { return Vec::new() };
    let groups = machine.groups(&claims.reserved, &claims.never(), None);
    let of = |group: &super::machine::Group<'_>| Left {
        llc: group.llc,
        node: group.node,
        cpus: group.cpus,
        free: group.free.iter().fold(CpuSet::EMPTY, |all, core| all | core.usable()),
        free_cores: group.free.len(),
    };
    groups.iter().map(of).collect()
}
