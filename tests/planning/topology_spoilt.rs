//! Reading a topology whose files are missing, garbled or contradict each other: what is wrong is
//! unknown with its reason, and the rest is kept.

#![allow(clippy::expect_used)] // helpers of tests say no as tests do

use std::fs;

use proptest::prelude::*;

use qmpin::cpuset::CpuSet;
use qmpin::ids::{CoreId, LlcId, NodeId};
use qmpin::topology::{CoreKind, Topology};

use crate::support::hosts;
use crate::support::spoilt::{Spoilt, cpu, read_at, reason, set};

/// The topology without what could not be learnt, to compare with a fake host's.
fn known(topology: Topology) -> Topology {
    Topology { unknown: Vec::new(), ..topology }
}

#[test]
fn without_the_online_list_there_is_an_error_that_names_it() {
    let error = |spoilt: Spoilt| {
        let error = read_at(spoilt.dir.path()).expect_err("no topology");
        qmpin::error::Failure::new(qmpin::error::Kind::No, error).report()
    };
    let gone = Spoilt::of(&hosts::two_cpus()).remove("system/cpu/online");
    for cpu in [0, 1] {
        fs::remove_dir_all(gone.dir.path().join(format!("sys/devices/system/cpu/cpu{cpu}")))
            .expect("a folder");
    }
    let gone = error(gone);
    assert!(gone.contains("cpu/online") && gone.contains("No such file"), "{gone}");
    let garbled = error(Spoilt::of(&hosts::two_cpus()).put("system/cpu/online", "0-x"));
    assert!(garbled.contains("cpu/online") && garbled.contains("`0-x`"), "{garbled}");
    let empty = error(Spoilt::of(&hosts::two_cpus()).put("system/cpu/online", "\n"));
    assert!(empty.contains("lists no CPU"), "{empty}");
    let large = error(Spoilt::of(&hosts::two_cpus()).put("system/cpu/online", "0-4095"));
    assert!(large.contains("4095"), "{large}");
}

/// Captures of hwloc and util-linux lack some lists, and old kernels have masks alone.
#[test]
fn what_a_list_would_say_is_read_from_masks_and_folders() {
    let host = hosts::ryzen_5900x_l3_as_numa().with_offline(&[13]);
    let spoilt = Spoilt::of(&host);
    let system = spoilt.dir.path().join("sys/devices/system");
    let mut replaced = 0;
    let mut left = vec![system.clone()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let mask = match name.as_str() {
                "cpulist" => "cpumap",
                "shared_cpu_list" => "shared_cpu_map",
                name => match name.strip_suffix("_list") {
                    Some(mask) => mask,
                    None => continue,
                },
            };
            let cpus = set(&fs::read_to_string(&path).expect("a list"));
            fs::remove_file(&path).expect("removed");
            // Some captures have a NUL at the end.
            let text = format!("{}\n\0", cpus.to_cpumask());
            fs::write(path.with_file_name(mask), text).expect("a mask");
            replaced += 1;
        }
    }
    assert!(replaced > 70, "{replaced}");
    for list in ["cpu/online", "node/online"] {
        fs::remove_file(system.join(list)).expect("removed");
    }
    fs::write(system.join("cpu/cpu13/online"), "0\n").expect("written");
    assert_eq!(spoilt.read(), host.topology());
}

#[test]
fn without_the_present_list_the_online_cpus_are_those_we_know() {
    let host = hosts::ryzen_5900x().with_offline(&[3]);
    for topology in [
        Spoilt::of(&host).remove("system/cpu/present").read(),
        Spoilt::of(&host).put("system/cpu/present", "many").read(),
    ] {
        assert_eq!(topology.cpus.len(), 23);
        reason(&topology, "which CPUs are offline");
    }
    let topology = Spoilt::of(&host).put("system/cpu/present", "0-3").read();
    assert_eq!(topology.cpus.len(), 24, "online CPUs are present");
    assert!(reason(&topology, "which CPUs are present").contains("4-23"));
}

