//! `guest-nodes`: whether Proxmox puts the guest's memory on the nodes of its vCPUs, and the `numaN` lines with which
//! it does (`PVE/QemuServer/Memory.pm: config`).
//!
//! The policy is `preferred`: another node is taken where that one is full, so nothing is lost, as it is with `bind`.

use std::collections::{BTreeMap, BTreeSet};

use super::advice::{Advice, costs, fine, info, unknown};
use super::facts::{VmFacts, knows_nodes};
use crate::cpuset::CpuSet;
use crate::discover::{ConfigNode, ProxmoxConfig, VCPUS_MAX, config_nodes, memory_mib};
use crate::ids::{CpuId, NodeId};
use crate::plan::Plan;
use crate::topology::Topology;
use crate::wording::shell_word;

const CHECK: &str = "guest-nodes";

/// A node of the guest as a `numaN` line has it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Node {
    number: u32,
    /// Indices of vCPUs.
    vcpus: BTreeSet<u32>,
    memory_mib: u64,
    /// Nodes of the host; empty where the kernel chooses.
    on: BTreeSet<NodeId>,
    /// The line, where it is there.
    line: Option<String>,
}

/// Why no line matches the plan.
enum Misfit {
    Unknown,
    Because(String),
}

/// Judges a Proxmox VM; `None`: the host has one node, or the VM is not Proxmox's.
pub(super) fn nodes(topology: &Topology, vm: &VmFacts<'_>) -> Option<Advice> {
    let config = vm.config.as_ref()?;
    if !knows_nodes(topology) {
        return Some(unknown(CHECK, "not checked: the host's nodes are not known"));
    }
    if topology.nodes.iter().filter(|node| node.memory_bytes != Some(0)).count() < 2 {
        return None;
    }
    Some(match (config, &vm.plan) {
        (Err(why), _) => unknown(CHECK, format!("not checked: {why}")),
        (_, Err(why)) => unknown(CHECK, format!("not checked: there is no plan: {why}")),
        (Ok(config), Ok(plan)) => judged(topology, vm, config, plan),
    })
}

fn judged(topology: &Topology, vm: &VmFacts<'_>, config: &ProxmoxConfig, plan: &Plan) -> Advice {
    if config.has_hotplug("memory") {
        let reason = "hotplug has memory, with which Proxmox takes no numaN, so the kernel chooses the memory's nodes \
                      at each start; without it no memory is added while it runs";
        return info(CHECK, reason, None);
    }
    let Some(guest) = guest_nodes(config) else {
        return unknown(
            CHECK,
            "not checked: memory or numaN of its configuration are not understood",
        );
    };
    let wanted = |node: &Node| planned(topology, plan, &node.vcpus);
    let is_bound = config.is_memory_bound;
    let is_right = |node: &Node| !node.on.is_empty() && wanted(node).is_subset(&node.on);
    if is_bound && guest.iter().all(is_right) {
        return fine(CHECK, "numaN has the memory of each guest node on the node of its vCPUs");
    }
    let lines = match lines(topology, config, &guest, plan) {
        Ok(lines) => lines,
        Err(Misfit::Unknown) => {
            let reason = "not checked: how much memory the host's nodes have is not known";
            return unknown(CHECK, reason);
        }
        Err(Misfit::Because(why)) => {
            let reason =
                format!("{}; no numaN line matches the plan: {why}", state(plan, is_bound));
            return info(CHECK, reason, None);
        }
    };
    let kept = config.affinity.as_deref().filter(|_| !is_bound);
    if let Some(affinity) = kept.filter(|affinity| keeps(topology, affinity, &lines)) {
        return fine(
            CHECK,
            format!("affinity: {affinity} has its memory on the node of its vCPUs from the start"),
        );
    }
    let command: Vec<String> = lines
        .iter()
        .map(|node| format!("--numa{} {}", node.number, shell_word(&node.text())))
        .collect();
    let reason = format!(
        "{}; with numaN they stay together from the next start on; on a host without such a node it does not start",
        state(plan, is_bound)
    );
    costs(CHECK, reason, Some(format!("qm set {} --numa 1 {}", vm.vm, command.join(" "))))
}

