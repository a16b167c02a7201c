//! `config`: whether Proxmox's own configuration moves or throttles the VM.

use super::advice::{Advice, costs, fine, unknown};
use super::facts::knows_nodes;
use crate::cpuset::CpuSet;
use crate::discover::ProxmoxConfig;
use crate::ids::VmName;
use crate::topology::Topology;

const CHECK: &str = "config";

/// Judges `affinity` and `cpulimit`.
pub(super) fn config(
    topology: &Topology,
    vm: &VmName,
    read: &Result<ProxmoxConfig, String>,
) -> Vec<Advice> {
    let config = match read {
        Ok(config) => config,
        Err(why) => return vec![unknown(CHECK, format!("not checked: {why}"))],
    };
    let affinity = config.affinity.as_ref().map(|cpus| affinity(topology, vm, config, cpus));
    let cpulimit = config.cpulimit.as_ref().map(|limit| {
        let reason =
            format!("cpulimit: {limit} stops vCPUs for a part of each 100 ms that they use more");
        costs(CHECK, reason, Some(format!("qm set {vm} --delete cpulimit")))
    });
    let found: Vec<Advice> = affinity.into_iter().chain(cpulimit).collect();
    if found.is_empty() {
        return vec![fine(CHECK, "neither affinity nor cpulimit is set")];
    }
    found
}

/// An affinity costs nothing where it decides on which nodes the memory is at the start: hugepages, and all memory of
/// a VM with a passed-through device, are allocated then, and stay.
fn affinity(topology: &Topology, vm: &VmName, config: &ProxmoxConfig, cpus: &str) -> Advice {
    let mend = Some(format!("qm set {vm} --delete affinity"));
    let moved =
        format!("affinity: {cpus} has Proxmox start QEMU there; qmpin moves its threads then");
    if config.is_memory_bound {
        return costs(CHECK, format!("{moved}, and memory is bound by numaN"), mend);
    }
    if !knows_nodes(topology) {
        return unknown(
            CHECK,
            format!("{moved}; it may keep its memory on a node, and nodes are not known"),
        );
    }
    let set = CpuSet::parse_cpulist(cpus).unwrap_or_default();
    let with_memory = topology.nodes.iter().filter(|node| node.memory_bytes != Some(0));
    let (inside, outside): (Vec<_>, Vec<_>) =
        with_memory.partition(|node| node.cpus.intersects(&set));
    if outside.is_empty() {
        return costs(CHECK, moved, mend);
    }
    let names: Vec<String> = inside.iter().map(|node| node.node.to_string()).collect();
    let nodes = match names.as_slice() {
        [one] => format!("node {one}"),
        _ => format!("nodes {}", names.join(", ")),
    };
    fine(
        CHECK,
        format!(
            "affinity: {cpus} has its memory on {nodes} from the start; it is lost without numaN with hostnodes="
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture;
    use super::*;
    use crate::topology::Unknown;

    #[test]
    fn an_affinity_that_keeps_memory_local_is_not_to_be_deleted() {
        let two = Topology {
            nodes: vec![fixture::node(0, "0-11", Some(1)), fixture::node(1, "12-23", None)],
            ..Topology::default()
        };
        let one =
            Topology { nodes: vec![fixture::node(0, "0-23", Some(1))], ..Topology::default() };
        // A node without memory holds none.
        let half = Topology {
            nodes: vec![fixture::node(0, "0-11", Some(1)), fixture::node(1, "12-23", Some(0))],
            ..Topology::default()
        };
        let unknown = Unknown { what: "the NUMA nodes".to_owned(), reason: String::new() };
        let dark = Topology { unknown: vec![unknown], ..Topology::default() };
        let vm = &"100".parse().expect("a name");
        for (topology, cpus, is_memory_bound, severity) in [
            (&two, "12-19", false, Severity::Fine),
            (&two, "12-19", true, Severity::Costs),
            (&two, "4-19", false, Severity::Costs),
            (&one, "12-19", false, Severity::Costs),
            (&half, "0-7", false, Severity::Costs),
            (&dark, "12-19", false, Severity::Unknown),
        ] {
            let affinity = Some(cpus.to_owned());
            let read = ProxmoxConfig { affinity, is_memory_bound, ..ProxmoxConfig::default() };
            let found = config(topology, vm, &Ok(read));
            assert_eq!(found[0].severity, severity, "{found:?}");
            assert_eq!(found[0].mend.is_some(), severity == Severity::Costs, "{found:?}");
        }
        let read = ProxmoxConfig { affinity: Some("12-19".to_owned()), ..ProxmoxConfig::default() };
        assert!(config(&two, vm, &Ok(read))[0].reason.contains("memory on node 1"));
    }

    #[test]
    fn what_proxmox_does_to_the_same_cpus_is_named() {
        let vm = &"100".parse().expect("a name");
        let topology = Topology::default();
        let of = |affinity: Option<&str>, cpulimit: Option<&str>| {
            let [affinity, cpulimit] = [affinity, cpulimit].map(|one| one.map(str::to_owned));
            let read = ProxmoxConfig { affinity, cpulimit, ..ProxmoxConfig::default() };
            config(&topology, vm, &Ok(read))
        };
        let both = of(Some("0-5"), Some("2"));
        let mends: Vec<_> = both.iter().filter_map(|one| one.mend.as_deref()).collect();
        assert_eq!(mends, ["qm set 100 --delete affinity", "qm set 100 --delete cpulimit"]);
        let unread = config(&topology, vm, &Err("it is not there".to_owned()));
        for (found, severity) in [(of(None, None), Severity::Fine), (unread, Severity::Unknown)] {
            assert!(found.len() == 1 && found[0].severity == severity, "{found:?}");
        }
    }
}