#[test]
fn an_offline_cpu_is_listed_and_belongs_to_nothing() {
    let host = hosts::ryzen_5900x().with_offline(&[13]);
    let topology = Spoilt::of(&host).read();
    let offline = cpu(&topology, 13);
    assert!(!offline.online);
    assert_eq!(
        (offline.core, offline.llc, offline.node, offline.package),
        (None, None, None, None)
    );
    assert_eq!(cpu(&topology, 1).siblings, set("1"));
    assert_eq!(topology.llcs[0].cpus, set("0-5,12,14-17"));
    assert_eq!(topology.unknown, []);
}

#[test]
fn siblings_are_read_under_their_old_name_too() {
    let mut spoilt = Spoilt::of(&hosts::ryzen_5900x());
    for cpu in 0..24 {
        let of_cpu = format!("system/cpu/cpu{cpu}/topology");
        spoilt = spoilt
            .remove(&format!("{of_cpu}/core_cpus_list"))
            .remove(&format!("{of_cpu}/package_cpus_list"));
    }
    assert_eq!(spoilt.read(), hosts::ryzen_5900x().topology());
}

#[test]
fn a_cpu_without_sibling_files_is_known_by_its_sibling() {
    let topology = Spoilt::of(&hosts::ryzen_5900x()).remove("system/cpu/cpu0/topology").read();
    assert_eq!(cpu(&topology, 0).siblings, set("0,12"));
    // The ids are read from the first CPU of the package, which here has none.
    assert_eq!(cpu(&topology, 0).package, None);
    assert!(reason(&topology, "the package of CPUs 0-23").contains("physical_package_id"));

    let topology = Spoilt::of(&hosts::two_cpus()).remove("system/cpu/cpu1/topology").read();
    assert_eq!((cpu(&topology, 1).core, cpu(&topology, 1).siblings), (None, CpuSet::EMPTY));
    assert_eq!(topology.cores.len(), 1);
    assert!(reason(&topology, "the SMT siblings of CPU 1").contains("No such file"));
}

#[test]
fn garbled_siblings_are_unknown_and_the_rest_is_kept() {
    for text in ["0,", "4294967296", "-1", "x", "3-0"] {
        let topology = Spoilt::of(&hosts::two_cpus())
            .put("system/cpu/cpu0/topology/core_cpus_list", text)
            .read();
        assert_eq!(cpu(&topology, 0).core, None, "{text}");
        assert_eq!(cpu(&topology, 1).core, Some(CoreId(0)));
        assert!(reason(&topology, "the SMT siblings of CPU 0").contains("core_cpus_list"));
    }
}

#[test]
fn contradicting_siblings_are_not_used() {
    let list = |cpu: usize| format!("system/cpu/cpu{cpu}/topology/core_cpus_list");
    // (the file spoilt, its text, who is then unknown)
    for (spoilt_cpu, text, unknown) in [
        (0, "1", "0,12"),         // does not name itself
        (0, "0", "0,12"),         // 12 still says 0,12
        (0, "0-1,12", "0-1,12"),  // 12 and 1 say otherwise
        (0, "0-23", "0,12"),      // the last of so many is asked as well
        (1, "1,12", "0-1,12-13"), // 12 is spoken for
        (1, "", "1,13"),
    ] {
        let topology = Spoilt::of(&hosts::ryzen_5900x()).put(&list(spoilt_cpu), text).read();
        let without: CpuSet =
            topology.cpus.iter().filter(|cpu| cpu.core.is_none()).map(|cpu| cpu.id).collect();
        assert!(set(&spoilt_cpu.to_string()).is_subset(&without), "{text}: {without}");
        assert!(without.is_subset(&set(unknown)), "{text}: {without} not in {unknown}");
        assert!(topology.unknown.iter().all(|line| line.reason.contains("says")), "{text}");
        assert_eq!(cpu(&topology, 2).siblings, set("2,14"));
        assert!(cpu(&topology, 2).core.is_some());
    }
}

#[test]
fn a_sibling_list_with_an_offline_cpu_is_used_without_it() {
    let host = hosts::ryzen_5900x().with_offline(&[12]);
    let topology = Spoilt::of(&host).put("system/cpu/cpu0/topology/core_cpus_list", "0,12").read();
    assert_eq!(cpu(&topology, 0).siblings, set("0"));
    assert!(reason(&topology, "the SMT siblings among offline CPUs").contains("12"));
}

