//! The knob *smt*: how vCPUs use the threads of a core.
//!
//! | `smt` | guest with threads=1 | guest with threads=2 |
//! |---|---|---|
//! | `prefer` | a core for each vCPU, then the second threads | guest siblings on host siblings |
//! | `siblings` | core by core, each thread by thread | as with `prefer` |
//! | `isolate` | a core for each vCPU, else there is no plan | the same: guest siblings are apart |

use std::collections::BTreeMap;

use super::Request;
use super::machine::Group;
use super::report::{Finding, Placed, Why};
use super::vcpus::{GuestCore, Placement, threads};
use crate::cpuset::CpuSet;
use crate::policy::{CpuChoice, Smt, Sourced, VmPolicy};
use crate::topology::Core;
use crate::wording::{counted, cpus_in_words};

/// The rule's name in the report.
const RULE: &str = "smt";

/// Leaves one thread of each core to a VM that is to have cores alone. An order by hand is taken as it is.
pub(super) fn restrict(groups: &mut [Group<'_>], vm: &VmPolicy) {
    if vm.smt.value != Smt::Isolate || matches!(vm.vcpus.value, CpuChoice::InOrder(_)) {
        return;
    }
    for core in groups.iter_mut().flat_map(|group| &mut group.free) {
        core.threads = 1;
    }
}

/// What is kept together on a core where cores are to be filled: as many vCPUs of a guest node as a core has threads.
/// `None`: the guest's own cores are what counts.
pub(super) fn filled(
    vm: &VmPolicy,
    groups: &[Group<'_>],
    cores: &[GuestCore],
) -> Option<Vec<GuestCore>> {
    if vm.smt.value != Smt::Siblings || threads(cores) > 1 {
        return None;
    }
    let widest = groups.iter().flat_map(|group| &group.free).map(|core| core.threads).max();
    let mut of_node: BTreeMap<Option<u32>, Vec<_>> = BTreeMap::new();
    for core in cores {
        of_node.entry(core.node).or_default().extend(&core.vcpus);
    }
    let filled = of_node.into_iter().flat_map(|(node, vcpus)| {
        let cores = vcpus.chunks(widest.unwrap_or(1).max(1));
        cores.map(|vcpus| GuestCore { node, vcpus: vcpus.to_vec() }).collect::<Vec<_>>()
    });
    Some(filled.collect())
}

/// Says why of vCPUs that fill a core, which are no siblings in the guest.
pub(super) fn say_why(placed: &mut [Placed]) {
    for place in placed {
        if let Why::SiblingOf(vcpu) = place.why {
            place.why = Why::Fills(vcpu);
        }
    }
}

/// What is said of the way that was asked for.
pub(super) fn finding(
    request: &Request<'_>,
    placement: &Placement,
    used: &CpuSet,
) -> Option<Finding> {
    let Sourced { value, origin } = &request.policy.vm.smt;
    let topology = request.machine.topology;
    if *value == Smt::Prefer || used.is_empty() {
        return None;
    }
    let of_hand = match request.policy.vm.vcpus.value {
        CpuChoice::Auto => String::new(),
        _ => format!("; the CPUs are given by hand ({})", request.policy.vm.vcpus.origin),
    };
    let mut mine = topology.cores.iter().filter(|core| core.cpus.intersects(used));
    Some(match value {
        Smt::Prefer => return None,
        Smt::Isolate => {
            let users = |core: &&Core| {
                placement.placed.iter().filter(|placed| core.cpus.contains(placed.cpu)).count()
            };
            let doubled = mine.filter(|core| users(core) > 1 || placement.floats.is_some());
            let doubled = doubled.fold(CpuSet::EMPTY, |all, core| all | (core.cpus & *used));
            if doubled.is_empty() && placement.unplaced.is_empty() {
                Finding::met(RULE, format!("each vCPU has a core alone ({origin})"))
            } else if doubled.is_empty() {
                Finding::degraded(RULE, format!("not every vCPU has a core ({origin})"))
            } else {
                let cpus = cpus_in_words(&doubled);
                Finding::degraded(RULE, format!("vCPUs share cores on {cpus} ({origin}){of_hand}"))
            }
        }
        Smt::Siblings if topology.cores.iter().all(|core| core.cpus.len() == 1) => {
            Finding::met(RULE, format!("each core of this machine has one thread ({origin})"))
        }
        Smt::Siblings => {
            let nodes = request.guest.vcpus.iter().map(|vcpu| vcpu.node);
            let nodes = nodes.collect::<std::collections::BTreeSet<_>>().len();
            let idle = mine.clone().filter(|core| !core.cpus.is_subset(used)).count();
            // An odd number of vCPUs leaves a thread over.
            if idle <= nodes {
                let cores = counted(mine.by_ref().count(), "core");
                Finding::met(RULE, format!("vCPUs fill {cores} thread by thread ({origin})"))
            } else {
                let idle = counted(idle, "core");
                Finding::degraded(RULE, format!("{idle} not filled ({origin}){of_hand}"))
            }
        }
    })
}
