//! One cluster's policy file, a right plan on every shape: it names needs, and each machine has its own answer.

#![allow(clippy::expect_used, clippy::panic)] // that is how a test says no

use std::collections::BTreeMap;
use std::path::Path;

use qmpin::cpuset::CpuSet;
use qmpin::plan::{Machine, Neighbours, Plan, PlanError, PlannedVcpu, Request, Stay, plan};
use qmpin::policy::{FileKind, Policy};
use qmpin::promises::Surroundings;
use qmpin::topology::{CoreKind, Llc, Topology};

use crate::support::{captured, guests, hosts};

const FILE: &str = "isolation = \"exclusive\"\ncores = \"performance\"\ncache = \"large\"\n";

/// Every machine that there is: those of the tests, and those that were captured on the test host.
fn machines() -> Vec<(String, Topology)> {
    let fake = hosts::all().into_iter().map(|(name, host)| (name.to_owned(), host.topology()));
    let captured = captured::machines().into_iter();
    fake.chain(captured.map(|(host, topology)| (host.display().to_string(), topology))).collect()
}

fn planned(topology: &Topology, vcpus: u32) -> Result<Plan, PlanError> {
    planned_with(topology, vcpus, 1)
}

/// Of a guest with so many threads in each of its cores.
fn planned_with(topology: &Topology, vcpus: u32, threads: u32) -> Result<Plan, PlanError> {
    let path = Path::new("/etc/pve/qmpin/100.toml");
    let policy = Policy::default().with_file(FILE, path, FileKind::Cluster);
    plan(&Request {
        vm: &"100".parse().expect("a name"),
        machine: &Machine::of(topology),
        guest: &guests::guest(vcpus, threads, 0, &[]),
        policy: &policy.expect("a good policy"),
        neighbours: &Neighbours::default(),
        surroundings: &Surroundings::default(),
        held: &BTreeMap::new(),
        stay: Stay::Always,
    })
}

#[test]
fn one_policy_of_needs_is_right_on_every_machine() {
    let mut planned_on = 0;
    for (name, topology) in machines() {
        let free = topology.cores.len() - 1;
        for vcpus in [1, 2, 4] {
            let plan = match planned(&topology, vcpus) {
                Ok(plan) => plan,
                Err(error @ PlanError::Policy { .. }) => panic!("{name}: {error}"),
                // A machine of one core has none to give.
                Err(PlanError::Infeasible { .. }) if free < vcpus as usize => continue,
                Err(error) => panic!("{name}, {vcpus} vCPUs: {error}"),
            };
            planned_on += 1;
            let used: CpuSet = plan.vcpus.iter().flat_map(|vcpu| vcpu.cpus.iter()).collect();
            assert_eq!(used.len(), vcpus as usize, "{name}: a CPU for each");
            assert!(used.is_subset(&topology.online()), "{name}");
            assert!(!plan.emulator.intersects(&plan.exclusive), "{name}: helpers are elsewhere");
            // Behind one cache where they fit, and the helpers behind another where there is one beside.
            let behind: Vec<_> =
                topology.llcs.iter().filter(|llc| llc.cpus.intersects(&used)).collect();
            let room = |llc: &Llc| {
                topology.cores.iter().skip(1).filter(|core| core.cpus.is_subset(&llc.cpus)).count()
            };
            let fits = topology.llcs.iter().any(|llc| room(llc) >= vcpus as usize);
            assert!(!fits || behind.len() == 1, "{name}: {vcpus} vCPUs behind {}", behind.len());
            let node =
                |cpus: &CpuSet| topology.nodes.iter().find(|node| cpus.is_subset(&node.cpus));
            let beside = topology.llcs.iter().any(|llc| {
                behind.len() == 1
                    && llc.llc != behind[0].llc
                    && node(&llc.cpus).is_some()
                    && node(&llc.cpus) == node(&used)
            });
            assert!(!beside || !plan.emulator.intersects(&behind[0].cpus), "{name}: {plan:?}");
            let has = |kind| topology.cores.iter().any(|core| core.kind == Some(kind));
            if has(CoreKind::Performance) && has(CoreKind::Efficiency) {
                let mut on = topology.cores.iter().filter(|core| core.cpus.intersects(&used));
                assert!(on.all(|core| core.kind == Some(CoreKind::Performance)), "{name}");
            }
            let sizes = || topology.llcs.iter().filter_map(|llc| llc.size_bytes);
            let (small, large) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
            if large >= 2 * small && large >= 64 << 20 {
                let mut behind = topology.llcs.iter().filter(|llc| llc.cpus.intersects(&used));
                assert!(behind.all(|llc| llc.size_bytes == Some(large)), "{name}");
            }
        }
    }
    assert!(planned_on >= 3 * 10, "{planned_on} plans");
}

