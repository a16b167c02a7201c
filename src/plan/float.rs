//! vCPUs that float over a set by hand (`vcpus = "float:6-11,18-23"`): each may run on any CPU of it, and the scheduler
//! chooses. There may be more of them than CPUs.

use super::Request;
use super::machine::{Group, free_cpus};
use super::vcpus::{Placement, Siblings, guest_cores, threads};
use crate::guest::Guest;
use crate::policy::CpuChoice;
use crate::wording::{counted, cpus_in_words};

use super::report::Finding;

/// Places all vCPUs. `None`: nothing of the set is free.
pub(super) fn place(groups: &[Group<'_>], guest: &Guest) -> Option<Placement> {
    let set = free_cpus(groups);
    let siblings = match threads(&guest_cores(&guest.vcpus)) {
        0 | 1 => Siblings::None,
        _ => Siblings::Apart,
    };
    (!set.is_empty()).then(|| Placement { floats: Some(set), siblings, ..Placement::default() })
}

/// What is said where there are more vCPUs than CPUs.
pub(super) fn finding(request: &Request<'_>, placement: &Placement) -> Option<Finding> {
    let set = placement.floats?;
    let vcpus = request.guest.vcpus.len();
    (vcpus > set.len()).then(|| {
        let cpus = cpus_in_words(&set);
        Finding::degraded("share", format!("{} float over {cpus}", counted(vcpus, "vCPU")))
    })
}

/// Whether the policy has the vCPUs float.
pub(super) fn is_wanted(request: &Request<'_>) -> bool {
    matches!(request.policy.vm.vcpus.value, CpuChoice::Float(_))
}