/// Where the memory is now, and what decides that.
fn state(plan: &Plan, is_bound: bool) -> String {
    let chosen = if is_bound {
        "numaN has memory on other nodes than its vCPUs"
    } else {
        "the kernel chooses the nodes of its memory at each start"
    };
    match &plan.memory {
        Some(memory) => format!(
            "{chosen}; now {} MiB are near its vCPUs and {} MiB are not",
            memory.local_mib, memory.remote_mib
        ),
        None => chosen.to_owned(),
    }
}

impl Node {
    fn text(&self) -> String {
        let on: Vec<String> = self.on.iter().map(ToString::to_string).collect();
        let on = on.join(";");
        if let Some(line) = &self.line {
            let is_kept = |part: &&str| !part.starts_with("hostnodes=");
            let mut text = line.split(',').filter(is_kept).collect::<Vec<_>>().join(",");
            text.push_str(&format!(",hostnodes={on}"));
            if !line.split(',').any(|part| part.starts_with("policy=")) {
                text.push_str(",policy=preferred");
            }
            return text;
        }
        let (cpus, memory) = (ranges(&self.vcpus), self.memory_mib);
        format!("cpus={cpus},hostnodes={on},memory={memory},policy=preferred")
    }
}

/// The guest's nodes as Proxmox makes them; one without a line where it makes none. `None`: they are not understood.
fn guest_nodes(config: &ProxmoxConfig) -> Option<Vec<Node>> {
    let memory = memory_mib(&config.lines).ok()?;
    let number = config.max_vcpus.filter(|number| *number <= VCPUS_MAX)?;
    let all = |vcpus: BTreeSet<u32>, memory_mib: u64, number: u32| Node {
        number,
        vcpus,
        memory_mib,
        on: BTreeSet::new(),
        line: None,
    };
    if config.line("numa") != Some("1") {
        return Some(vec![all((0..number).collect(), memory, 0)]);
    }
    let lines = config_nodes(&config.lines).ok()?;
    if !lines.is_empty() {
        return lines.into_iter().map(|node| of_line(config, node)).collect();
    }
    let sockets: u32 = config.line("sockets").map_or(Some(1), |text| text.parse().ok())?;
    let cores = number.checked_div(sockets)?;
    let share = memory
        .checked_div(u64::from(sockets))
        .filter(|_| memory.is_multiple_of(u64::from(sockets)))?;
    let socket = |socket: u32| all((socket * cores..(socket + 1) * cores).collect(), share, socket);
    Some((0..sockets).map(socket).collect())
}

/// `None`: the line lacks what Proxmox needs.
fn of_line(config: &ProxmoxConfig, node: ConfigNode) -> Option<Node> {
    let ConfigNode { number, vcpus, memory_mib, on } = node;
    let line = config.line(&format!("numa{number}")).map(str::to_owned);
    (!vcpus.is_empty() && memory_mib > 0).then_some(Node { number, vcpus, memory_mib, on, line })
}

/// The host's nodes of some vCPUs by the plan.
fn planned(topology: &Topology, plan: &Plan, vcpus: &BTreeSet<u32>) -> BTreeSet<NodeId> {
    let own = plan.vcpus.iter().filter(|planned| vcpus.contains(&planned.vcpu.0));
    own.flat_map(|planned| planned.cpus.iter().collect::<Vec<CpuId>>())
        .filter_map(|cpu| topology.cpu(cpu)?.node)
        .collect()
}

/// The lines that match the plan, or why none do.
fn lines(
    topology: &Topology,
    config: &ProxmoxConfig,
    guest: &[Node],
    plan: &Plan,
) -> Result<Vec<Node>, Misfit> {
    let on_one =
        |node: &Node| Some(planned(topology, plan, &node.vcpus)).filter(|on| on.len() == 1);
    let lines = match guest {
        // Proxmox made no nodes so far: one for each node of the host.
        [only] if only.line.is_none() && on_one(only).is_none() => {
            divided(topology, config, only, plan)?
        }
        _ => {
            let on = |node: &Node| match on_one(node) {
                Some(on) => Ok(Node { on, ..node.clone() }),
                None => Err(Misfit::Because(format!(
                    "the vCPUs of guest node {} are on several nodes, or none",
                    node.number
                ))),
            };
            guest.iter().map(on).collect::<Result<Vec<_>, _>>()?
        }
    };
    let mut needs: BTreeMap<NodeId, u64> = BTreeMap::new();
    for node in &lines {
        for on in &node.on {
            let need = needs.entry(*on).or_default();
            *need = need.saturating_add(node.memory_mib);
        }
    }
    for (on, mib) in needs {
        let node = topology.nodes.iter().find(|node| node.node == on);
        let has = node.and_then(|node| node.memory_bytes).ok_or(Misfit::Unknown)? >> 20;
        if has < mib {
            let why = format!("node {on} has {has} MiB, and {mib} MiB would be there");
            return Err(Misfit::Because(why));
        }
    }
    Ok(lines)
}