#[test]
fn package_and_die_ids_of_minus_one_are_none() {
    let topology = Spoilt::of(&hosts::ryzen_5900x())
        .put("system/cpu/cpu0/topology/physical_package_id", "-1\n")
        .put("system/cpu/cpu0/topology/die_id", "-1\n")
        .read();
    assert_eq!((cpu(&topology, 5).package, cpu(&topology, 5).die), (None, None));
    assert!(reason(&topology, "the package of CPUs 0-23").contains("does not know"));
    reason(&topology, "the die of CPUs 0-23");
}

#[test]
fn a_garbled_package_or_die_is_unknown() {
    for (name, subject) in [("physical_package_id", "package"), ("die_id", "die")] {
        let topology = Spoilt::of(&hosts::two_cpus())
            .put(&format!("system/cpu/cpu0/topology/{name}"), "zero")
            .read();
        assert!(reason(&topology, &format!("the {subject} of CPUs 0-1")).contains("`zero`"));
    }
    let topology = Spoilt::of(&hosts::two_cpus())
        .put("system/cpu/cpu0/topology/package_cpus_list", "?")
        .put("system/cpu/cpu0/topology/die_cpus_list", "?")
        .read();
    // CPU 1 names both, and CPU 0 says nothing against it.
    assert_eq!((cpu(&topology, 0).package, cpu(&topology, 0).die), (Some(0), Some(0)));
}

#[test]
fn the_llc_is_the_highest_cache_that_holds_data() {
    let index3 = "system/cpu/cpu0/cache/index3";
    let topology =
        Spoilt::of(&hosts::one_core()).put(&format!("{index3}/type"), "Instruction").read();
    assert_eq!(topology.llcs[0].size_bytes, Some(1 << 20), "the L2");
    let topology = Spoilt::of(&hosts::one_core()).remove(index3).read();
    assert_eq!(topology.llcs[0].size_bytes, Some(1 << 20), "the L2");
    let topology = Spoilt::of(&hosts::one_core()).put(&format!("{index3}/level"), "1").read();
    assert_eq!(topology.llcs[0].size_bytes, Some(1 << 20), "the level counts, not the index");
}

#[test]
fn cores_without_l3_beside_cores_with_one_have_their_l2() {
    let mut spoilt = Spoilt::of(&hosts::i9_13900k());
    for cpu in 30..32 {
        spoilt = spoilt
            .remove(&format!("system/cpu/cpu{cpu}/cache/index3"))
            .put(&format!("system/cpu/cpu{cpu}/cache/index2/shared_cpu_list"), "30-31");
    }
    for cpu in 0..30 {
        spoilt = spoilt.put(&format!("system/cpu/cpu{cpu}/cache/index3/shared_cpu_list"), "0-29");
    }
    let topology = spoilt.read();
    assert_eq!(topology.llcs[1].cpus, set("30-31"));
    assert_eq!(topology.llcs[1].size_bytes, Some(1 << 20));
    assert_eq!(topology.unknown, []);
}

#[test]
fn a_garbled_cache_is_unknown_and_the_rest_is_kept() {
    for (name, text) in
        [("level", "three"), ("type", "Magic"), ("shared_cpu_list", "0-"), ("level", "0")]
    {
        let topology = Spoilt::of(&hosts::one_core())
            .put(&format!("system/cpu/cpu0/cache/index3/{name}"), text)
            .read();
        assert_eq!((cpu(&topology, 0).llc, topology.llcs.len()), (None, 0), "{name}");
        assert!(reason(&topology, "the LLC of CPU 0").contains(text), "{name}");
    }
    for text in ["32768", "0K", "99999999999999999999K", "-1K"] {
        let topology =
            Spoilt::of(&hosts::one_core()).put("system/cpu/cpu0/cache/index3/size", text).read();
        assert_eq!(topology.llcs[0].size_bytes, None, "{text}");
        assert!(reason(&topology, "the LLC size of CPU 0").contains(text));
    }
}

