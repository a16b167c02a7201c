//! The report: for each rule, how far the plan keeps it, with the numbers that say so.

use std::collections::{BTreeMap, BTreeSet};

use super::helpers::Away;
use super::housekeeping::{Claims, Found, Helpers};
use super::machine::Group;
use super::report::Finding;
use super::vcpus::{Placement, Siblings};
use super::{Plan, Request, allowed, devices, float, iothreads, memory, needs, promised, smt};
use crate::cpuset::CpuSet;
use crate::guest::Guest;
use crate::ids::{CpuId, IothreadId, LlcId, NodeId};
use crate::policy::{CacheNeed, CoreNeed, CpuChoice, Origin, Smt, Sourced};
use crate::topology::{CoreKind, Llc, Topology};
use crate::wording::{counted, cpus_in_words};

/// Why the free cores do not hold the VM.
pub(super) fn shortage(request: &Request<'_>, claims: &Claims, groups: &[Group<'_>]) -> String {
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
    let alone = request.policy.vm.smt.value == Smt::Isolate;
    let needs = match (vcpus, alone) {
        (1, false) => "needs a CPU of its own".to_owned(),
        (_, false) => "need a CPU each".to_owned(),
        (1, true) => "needs a core alone (smt = \"isolate\")".to_owned(),
        (_, true) => "need a core each (smt = \"isolate\")".to_owned(),
    };
    let needs = format!("{} {needs}", counted(vcpus, "vCPU"));
    let Sourced { value: by_hand, origin } = &request.policy.vm.vcpus;
    if *by_hand != CpuChoice::Auto {
        return format!(
            "{origin}: vcpus = \"{by_hand}\" has {}, and {needs}: name {} more, or say vcpus = \"auto\"",
            counted(cpus, "CPU"),
            vcpus - cpus.min(vcpus),
        );
    }
    taken.extend(request.allowed().map(|limit| limit.why.clone()));
    taken.extend(promised::in_the_way(request, &claims.allowed));
    if !claims.kept.is_empty() {
        taken.push(format!("its helpers keep {}", cpus_in_words(&(claims.kept & claims.allowed))));
    }
    taken.extend(
        needs::in_force(groups, &request.policy.vm)
            .into_iter()
            .map(|need| format!("it is to have {need}")),
    );
    let taken = if taken.is_empty() { "no other VM has any".to_owned() } else { taken.join(", ") };
    let next = match cpus {
        0 => "; with none free, --share does not help: detach another VM or reserve less",
        _ => "",
    };
    format!(
        "{needs}; {} on {} free of {}: {taken}{next}",
        counted(cpus, "CPU"),
        counted(cores, "core"),
        counted(request.machine.online.len(), "online CPU"),
    )
}

/// Names vCPUs that QEMU reports and the VM was not given. They get no CPU of their own, since QEMU is not trusted.
fn beyond(request: &Request<'_>) -> Option<Finding> {
    let Guest { vcpus, beyond, .. } = request.guest;
    let (first, last) = (beyond.first()?, beyond.last()?);
    let Sourced { value, origin } = &request.policy.vm.max_vcpus;
    let which =
        if first == last { format!("vCPU {first}") } else { format!("vCPUs {first}-{last}") };
    Some(Finding::degraded(
        "max-vcpus",
        format!(
            "QEMU reports {}, and {origin} allows {}: {which} run where the helpers do; if that is right, set max_vcpus",
            counted(vcpus.len() + beyond.len(), "vCPU"),
            value.map_or_else(|| "fewer".to_owned(), |max| max.to_string()),
        ),
    ))
}