/// One guest node made into one for each host node of its vCPUs; the memory goes by the number of vCPUs.
fn divided(
    topology: &Topology,
    config: &ProxmoxConfig,
    only: &Node,
    plan: &Plan,
) -> Result<Vec<Node>, Misfit> {
    let because = |why: &str| Misfit::Because(why.to_owned());
    let mut vcpus: BTreeMap<NodeId, BTreeSet<u32>> = BTreeMap::new();
    for index in &only.vcpus {
        let on = planned(topology, plan, &BTreeSet::from([*index]));
        let node = on.first().filter(|_| on.len() == 1);
        let node = node.ok_or_else(|| because("not every vCPU is on one node"))?;
        vcpus.entry(*node).or_default().insert(*index);
    }
    // With hugepages Proxmox wants whole pages in each node.
    if config.line("hugepages").is_some() {
        return Err(because("with hugepages its memory is not divided"));
    }
    let all = only.vcpus.len() as u64;
    let node = |(number, (on, vcpus)): (u32, (NodeId, BTreeSet<u32>))| {
        let share = only.memory_mib.checked_mul(vcpus.len() as u64);
        let share = share.filter(|share| share.is_multiple_of(all));
        let share = share.ok_or_else(|| because("its memory does not divide by its vCPUs"))?;
        let on = BTreeSet::from([on]);
        Ok(Node { number, vcpus, memory_mib: share / all, on, line: None })
    };
    (0..).zip(vcpus).map(node).collect()
}

/// Whether QEMU is started on CPUs of just the node that the lines name.
fn keeps(topology: &Topology, affinity: &str, lines: &[Node]) -> bool {
    let Ok(set) = CpuSet::parse_cpulist(affinity) else { return false };
    let at_start = topology.nodes.iter().filter(|node| node.cpus.intersects(&set));
    let at_start: BTreeSet<NodeId> = at_start.map(|node| node.node).collect();
    let wanted: BTreeSet<NodeId> = lines.iter().flat_map(|node| node.on.clone()).collect();
    at_start.len() == 1 && at_start == wanted
}