#[test]
fn contradicting_llc_lists_are_not_used() {
    let topology = Spoilt::of(&hosts::ryzen_5900x())
        .put("system/cpu/cpu0/cache/index3/shared_cpu_list", "0-23")
        .read();
    assert_eq!(cpu(&topology, 0).llc, None);
    assert_eq!(topology.llcs.len(), 1, "the other CCD is sound");
    assert_eq!(topology.llcs[0].cpus, set("6-11,18-23"));
    assert_eq!(topology.llcs[0].llc, LlcId(0));
    assert!(reason(&topology, "the LLC of CPU 0").contains("0-23"));
}

#[test]
fn a_core_in_two_llcs_has_none() {
    let mut spoilt = Spoilt::of(&hosts::ryzen_5900x());
    for cpu in [0, 6, 12, 18] {
        let siblings = if cpu % 12 == 0 { "0,18" } else { "6,12" };
        spoilt = spoilt.put(&format!("system/cpu/cpu{cpu}/topology/core_cpus_list"), siblings);
    }
    let topology = spoilt.put("system/cpu/cpu18/topology/core_cpus_list", "0,18").read();
    assert_eq!(topology.cores[0].llc, None);
    assert!(reason(&topology, "the LLC of core 0").contains("0,18"));
}

#[test]
fn llc_across_nodes_is_reported() {
    let topology = Spoilt::of(&hosts::xeon_snc2()).read();
    assert_eq!(topology.llcs.len(), 1);
    assert_eq!(cpu(&topology, 15).node, Some(NodeId(1)));
    assert!(reason(&topology, "the one node of LLC 0").contains("nodes 0, 1"));
}

#[test]
fn garbled_nodes_are_unknown_and_the_rest_is_kept() {
    let host = hosts::ryzen_5900x_l3_as_numa();
    let node1 = "system/node/node1";
    let topology = Spoilt::of(&host).put(&format!("{node1}/cpulist"), "6-").read();
    assert_eq!((cpu(&topology, 5).node, cpu(&topology, 6).node), (Some(NodeId(0)), None));
    reason(&topology, "the CPUs of node 1");

    for text in ["", "Node 1 MemTotal: lots kB\n", "Node 1 MemTotal: 99999999999999999999 kB\n"] {
        let topology = Spoilt::of(&host).put(&format!("{node1}/meminfo"), text).read();
        assert_eq!(topology.nodes[1].memory_bytes, None);
        reason(&topology, "the memory of node 1");
    }
    for text in ["10", "10 x", "12 10 12"] {
        let topology = Spoilt::of(&host).put(&format!("{node1}/distance"), text).read();
        assert!(topology.nodes[1].distances.is_empty());
        assert!(reason(&topology, "the distances of node 1").contains(text));
    }
    let topology = Spoilt::of(&host).remove(node1).read();
    assert_eq!(topology.nodes[1].cpus, CpuSet::EMPTY);
    assert_eq!(topology.unknown.len(), 3, "{:?}", topology.unknown);

    let topology = Spoilt::of(&host).put("system/node/online", "0-1-2").read();
    assert_eq!(topology.nodes, []);
    reason(&topology, "the NUMA nodes");
}

#[test]
fn a_cpu_in_two_nodes_or_none_has_none() {
    let host = hosts::ryzen_5900x_l3_as_numa();
    let list = "system/node/node1/cpulist";
    let topology = Spoilt::of(&host).put(list, "5-11,18-23").read();
    assert_eq!(cpu(&topology, 5).node, None);
    assert!(!topology.nodes[0].cpus.intersects(&set("5")));
    assert!(reason(&topology, "the node of CPU 5").contains("two nodes"));
    let topology = Spoilt::of(&host).put(list, "7-11,18-23").read();
    assert_eq!(cpu(&topology, 6).node, None);
    assert!(reason(&topology, "the node of CPU 6").contains("no online node"));
    let topology = Spoilt::of(&host).put(list, "6-11,18-23,90").read();
    assert_eq!(topology.nodes[1].cpus, set("6-11,18-23"));
    assert!(reason(&topology, "the CPUs of node 1").contains("90"));
}