/// All findings, in the order of the walk: host, vCPUs, helpers, neighbours.
pub(super) fn report(
    request: &Request<'_>,
    claims: &Claims,
    groups: &[Group<'_>],
    placement: &Placement,
    plan: &Plan,
    helpers: [&Helpers; 2],
) -> Vec<Finding> {
    let mut report: Vec<Finding> = request
        .policy
        .instead_of
        .iter()
        .map(|why| Finding::degraded("policy", format!("the last good one is in force: {why}")))
        .collect();
    report.push(reserved(request, claims));
    report.extend(beyond(request));
    report.extend(allowed::finding(request, placement.unplaced.len()));
    let Sourced { value, origin } = &request.policy.vm.vcpus;
    if *value != CpuChoice::Auto {
        report.push(Finding::met("by-hand", format!("vcpus = \"{value}\" ({origin})")));
    }
    let used = placement.used();
    let cells = cells(request, placement);
    report.extend(promised::findings(request, plan, &used));
    report.extend(needs::findings(groups, &request.policy.vm, &used));
    report.extend(caches(request, groups, placement, &cells));
    report.extend(nodes(request.machine.topology, &cells));
    report.extend(memory::finding(request, plan));
    report.extend(devices::finding(request, plan));
    report.extend(large_cache(request, groups, &used));
    report.extend(kinds(request, groups, &used));
    report.extend(siblings(request, placement));
    report.extend(smt::finding(request, placement, &used));
    report.extend(doubled(request, placement, &used));
    report.extend(cores(request, plan));
    report.extend(sharing(placement));
    report.extend(float::finding(request, placement));
    report.extend(overflow(claims, placement, plan));
    for (rule, found) in [("emulator", helpers[0]), ("iothreads", helpers[1])] {
        report.push(helper(rule, found, request, plan));
    }
    report.extend(iothreads::finding(request, &plan.iothreads));
    report.extend(no_such_iothread(request));
    report.extend(neighbours(request, plan));
    report
}

fn reserved(request: &Request<'_>, claims: &Claims) -> Finding {
    let policy = &request.policy.host.reserved;
    let first = || request.machine.topology.cores.first().map(|core| core.cpus);
    let asked = policy.value.cpus().or_else(first);
    let origin = match &policy.origin {
        Origin::Default => "auto: the first core".to_owned(),
        origin => origin.to_string(),
    };
    let stay = if claims.reserved.len() == 1 { "stays" } else { "stay" };
    let what = cpus_in_words(&claims.reserved);
    if asked.is_none_or(|asked| asked == claims.reserved) {
        return Finding::met("reserved", format!("{what} {stay} with the host ({origin})"));
    }
    let reason =
        format!("{what} {stay} with the host: what was reserved ({origin}) other VMs have");
    Finding::degraded("reserved", reason)
}

/// The CPUs of the vCPUs of each guest NUMA node.
type Cells = BTreeMap<Option<u32>, CpuSet>;

fn cells(request: &Request<'_>, placement: &Placement) -> Cells {
    let mut cells = Cells::new();
    for vcpu in &request.guest.vcpus {
        if let Some(cpus) = placement.cpus(vcpu.index) {
            *cells.entry(vcpu.node).or_default() |= cpus;
        }
    }
    cells
}

fn guest_node(node: Option<u32>) -> String {
    node.map_or("the vCPUs without a node".to_owned(), |node| format!("guest node {node}"))
}

fn caches(
    request: &Request<'_>,
    groups: &[Group<'_>],
    placement: &Placement,
    cells: &Cells,
) -> Option<Finding> {
    let topology = request.machine.topology;
    if topology.llcs.is_empty() {
        let reason = "the kernel does not say which CPUs share a cache";
        return Some(Finding::degraded("one-llc", reason));
    }
    if !request.machine.caches_group_cores {
        return Some(Finding::met("one-llc", "every core has a cache of its own"));
    }
    let caches_of = |used: &CpuSet| -> BTreeSet<LlcId> {
        used.iter().filter_map(|cpu| topology.cpu(cpu)?.llc).collect()
    };
    let behind = |used: &CpuSet| caches_of(used).len();
    if cells.len() > 1 {
        let over: Vec<String> = cells
            .iter()
            .map(|(node, used)| (node, behind(used)))
            .filter(|(_, number)| *number > 1)
            .map(|(node, number)| format!("{} over {number} caches", guest_node(*node)))
            .collect();
        return Some(if over.is_empty() {
            Finding::met("one-llc", "each guest node behind one cache")
        } else {
            Finding::degraded("one-llc", over.join(", "))
        });
    }
    let used = cells.values().next()?;
    let number = request.guest.vcpus.len() - placement.unplaced.len();
    let vcpus = counted(number, "vCPU");
    Some(match behind(used) {
        1 => {
            let llc = caches_of(used).first().and_then(|llc| topology.llcs.get(llc.0 as usize))?;
            Finding::met(
                "one-llc",
                format!("{vcpus} behind one cache, {}", cpus_in_words(&llc.cpus)),
            )
        }
        over => {
            let free = |llc: &Llc| groups.iter().map(|group| free_behind(group, llc)).sum();
            let best: usize = topology.llcs.iter().map(free).max().unwrap_or(0);
            let why = if best < number {
                format!("the best has {best} CPUs for this VM")
            } else {
                format!(
                    "one has {best} CPUs for this VM, but not as its cores and held pins need them"
                )
            };
            Finding::degraded("one-llc", format!("{vcpus} over {over} caches: {why}"))
        }
    })
}

fn free_behind(group: &Group<'_>, llc: &Llc) -> usize {
    if group.cpus.is_subset(&llc.cpus) { group.free_cpus() } else { 0 }
}

fn nodes(topology: &Topology, cells: &Cells) -> Option<Finding> {
    let of = |used: &CpuSet| -> BTreeSet<NodeId> {
        used.iter().filter_map(|cpu| topology.core_of(cpu)?.node).collect()
    };
    let names = |nodes: &BTreeSet<NodeId>| {
        let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        format!("{} {}", if names.len() == 1 { "node" } else { "nodes" }, names.join(", "))
    };
    let all = topology.nodes.iter().filter(|node| !node.cpus.is_empty()).count();
    if all < 2 {
        return None;
    }
    if cells.len() > 1 {
        let each: Vec<_> = cells.iter().map(|(node, used)| (*node, of(used))).collect();
        let distinct: BTreeSet<NodeId> = each.iter().flat_map(|(_, nodes)| nodes.clone()).collect();
        let mirrored = each.iter().all(|(_, nodes)| nodes.len() == 1)
            && distinct.len() == cells.len().min(all);
        let places: Vec<String> = each
            .iter()
            .map(|(node, nodes)| format!("{} on {}", guest_node(*node), names(nodes)))
            .collect();
        let verdict = if mirrored { Finding::met } else { Finding::degraded };
        return Some(verdict("guest-nodes", places.join(", ")));
    }
    let mine = of(cells.values().next()?);
    Some(if mine.len() == 1 {
        Finding::met("one-node", format!("all vCPUs on {}", names(&mine)))
    } else {
        Finding::degraded("one-node", format!("the vCPUs are spread over {}", names(&mine)))
    })
}

/// Whether the vCPUs are behind the large cache, on a machine where one is much larger than the others.
fn large_cache(request: &Request<'_>, groups: &[Group<'_>], used: &CpuSet) -> Option<Finding> {
    let vm = &request.policy.vm;
    if vm.cache.value != CacheNeed::Any || !groups.iter().any(|group| group.large_cache) {
        return None;
    }
    let (large, other): (Vec<_>, Vec<_>) = groups.iter().partition(|group| group.large_cache);
    if other.is_empty() {
        return None;
    }
    let name = |group: &Group<'_>| {
        let llc = group.llc.and_then(|llc| request.machine.topology.llcs.get(llc.0 as usize));
        let size = llc.and_then(|llc| llc.size_bytes).map(|bytes| format!("{} MiB, ", bytes >> 20));
        format!("{}{}", size.unwrap_or_default(), cpus_in_words(&group.cpus))
    };
    if !other.iter().any(|group| group.cpus.intersects(used)) {
        let names: Vec<String> = large.iter().map(|group| name(group)).collect();
        return Some(Finding::met(
            "cache",
            format!("all vCPUs behind the large cache ({})", names.join("; ")),
        ));
    }
    let best = large.iter().max_by_key(|group| group.free_cpus())?;
    let why = match &vm.vcpus.value {
        CpuChoice::Auto if !request.held.is_empty() => "the vCPUs were there before".to_owned(),
        CpuChoice::Auto => format!(
            "it has {} on {} for this VM",
            counted(best.free_cpus(), "CPU"),
            counted(best.free.len(), "core")
        ),
        _ => format!("the CPUs are given by hand ({})", vm.vcpus.origin),
    };
    let reason = format!("not all vCPUs are behind the large cache ({}): {why}", name(best));
    Some(Finding::degraded("cache", reason))
}

