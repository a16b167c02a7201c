//! Reading the topology: every fake machine with a name, machines of any shape, and this machine
//! against `lscpu`. What spoilt files do is in `topology_spoilt.rs`.

#![allow(clippy::expect_used)] // helpers of tests say no as tests do

use std::collections::BTreeSet;
use std::fs;

use proptest::prelude::*;

use qmpin::discover::read_topology;
use qmpin::ids::{CpuId, NodeId};
use qmpin::sysroot::SysRoot;
use qmpin::topology::{CoreKind, Topology};

use crate::support::spoilt::{cpu, read_at, set};
use crate::support::{captured, hosts};

/// The topology without what could not be learnt, to compare with a fake host's.
fn known(topology: Topology) -> Topology {
    Topology { unknown: Vec::new(), ..topology }
}

#[test]
fn every_fake_host_is_read_as_it_is() {
    for (name, host) in hosts::all() {
        let dir = host.tree().expect("a tree");
        let topology = read_at(dir.path()).expect(name);
        let whats: Vec<&str> = topology.unknown.iter().map(|line| line.what.as_str()).collect();
        let expected: &[&str] = match name {
            "no_numa_no_caches" => &["the LLC of CPUs 0-7", "the NUMA nodes"],
            "xeon_snc2" => &["the one node of LLC 0"],
            _ => &[],
        };
        assert_eq!(whats, expected, "{name}");
        assert_eq!(known(topology), host.topology(), "{name}");
    }
}

#[test]
fn the_named_hosts_are_what_their_names_say() {
    let ryzen = hosts::ryzen_5900x().topology();
    assert_eq!((ryzen.cpus.len(), ryzen.cores.len(), ryzen.llcs.len()), (24, 12, 2));
    assert_eq!(cpu(&ryzen, 18).siblings, set("6,18"));
    assert_eq!(ryzen.llcs[1].cpus, set("6-11,18-23"));

    let epyc = hosts::epyc_4n_16l().topology();
    assert_eq!((epyc.nodes.len(), epyc.llcs.len(), epyc.cpus.len()), (4, 16, 128));
    assert_eq!(epyc.nodes[1].distances, [12, 10, 12, 12]);

    let xeon = hosts::xeon_2s_interleaved().topology();
    assert_eq!(
        xeon.nodes[1].cpus,
        (0..40).skip(1).step_by(2).filter_map(CpuId::from_index).collect()
    );
    assert_eq!(cpu(&xeon, 1).siblings, set("1,21"));
    assert_eq!(cpu(&xeon, 1).package, Some(1));

    let intel = hosts::i9_13900k().topology();
    assert_eq!((intel.cores.len(), intel.cpus.len(), intel.llcs.len()), (24, 32, 1));
    assert_eq!(cpu(&intel, 1).siblings, set("0-1"));
    assert_eq!(cpu(&intel, 15).kind, Some(CoreKind::Performance));
    assert_eq!(cpu(&intel, 16).kind, Some(CoreKind::Efficiency));

    let arm = hosts::arm_clusters().topology();
    assert_eq!(arm.llcs[1].cpus, set("4-7"));
    assert_eq!(cpu(&arm, 0).kind, Some(CoreKind::Efficiency));

    let sparse = hosts::sparse().topology();
    assert!(!cpu(&sparse, 7).online);
    assert_eq!(sparse.nodes[2].node, NodeId(4));
    assert!(sparse.nodes[2].cpus.is_empty());
    assert_eq!(sparse.nodes[1].memory_bytes, Some(0));
}

#[test]
fn this_machine_agrees_with_lscpu() {
    let lscpu =
        crate::support::clean::command("lscpu").arg("-p=CPU,CORE,SOCKET,NODE,CACHE").output();
    let Ok(lscpu) = lscpu.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()) else {
        crate::support::skipped("this_machine_agrees_with_lscpu", "there is no lscpu here");
        return;
    };
    let topology = read_topology(&SysRoot::live()).expect("this machine's topology");
    agrees_with_lscpu("this machine", &topology, &lscpu);
}

#[test]
fn captured_machines_agree_with_the_lscpu_that_ran_on_them() {
    let machines = captured::machines();
    assert!(machines.len() >= 5, "{} captures", machines.len());
    for (host, topology) in machines {
        let lscpu = fs::read_to_string(host.join("lscpu-p.txt")).expect("its lscpu");
        agrees_with_lscpu(&host.display().to_string(), &topology, &lscpu);
        // Each die of these machines has a last-level cache of its own.
        let dies: BTreeSet<_> =
            topology.cores.iter().map(|core| (core.package, core.die)).collect();
        assert_eq!(dies.len(), topology.llcs.len(), "{}", host.display());
        for core in &topology.cores {
            let first = core.cpus.first().expect("a CPU");
            let path = format!("sys/devices/system/cpu/cpu{first}/topology/die_id\t");
            let tsv = fs::read_to_string(host.join("sysroot.tsv")).expect("its files");
            let said = tsv.lines().find_map(|line| line.strip_prefix(&path)).expect("its die");
            assert_eq!(core.die.map(|die| format!("{die}\\n")).as_deref(), Some(said));
        }
    }
}

/// The same cores, packages, nodes and LLC groups as `lscpu -p=CPU,CORE,SOCKET,NODE,CACHE` has them.
fn agrees_with_lscpu(host: &str, topology: &Topology, lscpu: &str) {
    let rows: Vec<Vec<&str>> = lscpu
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(',').collect())
        .collect();
    assert_eq!(rows.len(), topology.online().len(), "{host}");
    let cpu_of = |row: &Vec<&str>| cpu(topology, row[0].parse().expect("a CPU number"));
    for one in &rows {
        let ours = cpu_of(one);
        assert!(ours.online, "{host}");
        let node = ours.node.map(|node| node.to_string()).unwrap_or_default();
        assert_eq!(node, one[3], "{host}: the node of CPU {}", one[0]);
        for other in &rows {
            let theirs = cpu_of(other);
            assert_eq!(ours.core == theirs.core, one[1] == other[1], "{host}: cores");
            assert_eq!(ours.package == theirs.package, one[2] == other[2], "{host}: packages");
            // lscpu writes L1d:L1i:L2:L3; the last is the LLC.
            let llc = |row: &Vec<&str>| row[4].rsplit(':').next().map(str::to_owned);
            assert_eq!(ours.llc == theirs.llc, llc(one) == llc(other), "{host}: LLC groups");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_is_read_as_it_is(host in hosts::any_host()) {
        let dir = host.tree().expect("a tree");
        let topology = read_at(dir.path()).expect("a topology");
        prop_assert_eq!(known(topology), host.topology());
    }
}
