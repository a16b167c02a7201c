//! A VM whose cgroup allows it some of the host's CPUs is planned inside them, or the cgroup is named.

#![allow(clippy::expect_used, clippy::panic)] // that is how a test says no

use std::collections::BTreeMap;
use std::path::Path;

use qmpin::cpuset::CpuSet;
use qmpin::guest::Allowed;
use qmpin::plan::{Machine, Neighbours, Plan, PlanError, Request, Stay, Verdict, plan};
use qmpin::policy::{FileKind, Policy};
use qmpin::promises::Surroundings;

use crate::support::{guests, hosts};

const WHY: &str = "qemu.slice/100.scope allows only CPUs 2-5,14-17 (cpuset.cpus)";

fn cpus(list: &str) -> CpuSet {
    list.parse().expect("a cpulist")
}

/// A guest with so many vCPUs, two to a core, on a host whose siblings are 12 apart.
fn planned(vcpus: u32, policy: &str, allowed: &str) -> Result<Plan, PlanError> {
    let path = Path::new("/etc/qmpin/100.toml");
    let policy = Policy::default().with_file(policy, path, FileKind::Vm).expect("a good policy");
    let allowed = Allowed { cpus: cpus(allowed), why: WHY.to_owned() };
    plan(&Request {
        vm: &"100".parse().expect("a name"),
        machine: &Machine::of(&hosts::ryzen_5900x().topology()),
        guest: &guests::guest(vcpus, 2, 0, &[]),
        policy: &policy,
        neighbours: &Neighbours::default(),
        surroundings: &Surroundings { allowed: Some(allowed), ..Surroundings::default() },
        held: &BTreeMap::new(),
        stay: Stay::Always,
    })
}

#[test]
fn every_thread_is_planned_inside_the_limit() {
    let plan = planned(4, "", "2-5,14-17").expect("a plan");
    assert_eq!(plan.exclusive.len(), 4, "{plan:?}");
    let all = plan.exclusive | plan.emulator | plan.iothread_cpus;
    assert!(all.is_subset(&cpus("2-5,14-17")), "{all}");
    let finding = plan.report.iter().find(|finding| finding.rule == "allowed").expect("a finding");
    assert_eq!(finding.verdict, Verdict::Met);
    assert!(finding.reason.contains(WHY), "{}", finding.reason);
}

#[test]
fn a_limit_that_splits_cores_leaves_the_other_halves_alone() {
    let plan = planned(2, "", "2-5").expect("a plan");
    let all = plan.exclusive | plan.emulator | plan.iothread_cpus;
    assert!(all.is_subset(&cpus("2-5")) && plan.exclusive.len() == 2, "{plan:?}");
}

#[test]
fn what_does_not_fit_names_the_cgroup() {
    for (vcpus, policy, limit) in [
        (12, "", "2-5,14-17"),
        // Nothing would be left for the emulator.
        (8, "", "2-5,14-17"),
        (4, "vcpus = \"6-7,18-19\"", "2-5,14-17"),
        (2, "emulator = \"8-9\"", "2-5,14-17"),
    ] {
        let Err(PlanError::Infeasible { reason, .. }) = planned(vcpus, policy, limit) else {
            panic!("{vcpus} vCPUs with {policy:?} were planned");
        };
        assert!(reason.contains(WHY), "{vcpus} vCPUs with {policy:?}: {reason}");
    }
    let error = planned(4, "vcpus = \"4-7\"", "2-5,14-17").expect_err("two are outside");
    let words = "/etc/qmpin/100.toml:1: vcpus = \"4-7\": no access to CPUs 6-7";
    assert!(error.to_string().starts_with(words), "{error}");
}