fn kinds(request: &Request<'_>, groups: &[Group<'_>], used: &CpuSet) -> Option<Finding> {
    let topology = request.machine.topology;
    let mine: BTreeSet<_> = used.iter().filter_map(|cpu| topology.core_of(cpu)?.kind).collect();
    let names: Vec<&str> = mine
        .iter()
        .map(|kind| match kind {
            CoreKind::Performance => "performance",
            CoreKind::Efficiency => "efficiency",
        })
        .collect();
    let wants_any = request.policy.vm.cores.value == CoreNeed::Any;
    match names.as_slice() {
        [] => None,
        ["efficiency"] if wants_any && request.policy.vm.vcpus.value == CpuChoice::Auto => {
            let all = counted(request.guest.vcpus.len(), "vCPU");
            let fast = groups.iter().filter(|group| group.kind == Some(CoreKind::Performance));
            let has = counted(fast.map(Group::free_cpus).sum(), "CPU");
            let reason = format!(
                "all vCPUs on efficiency cores: the performance cores have {has} for {all}"
            );
            Some(Finding::degraded("one-kind", reason))
        }
        [one] => Some(Finding::met("one-kind", format!("all vCPUs on {one} cores"))),
        _ => Some(Finding::degraded(
            "one-kind",
            "vCPUs on performance and efficiency cores: neither kind alone holds them",
        )),
    }
}