/// Proxmox's lists: `0-3;8`.
fn ranges(indices: &BTreeSet<u32>) -> String {
    let set: CpuSet =
        indices.iter().filter_map(|index| CpuId::from_index(*index as usize)).collect();
    set.to_string().replace(',', ";")
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{self, World};
    use super::*;
    use crate::guest::Guest;
    use crate::topology::Unknown;

    /// Two nodes of 32 GiB with six cores each, of which one is the host's.
    fn two() -> World {
        World::new(2, 6, 1).with_nodes()
    }

    fn of(world: &World, guest: &Guest, config: &str) -> Option<Advice> {
        world.vm_of(guest, Some(config), |vm| nodes(&world.topology, vm))
    }

    fn of_cores(cores: u32, config: &str) -> Advice {
        let config = format!("cores: {cores}\n{config}");
        of(&two(), &fixture::guest(1, 1, cores, 1), &config).expect("two nodes")
    }

    #[test]
    fn memory_that_the_kernel_places_gets_lines_that_match_the_plan() {
        for (cores, config, mend) in [
            (
                6,
                "memory: 8192\n",
                "qm set 100 --numa 1 --numa0 cpus=0-5,hostnodes=1,memory=8192,policy=preferred",
            ),
            (
                10,
                "memory: 10240\n",
                "qm set 100 --numa 1 --numa0 cpus=6-9,hostnodes=0,memory=4096,policy=preferred \
                 --numa1 cpus=0-5,hostnodes=1,memory=6144,policy=preferred",
            ),
            (
                6,
                "numa: 1\nmemory: 8192\nnuma0: cpus=0-2;3-5,memory=8192\n",
                "qm set 100 --numa 1 --numa0 'cpus=0-2;3-5,memory=8192,hostnodes=1,policy=preferred'",
            ),
            (
                6,
                "numa: 1\n",
                "qm set 100 --numa 1 --numa0 cpus=0-5,hostnodes=1,memory=512,policy=preferred",
            ),
        ] {
            let found = of_cores(cores, config);
            assert_eq!(found.severity, Severity::Costs, "{config}: {found:?}");
            assert_eq!(found.mend.as_deref(), Some(mend), "{config}");
            assert!(found.reason.starts_with("the kernel chooses"), "{found:?}");
        }
        let mut guest = fixture::guest(2, 1, 5, 1);
        for vcpu in &mut guest.vcpus {
            vcpu.node = vcpu.socket;
        }
        let found =
            of(&two(), &guest, "sockets: 2\ncores: 5\nnuma: 1\nmemory: 4096\n").expect("two nodes");
        let mend = found.mend.expect("lines");
        for words in ["cpus=0-4,hostnodes=", "--numa1 cpus=5-9,hostnodes=", "memory=2048"] {
            assert!(mend.contains(words), "{words}: {mend}");
        }
    }

    #[test]
    fn memory_that_is_on_the_node_of_its_vcpus_is_fine() {
        for config in [
            "numa: 1\nmemory: 8192\nnuma0: cpus=0-5,hostnodes=1,memory=8192,policy=bind\n",
            "memory: 8192\naffinity: 6-11\n",
        ] {
            let found = of_cores(6, config);
            assert_eq!(
                (found.severity, &found.mend),
                (Severity::Fine, &None),
                "{config}: {found:?}"
            );
        }
        // QEMU is started on both nodes, or on the other one.
        for config in ["affinity: 4-11\n", "affinity: 1-4\n", "affinity: x\n"] {
            assert_eq!(of_cores(6, config).severity, Severity::Costs, "{config}");
        }
    }

    #[test]
    fn lines_for_another_node_than_the_plans_are_named() {
        let config = "numa: 1\nmemory: 8192\nnuma0: cpus=0-5,hostnodes=0,memory=8192,policy=bind\n";
        let found = of_cores(6, config);
        assert_eq!(found.severity, Severity::Costs, "{found:?}");
        assert!(found.reason.starts_with("numaN has memory on other nodes"), "{found:?}");
        let mend = "qm set 100 --numa 1 --numa0 cpus=0-5,memory=8192,policy=bind,hostnodes=1";
        assert_eq!(found.mend.as_deref(), Some(mend));
    }

    #[test]
    fn where_no_line_would_do_there_is_none() {
        for (cores, config, why) in [
            (6, "memory: 40960\n", "node 1 has 32768 MiB, and 40960 MiB would be there"),
            (6, "hotplug: network,memory\nnuma: 1\nmemory: 8192\n", "hotplug has memory"),
            (10, "memory: 8191\n", "does not divide"),
            (10, "numa: 1\nhugepages: 2\nmemory: 8192\n", "with hugepages"),
            (
                10,
                "numa: 1\nmemory: 8192\nnuma0: cpus=0-9,memory=8192\n",
                "vCPUs of guest node 0 are on several nodes",
            ),
        ] {
            let found = of_cores(cores, config);
            assert_eq!((found.severity, &found.mend), (Severity::Info, &None), "{found:?}");
            assert!(found.reason.contains(why), "{why}: {found:?}");
        }
        let mut world = two();
        world.topology.nodes[1].memory_bytes = None;
        let dark = of(&world, &fixture::guest(1, 1, 6, 1), "cores: 6\n").expect("two nodes");
        assert_eq!(dark.severity, Severity::Unknown, "{dark:?}");
        let garbled = of_cores(6, "memory: much\n");
        assert_eq!(garbled.severity, Severity::Unknown);
        let endless =
            of(&two(), &fixture::guest(1, 1, 4, 1), "cores: 4000000000\n").expect("two nodes");
        assert_eq!(endless.severity, Severity::Unknown);
        assert_eq!(of_cores(40, "").severity, Severity::Unknown, "no plan");
    }

    #[test]
    fn a_host_with_one_node_needs_nothing() {
        let one = World::flat(4);
        assert_eq!(of(&one, &fixture::guest(1, 1, 4, 1), ""), None);
        one.vm(4, None, |vm| assert_eq!(nodes(&one.topology, vm), None));
        let mut dark = World::flat(4);
        dark.topology.unknown =
            vec![Unknown { what: "the NUMA nodes".to_owned(), reason: String::new() }];
        let found = of(&dark, &fixture::guest(1, 1, 4, 1), "").expect("said");
        assert_eq!(found.severity, Severity::Unknown);
    }
}
