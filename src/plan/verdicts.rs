//! The report: for each rule, how far the plan keeps it, with the numbers that say so.

use super::helpers::Away;
use super::housekeeping::{Claims, Found, Helpers, whole_cores};
use super::machine::Group;
use super::report::{Finding, Why, counted, cpus_in_words};
use super::vcpus::{Placement, Siblings};
use super::{Plan, Request};
use crate::cpuset::CpuSet;
use crate::policy::{CpuChoice, Origin};

/// Why the free cores do not hold the VM.
pub(super) fn shortage(request: &Request<'_>, claims: &Claims, groups: &[Group]) -> String {
    let vcpus = request.guest.vcpus.len();
    let cores: usize = groups.iter().map(|group| group.free.len()).sum();
    let cpus: usize = groups.iter().map(Group::free_cpus).sum();
    let mut taken = Vec::new();
    if !claims.reserved.is_empty() {
        taken.push(format!("the host keeps {}", cpus_in_words(&claims.reserved)));
    }
    if !claims.shared.is_empty() {
        taken.push(format!("helpers share {}", cpus_in_words(&claims.shared)));
    }
    if !claims.others.is_empty() {
        let others: Vec<&str> = request.neighbours.iter().map(|vm| vm.vm.as_str()).collect();
        let who = match others.as_slice() {
            [one] => format!("VM {one} has"),
            many if many.len() <= 4 => format!("VMs {} have", many.join(", ")),
            many => format!("{} VMs have", many.len()),
        };
        taken.push(format!("{who} {}", cpus_in_words(&claims.others)));
    }
    let of = match request.policy.vm.vcpus.value {
        CpuChoice::Cpus(only) => format!("vcpus = \"{only}\" ({})", request.policy.vm.vcpus.origin),
        CpuChoice::Auto => counted(request.topology.online().len(), "online CPU"),
    };
    let needs = if vcpus == 1 { "needs a CPU of its own" } else { "need a CPU each" };
    format!(
        "{} {needs}; {} on {} free of {of}: {}",
        counted(vcpus, "vCPU"),
        counted(cpus, "CPU"),
        counted(cores, "core"),
        if taken.is_empty() { "nobody else has any".to_owned() } else { taken.join(", ") }
    )
}

/// All findings, in the order of the walk: host, vCPUs, helpers, neighbours.
pub(super) fn report(
    request: &Request<'_>,
    claims: &Claims,
    groups: &[Group],
    placement: &Placement,
    plan: &Plan,
    helpers: [&Helpers; 2],
) -> Vec<Finding> {
    let mut report = vec![reserved(request, claims)];
    if let CpuChoice::Cpus(cpus) = request.policy.vm.vcpus.value {
        report.push(by_hand("vcpus", &cpus, &request.policy.vm.vcpus.origin));
    }
    let used: CpuSet = placement.placed.iter().map(|placed| placed.cpu).collect();
    report.extend(caches(request, groups, &used));
    report.extend(nodes(groups, &used));
    report.extend(kinds(groups, &used));
    report.extend(siblings(request, placement));
    report.extend(cores(request, plan));
    report.extend(sharing(placement));
    report.extend(overflow(placement, plan));
    for (rule, found) in [("emulator", helpers[0]), ("iothreads", helpers[1])] {
        report.push(helper(rule, found, request, plan));
    }
    report.extend(neighbours(request, plan));
    report
}

fn by_hand(key: &str, cpus: &CpuSet, origin: &Origin) -> Finding {
    Finding::met("by-hand", format!("{key} = \"{cpus}\" ({origin})"))
}

fn reserved(request: &Request<'_>, claims: &Claims) -> Finding {
    let origin = match &request.policy.host.reserved.origin {
        Origin::Default => "auto: the first core".to_owned(),
        origin => origin.to_string(),
    };
    let stay = if claims.reserved.len() == 1 { "stays" } else { "stay" };
    let what = cpus_in_words(&claims.reserved);
    Finding::met("reserved", format!("{what} {stay} with the host ({origin})"))
}

fn caches(request: &Request<'_>, groups: &[Group], used: &CpuSet) -> Option<Finding> {
    let llcs: Vec<&CpuSet> = request
        .topology
        .llcs
        .iter()
        .map(|llc| &llc.cpus)
        .filter(|cpus| cpus.intersects(used))
        .collect();
    let (number, vcpus) = (llcs.len(), counted(request.guest.vcpus.len(), "vCPU"));
    match number {
        0 if request.topology.llcs.is_empty() => {
            Some(Finding::degraded("one-llc", "the kernel does not say which CPUs share a cache"))
        }
        0 => None,
        1 => Some(Finding::met("one-llc", format!("{vcpus} behind one cache, CPUs {}", llcs[0]))),
        _ => {
            let best = groups.iter().map(Group::free_cpus).max().unwrap_or(0);
            let reason = format!(
                "{vcpus} over {number} caches; the most free CPUs behind one are now {best}"
            );
            Some(Finding::degraded("one-llc", reason))
        }
    }
}

fn nodes(groups: &[Group], used: &CpuSet) -> Option<Finding> {
    let all: std::collections::BTreeSet<_> = groups.iter().filter_map(|group| group.node).collect();
    let mine: std::collections::BTreeSet<_> = groups
        .iter()
        .filter(|group| group.cpus.intersects(used))
        .filter_map(|group| group.node)
        .collect();
    if all.len() < 2 || mine.is_empty() {
        return None;
    }
    let names: Vec<String> = mine.iter().map(ToString::to_string).collect();
    let names = names.join(", ");
    Some(if mine.len() == 1 {
        Finding::met("one-node", format!("all vCPUs on node {names}"))
    } else {
        Finding::degraded("one-node", format!("the vCPUs are spread over nodes {names}"))
    })
}