fn siblings(request: &Request<'_>, placement: &Placement) -> Option<Finding> {
    let Sourced { value, origin } = &request.policy.vm.smt;
    match placement.siblings {
        Siblings::Apart if placement.floats.is_some() => Some(Finding::degraded(
            "guest-siblings",
            "the guest has threads=2 or more, and its vCPUs float: start it with threads=1",
        )),
        Siblings::Apart if *value == Smt::Isolate => Some(Finding::degraded(
            "guest-siblings",
            format!(
                "the guest has threads=2 or more, and smt = \"isolate\" ({origin}) gives each vCPU a core: start it \
                 with threads=1"
            ),
        )),
        Siblings::Together => {
            Some(Finding::met("guest-siblings", "guest siblings are on sibling CPUs"))
        }
        Siblings::Apart => Some(Finding::degraded(
            "guest-siblings",
            "the guest has threads=2 or more, but not every guest core is on sibling CPUs of one core",
        )),
        Siblings::None => None,
    }
}

/// Cores that vCPUs share without the guest knowing. Sharing a CPU is another finding.
fn doubled(request: &Request<'_>, placement: &Placement, used: &CpuSet) -> Option<Finding> {
    // It is no shortfall where the policy asks for siblings.
    if placement.siblings != Siblings::None || request.policy.vm.smt.value == Smt::Siblings {
        return None;
    }
    let shares = |cpu: CpuId| {
        let core = request.machine.topology.core_of(cpu);
        core.is_some_and(|core| (core.cpus & *used).len() > 1)
    };
    let doubled = placement.placed.iter().filter(|placed| shares(placed.cpu)).count();
    (doubled > 0).then(|| {
        let all = counted(placement.placed.len(), "vCPU");
        let reason = format!(
            "{doubled} of {all} share a core with another of this VM, and the guest (threads=1) does \
             not know"
        );
        Finding::degraded("own-core", reason)
    })
}

fn cores(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    if plan.exclusive.is_empty() {
        return None;
    }
    let split = request.machine.whole_cores(&plan.exclusive) - plan.exclusive;
    Some(if split.is_empty() {
        Finding::met("whole-cores", "no core is shared with the host or another VM")
    } else {
        let (are, them) =
            if split.len() == 1 { ("is a sibling", "it") } else { ("are siblings", "them") };
        let reason = format!(
            "{} {are} of this VM's CPUs, and the host may use {them}: add {them} to vcpus",
            cpus_in_words(&split)
        );
        Finding::degraded("whole-cores", reason)
    })
}