#[test]
fn garbled_kinds_are_unknown() {
    let host = hosts::i9_13900k();
    let topology = Spoilt::of(&host).put("cpu_atom/cpus", "?").read();
    assert_eq!(cpu(&topology, 0).kind, Some(CoreKind::Performance));
    assert_eq!(cpu(&topology, 16).kind, None);
    assert!(reason(&topology, "the kind of CPUs 16-31").contains("cpu_atom"));
    let topology = Spoilt::of(&host).put("cpu_core/cpus", "?").read();
    assert_eq!(cpu(&topology, 0).kind, None);
    let topology = Spoilt::of(&host).put("cpu_core/cpus", "0-16").read();
    assert_eq!(cpu(&topology, 16).kind, None);
    assert!(reason(&topology, "the kind of CPU 16").contains("both"));

    let arm = hosts::arm_clusters();
    let topology = Spoilt::of(&arm).put("system/cpu/cpu5/cpu_capacity", "much").read();
    assert_eq!(
        (cpu(&topology, 5).kind, cpu(&topology, 4).kind),
        (None, Some(CoreKind::Performance))
    );
    assert!(reason(&topology, "the kind of CPU 5").contains("`much`"));
}

#[test]
fn cores_of_one_capacity_have_no_kind() {
    // A virtual machine often has no PMU, so there the capacities are read.
    let ryzen = hosts::ryzen_5900x();
    assert_eq!(Spoilt::of(&ryzen).remove("cpu/rdpmc").read(), ryzen.topology());
    let mut old_kernel = Spoilt::of(&hosts::two_cpus()).remove("cpu/rdpmc");
    for cpu in 0..2 {
        old_kernel = old_kernel.remove(&format!("system/cpu/cpu{cpu}/cpu_capacity"));
    }
    assert_eq!(old_kernel.read(), hosts::two_cpus().topology());
}

#[test]
fn a_third_kind_of_intel_core_is_small_too() {
    let spoilt = Spoilt::of(&hosts::i9_13900k()).put("cpu_atom/cpus", "16-29");
    fs::create_dir(spoilt.dir.path().join("sys/devices/cpu_lowpower")).expect("a folder");
    let topology = spoilt.put("cpu_lowpower/cpus", "30-31").read();
    assert_eq!(cpu(&topology, 31).kind, Some(CoreKind::Efficiency));
    assert_eq!(topology.unknown, []);
}

#[test]
fn files_that_are_not_text_are_unknown() {
    let spoilt = Spoilt::of(&hosts::one_core());
    for path in ["topology/core_cpus_list", "cache/index3/size", "topology/die_id"] {
        let path = spoilt.dir.path().join("sys/devices/system/cpu/cpu0").join(path);
        fs::write(path, [0xff, 0, 0xfe]).expect("write");
    }
    let topology = spoilt.read();
    assert_eq!((cpu(&topology, 0).core, topology.llcs[0].size_bytes), (None, None));
    assert_eq!(topology.unknown.len(), 3, "{:?}", topology.unknown);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_file_of_garbage_never_panics_and_is_never_silent(
        at in any::<prop::sample::Index>(),
        text in "[0-9,x:/ -]{0,12}",
    ) {
        let paths = [
            "cpu/cpu0/topology/core_cpus_list", "cpu/cpu0/topology/package_cpus_list",
            "cpu/cpu0/topology/die_cpus_list", "cpu/cpu0/topology/physical_package_id",
            "cpu/cpu0/topology/die_id", "cpu/cpu0/cache/index3/level",
            "cpu/cpu0/cache/index3/type", "cpu/cpu0/cache/index3/shared_cpu_list",
            "cpu/cpu0/cache/index3/size", "cpu/present", "node/online", "node/node0/cpulist",
            "node/node0/meminfo", "node/node0/distance", "cpu/cpu0/cpu_capacity",
        ];
        let host = hosts::two_cpus();
        let path = format!("system/{}", at.get(&paths));
        let topology = Spoilt::of(&host).put(&path, &text).read();
        let differs = known(topology.clone()) != host.topology();
        // Without SMT a lone CPU is a complete core; numbers in place of numbers are believed.
        let number = text.trim().bytes().all(|byte| byte.is_ascii_digit() || b",-/: ".contains(&byte));
        prop_assert!(!differs || number || !topology.unknown.is_empty(), "{path} {text:?}");
    }
}