/// The host core that each of a guest's cores is on, whose siblings are vCPUs next to each other.
fn cores_of_pairs(name: &str, topology: &Topology, plan: &Plan) -> Vec<CpuSet> {
    let pair = |pair: &[PlannedVcpu]| {
        let cpus: CpuSet = pair.iter().flat_map(|vcpu| vcpu.cpus.iter()).collect();
        assert_eq!(cpus.len(), 2, "{name}: {plan:?}");
        let core = topology.cores.iter().find(|core| cpus.is_subset(&core.cpus));
        core.unwrap_or_else(|| panic!("{name}: siblings on {cpus}, which is no core")).cpus
    };
    plan.vcpus.chunks(2).map(pair).collect()
}

#[test]
fn siblings_of_the_guest_are_siblings_on_every_machine_that_has_them() {
    let (mut planned_on, mut filled) = (0, 0);
    for (name, topology) in machines() {
        let has_siblings = |cpus: &CpuSet| cpus.len() == 2;
        let pairs = topology.cores.iter().skip(1).filter(|core| has_siblings(&core.cpus)).count();
        for cores in [1, 2] {
            if pairs < cores {
                continue;
            }
            let vcpus = 2 * u32::try_from(cores).expect("a small number");
            let plan = planned_with(&topology, vcpus, 2);
            let plan = plan.unwrap_or_else(|error| panic!("{name}, {vcpus} vCPUs: {error}"));
            let mut on = cores_of_pairs(&name, &topology, &plan);
            on.dedup();
            assert_eq!(on.len(), cores, "{name}: a core for each");
            planned_on += 1;
        }
        // As many as a whole group behind one cache has, where that is none of the host's own.
        let first = topology.cores[0].cpus;
        let within = |llc: &Llc| {
            let mut cores =
                topology.cores.iter().filter(|core| core.cpus.is_subset(&llc.cpus)).peekable();
            cores.peek().is_some() && cores.all(|core| has_siblings(&core.cpus))
        };
        let largest = topology.llcs.iter().map(|llc| llc.size_bytes).max().flatten();
        let is_free = |llc: &&Llc| !llc.cpus.intersects(&first) && llc.size_bytes == largest;
        let whole = topology.llcs.iter().filter(is_free);
        let Some(size) = whole.filter(|llc| within(llc)).map(|llc| llc.cpus.len()).max() else {
            continue;
        };
        let vcpus = u32::try_from(size).expect("a small number");
        let plan = planned_with(&topology, vcpus, 2);
        let plan = plan.unwrap_or_else(|error| panic!("{name}, {vcpus} vCPUs: {error}"));
        let used = cores_of_pairs(&name, &topology, &plan)
            .into_iter()
            .fold(CpuSet::EMPTY, |all, core| all | core);
        assert!(topology.llcs.iter().any(|llc| llc.cpus == used), "{name}: {used} is no group");
        assert!(!plan.emulator.intersects(&used), "{name}");
        filled += 1;
    }
    assert!(planned_on >= 10 && filled >= 5, "{planned_on} plans, {filled} of whole groups");
}