fn sharing(placement: &Placement) -> Option<Finding> {
    let users = placement.users();
    let shared: CpuSet =
        users.iter().filter(|(_, users)| **users > 1).map(|(cpu, _)| *cpu).collect();
    let sharing: usize = users.values().filter(|users| **users > 1).sum();
    (sharing > 0).then(|| {
        let all = counted(placement.placed.len(), "vCPU");
        Finding::degraded("share", format!("{sharing} of {all} share {}", cpus_in_words(&shared)))
    })
}

fn overflow(claims: &Claims, placement: &Placement, plan: &Plan) -> Option<Finding> {
    if placement.unplaced.is_empty() {
        return None;
    }
    let who: Vec<String> = placement.unplaced.iter().map(ToString::to_string).collect();
    let who = format!("no CPU is left for vCPU {}", who.join(", "));
    Some(if plan.left_alone.is_empty() {
        let where_to = cpus_in_words(&(plan.housekeeping & claims.allowed));
        Finding::degraded("overflow", format!("{who}: with the housekeeping {where_to}"))
    } else {
        Finding::impossible("overflow", format!("{who}: not pinned (overflow = \"refuse\")"))
    })
}

fn helper(rule: &'static str, found: &Helpers, request: &Request<'_>, plan: &Plan) -> Finding {
    let cpus = cpus_in_words(&found.cpus);
    if found.cpus.intersects(&plan.exclusive) {
        let clash = cpus_in_words(&(found.cpus & plan.exclusive));
        return Finding::degraded(rule, format!("{cpus}: shared with vCPUs on {clash}"));
    }
    match &found.found {
        Found::ByHand(origin) => Finding::met(rule, format!("{cpus} ({origin})")),
        Found::ByRule(Away::OtherGroupSameNode) => {
            Finding::met(rule, format!("{cpus}: behind another cache, on the same node"))
        }
        Found::ByRule(Away::OtherNode) => {
            let node = found.cpus.first().and_then(|cpu| request.machine.topology.cpu(cpu)?.node);
            let node = node.map_or(String::new(), |node| format!(" {node}"));
            Finding::met(rule, format!("{cpus}: behind another cache, on node{node}, the nearest"))
        }
        Found::ByRule(Away::SameGroup) if !request.machine.caches_group_cores => Finding::met(
            rule,
            format!("{cpus}: outside the vCPUs' cores; no shared cache is known"),
        ),
        Found::ByRule(Away::SameGroup) => {
            let siblings = request.machine.whole_cores(&plan.exclusive) & found.cpus;
            let beside = if siblings.is_empty() { "" } else { ", and on siblings of vCPUs" };
            let reason =
                format!("{cpus}: behind the vCPUs' own cache{beside}, for want of another");
            Finding::degraded(rule, reason)
        }
    }
}

/// Names the tables of iothreads that the VM does not have.
fn no_such_iothread(request: &Request<'_>) -> Option<Finding> {
    let has = |id: &IothreadId| request.guest.iothreads.contains(id);
    let strange: Vec<String> = request
        .policy
        .vm
        .iothread_cpus
        .iter()
        .filter(|(id, _)| !has(id))
        .map(|(id, cpus)| format!("{id} ({})", cpus.origin))
        .collect();
    (!strange.is_empty()).then(|| {
        let has: Vec<String> = request.guest.iothreads.iter().map(ToString::to_string).collect();
        let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
        let reason = format!("the VM has no iothread {}; it has {has}", strange.join(", "));
        Finding::degraded("by-hand", reason)
    })
}

fn neighbours(request: &Request<'_>, plan: &Plan) -> Option<Finding> {
    if !request.neighbours.helpers().intersects(&plan.exclusive) {
        return None;
    }
    let close: Vec<String> = request
        .neighbours
        .iter()
        .filter(|vm| vm.helpers.intersects(&plan.exclusive))
        .map(|vm| format!("VM {} ({})", vm.vm, vm.helpers & plan.exclusive))
        .collect();
    let reason = format!(
        "helpers of {} may still run on CPUs of this VM until that VM is planned anew",
        close.join(", ")
    );
    Some(Finding::degraded("neighbours", reason))
}