fn kinds(groups: &[Group], used: &CpuSet) -> Option<Finding> {
    let mine: std::collections::BTreeSet<_> = groups
        .iter()
        .filter(|group| group.cpus.intersects(used))
        .filter_map(|group| group.kind)
        .collect();
    let names: Vec<&str> = mine
        .iter()
        .map(|kind| match kind {
            crate::topology::CoreKind::Performance => "performance",
            crate::topology::CoreKind::Efficiency => "efficiency",
        })
        .collect();
    match names.as_slice() {
        [] => None,
        [one] => Some(Finding::met("one-kind", format!("all vCPUs on {one} cores"))),
        _ => Some(Finding::degraded(
            "one-kind",
            "vCPUs on performance and efficiency cores: neither kind alone holds them",
        )),
    }
}

fn siblings(request: &Request<'_>, placement: &Placement) -> Option<Finding> {
    let doubled = placement.placed.iter().filter(|placed| {
        let core = request.topology.core_of(placed.cpu).map(|core| core.cpus);
        core.is_some_and(|core| {
            let others = placement.placed.iter().filter(|other| other.vcpu != placed.vcpu);
            others.clone().any(|other| core.contains(other.cpu))
        })
    });
    match placement.siblings {
        Siblings::Together => {
            Some(Finding::met("guest-siblings", "guest siblings are on sibling CPUs"))
        }
        Siblings::Apart => Some(Finding::degraded(
            "guest-siblings",
            "the guest has threads=2 or more, but not every guest core has a host core to itself",
        )),
        Siblings::None => {
            let doubled = doubled.count();
            let all = placement.placed.len();
            (doubled > 0).then(|| {
                Finding::degraded(
                    "own-core",
                    format!(
                        "{doubled} of {} share a core with another of this VM, and the guest \
                         (threads=1) does not know",
                        counted(all, "vCPU")
                    ),
                )
            })
        }
    }
}

fn cores(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    if plan.exclusive.is_empty() {
        return None;
    }
    let split = whole_cores(request, &plan.exclusive) - plan.exclusive;
    Some(if split.is_empty() {
        Finding::met("whole-cores", "no core is shared with the host or another VM")
    } else {
        let reason = format!(
            "{} not in the set: the sibling of a vCPU's CPU, and the host may use it",
            if split.len() == 1 { format!("CPU {split} is") } else { format!("CPUs {split} are") }
        );
        Finding::degraded("whole-cores", reason)
    })
}

fn sharing(placement: &Placement) -> Option<Finding> {
    let wrapped = placement.placed.iter().filter(|placed| placed.why == Why::Wrapped).count();
    (wrapped > 0).then(|| {
        let cpus: CpuSet = placement.placed.iter().map(|placed| placed.cpu).collect();
        let reason = format!(
            "{} of {} share {}",
            wrapped,
            counted(placement.placed.len(), "vCPU"),
            cpus_in_words(&cpus)
        );
        Finding::degraded("share", reason)
    })
}

fn overflow(placement: &Placement, plan: &Plan) -> Option<Finding> {
    if placement.unplaced.is_empty() {
        return None;
    }
    let who: Vec<String> = placement.unplaced.iter().map(ToString::to_string).collect();
    let who = format!("no CPU is left for vCPU {}", who.join(", "));
    Some(if plan.left_alone.is_empty() {
        let where_to = cpus_in_words(&plan.housekeeping);
        Finding::degraded("overflow", format!("{who}: with the housekeeping {where_to}"))
    } else {
        Finding::impossible("overflow", format!("{who}: left alone (overflow = \"refuse\")"))
    })
}

fn helper(rule: &'static str, found: &Helpers, request: &Request<'_>, plan: &Plan) -> Finding {
    let cpus = cpus_in_words(&found.cpus);
    if found.cpus.intersects(&plan.exclusive) {
        let clash = cpus_in_words(&(found.cpus & plan.exclusive));
        return Finding::degraded(rule, format!("{cpus}: {clash} also run vCPUs"));
    }
    match &found.found {
        Found::ByHand(origin) => Finding::met(rule, format!("{cpus} ({origin})")),
        Found::ByRule(Away::OtherGroupSameNode) => {
            Finding::met(rule, format!("{cpus}: behind another cache, on the same node"))
        }
        Found::ByRule(Away::OtherNode) => {
            let node = found.cpus.first().and_then(|cpu| request.topology.cpu(cpu)?.node);
            let node = node.map_or(String::new(), |node| format!(" {node}"));
            Finding::met(rule, format!("{cpus}: behind another cache, on node{node}, the nearest"))
        }
        Found::ByRule(Away::SameGroup) => Finding::degraded(
            rule,
            format!("{cpus}: behind the vCPUs' own cache, for want of another"),
        ),
    }
}

fn neighbours(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    let close: Vec<String> = request
        .neighbours
        .iter()
        .filter(|vm| vm.helpers.intersects(&plan.exclusive))
        .map(|vm| format!("VM {} ({})", vm.vm, vm.helpers & plan.exclusive))
        .collect();
    (!close.is_empty()).then(|| {
        let reason = format!(
            "helpers of {} may still run on CPUs of this VM until that VM is planned anew",
            close.join(", ")
        );
        Finding::degraded("neighbours", reason)
    })
}
