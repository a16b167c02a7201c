//! Every folder of `tests/plans`: a host, a guest and a policy in, the plan and its report out, both
//! to be read by people. `QMPIN_BLESS=1` writes what the planner says now; read it before you commit.

#![allow(clippy::expect_used, clippy::panic)] // that is how a test says no

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use qmpin::cpuset::CpuSet;
use qmpin::devices::{Device, DeviceKind};
use qmpin::guest::{Guest, GuestMemory};
use qmpin::ids::{CpuId, NodeId, VcpuIndex};
use qmpin::plan::{
    Finding, Machine, Neighbour, Neighbours, Plan, PlanError, Request, Stay, Verdict, plan,
};
use qmpin::policy::{FileKind, Policy, PolicyError};
use qmpin::promises::{Promise, Promises, Strength, Surroundings};
use qmpin::topology::Topology;

use crate::support::{guests, hosts};

/// `case.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// What the case is about, in a sentence.
    about: String,
    /// A machine of `support/hosts.rs`.
    host: String,
    #[serde(default)]
    offline: Vec<usize>,
    guest: GuestShape,
    /// The guest when it was first planned, where that was another.
    before: Option<GuestShape>,
    /// The pins it holds, instead.
    #[serde(default)]
    held: BTreeMap<String, usize>,
    /// Whether they stay only unless there is better.
    #[serde(default)]
    unless_better: bool,
    /// `/etc/qmpin/qmpin.toml` and `/etc/qmpin/100.toml`.
    #[serde(default)]
    host_policy: String,
    #[serde(default)]
    vm_policy: String,
    #[serde(default)]
    others: Vec<Other>,
    #[serde(default)]
    promises: Vec<Promised>,
    /// What the kernel command line isolates.
    #[serde(default)]
    isolated: CpuSet,
    /// Devices by their kind and node.
    #[serde(default)]
    devices: Vec<DeviceShape>,
    /// Nodes with devices for VMs.
    #[serde(default)]
    set_aside: BTreeSet<u32>,
    /// What VMs that are not started yet would have.
    #[serde(default)]
    expected: CpuSet,
    /// MiB of the VM's memory by node.
    #[serde(default)]
    memory_on: BTreeMap<String, u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GuestShape {
    vcpus: u32,
    #[serde(default = "one")]
    threads: u32,
    /// Guest NUMA nodes; 0 where it has none.
    #[serde(default)]
    nodes: u32,
    /// vCPUs that are not plugged.
    #[serde(default)]
    gone: Vec<u32>,
    #[serde(default)]
    iothreads: Vec<String>,
    #[serde(default)]
    memory: Vec<Memory>,
}

/// A piece of the guest's memory.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {
    node: Option<u32>,
    mib: u64,
    #[serde(default)]
    bound: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Other {
    vm: String,
    exclusive: CpuSet,
    helpers: CpuSet,
}

/// A device that is passed through.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceShape {
    class: u32,
    address: String,
    node: Option<u32>,
}

/// What other programs count on.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Promised {
    what: String,
    cpus: CpuSet,
    #[serde(default)]
    hard: bool,
}

impl Case {
    fn surroundings(&self) -> Surroundings {
        let made = self.promises.iter().map(|promise| Promise {
            what: promise.what.clone(),
            cpus: promise.cpus,
            tid: None,
            strength: if promise.hard { Strength::Hard } else { Strength::Soft },
        });
        let promises = Promises { made: made.collect(), isolated: self.isolated };
        let on = self.memory_on.iter();
        let memory_on = on.map(|(node, mib)| (NodeId(node.parse().expect("a node")), mib << 20));
        let devices = self.devices.iter().map(|device| Device {
            kind: DeviceKind::of_class(device.class),
            address: device.address.clone(),
            node: device.node.map(NodeId),
        });
        Surroundings {
            allowed: None,
            promises,
            memory_on: memory_on.collect(),
            devices: devices.collect(),
            expected: self.expected,
            set_aside: self.set_aside.iter().copied().map(NodeId).collect(),
        }
    }
}

fn one() -> u32 {
    1
}

fn policy(case: &Case) -> Result<Policy, PolicyError> {
    let host = Path::new("/etc/qmpin/qmpin.toml");
    Policy::default().with_file(&case.host_policy, host, FileKind::Host)?.with_file(
        &case.vm_policy,
        Path::new("/etc/qmpin/100.toml"),
        FileKind::Vm,
    )
}

fn guest(shape: &GuestShape) -> Guest {
    let guest = guests::guest(shape.vcpus, shape.threads, shape.nodes, &shape.gone);
    let memory = shape.memory.iter().map(|piece| GuestMemory {
        guest_node: piece.node,
        bytes: piece.mib << 20,
        bound: piece.bound.iter().copied().map(NodeId).collect(),
    });
    Guest { memory: memory.collect(), ..guests::with_iothreads(guest, &shape.iothreads) }
}

/// What the planner says to a case, as the file shows it.
fn answer(case: &Case) -> String {
    let mut text = format!("{}\n\n", case.about);
    let policy = match policy(case) {
        Ok(policy) => policy,
        Err(error) => {
            let _ = writeln!(text, "policy refused\n{}", wrapped(&error.to_string(), 2));
            return text;
        }
    };
    let (_, host) = hosts::all()
        .into_iter()
        .find(|(name, _)| *name == case.host)
        .unwrap_or_else(|| panic!("there is no host {}", case.host));
    let topology = host.with_offline(&case.offline).topology();
    let neighbours: Neighbours = case
        .others
        .iter()
        .map(|other| Neighbour {
            doubt: None,
            vm: other.vm.parse().expect("a VM's name"),
            exclusive: other.exclusive,
            helpers: other.helpers,
        })
        .collect();
    let surroundings = case.surroundings();
    let ask = |guest: &Guest, held: &BTreeMap<VcpuIndex, CpuId>| {
        let vm = "100".parse().expect("a VM's name");
        plan(&Request {
            vm: &vm,
            machine: &Machine::of(&topology),
            guest,
            policy: &policy,
            neighbours: &neighbours,
            surroundings: &surroundings,
            held,
            stay: if case.unless_better { Stay::UnlessBetter } else { Stay::Always },
        })
    };
    let cpu = |number: &usize| CpuId::from_index(*number).expect("a CPU number");
    let mut held: BTreeMap<VcpuIndex, CpuId> = case
        .held
        .iter()
        .map(|(vcpu, number)| (VcpuIndex(vcpu.parse().expect("a vCPU")), cpu(number)))
        .collect();
    if let Some(before) = &case.before {
        held = ask(&guest(before), &BTreeMap::new()).expect("a plan for the guest before").held();
    }
    match ask(&guest(&case.guest), &held) {
        Ok(plan) => text.push_str(&shown(&plan, &topology)),
        Err(PlanError::Policy { .. }) if !held.is_empty() => panic!("a policy refused in mid-run"),
        Err(error @ PlanError::Policy { .. }) => {
            let _ = writeln!(text, "policy refused\n{}", wrapped(&error.to_string(), 2));
        }
        Err(PlanError::Infeasible { reason, nearest, .. }) => {
            let _ = writeln!(text, "infeasible\n{}", wrapped(&reason, 2));
            if let Some(nearest) = nearest {
                let _ = writeln!(text, "\nnearest: {}", nearest.takes);
                text.push_str(&shown(&nearest.plan, &topology));
            }
        }
    }
    text
}

fn shown(plan: &Plan, topology: &Topology) -> String {
    let mut text = String::from("vcpu  cpu   core  llc  node  why\n");
    for planned in &plan.vcpus {
        let cpus = planned.cpus.to_string();
        let first = planned.cpus.first().and_then(|cpu| topology.cpu(cpu));
        let first = first.filter(|_| planned.cpus.len() == 1);
        let number = |number: Option<u32>| number.map_or("-".to_owned(), |n| n.to_string());
        let _ = writeln!(
            text,
            "{:<4}  {cpus:<4}  {:<4}  {:<3}  {:<4}  {}",
            planned.vcpu.0,
            number(first.and_then(|cpu| cpu.core).map(|core| core.0)),
            number(first.and_then(|cpu| cpu.llc).map(|llc| llc.0)),
            number(first.and_then(|cpu| cpu.node).map(|node| node.0)),
            planned.why.rule(),
        );
    }
    for vcpu in &plan.left_alone {
        let _ = writeln!(text, "{:<4}  left alone", vcpu.0);
    }
    text.push('\n');
    for (name, cpus) in [
        ("exclusive", plan.exclusive),
        ("housekeeping", plan.housekeeping),
        ("emulator", plan.emulator),
        ("iothreads", plan.iothread_cpus),
    ] {
        let _ = writeln!(text, "{name:<12}  {cpus}");
    }
    for iothread in plan.iothreads.iter().filter(|one| one.cpus != plan.iothread_cpus) {
        let _ = writeln!(text, "{:<12}  {}", format!("  {}", iothread.iothread), iothread.cpus);
    }
    for displaced in &plan.displaced {
        let _ = writeln!(text, "displaces     {} from {}", displaced.what, displaced.cpus);
    }
    text.push('\n');
    for Finding { rule, verdict, reason } in &plan.report {
        let verdict = match verdict {
            Verdict::Met => "met",
            Verdict::Degraded => "degraded",
            Verdict::Impossible => "impossible",
        };
        let _ = writeln!(text, "{verdict:<10}  {rule}\n{}", wrapped(reason, 14));
    }
    text
}

/// The text on lines of 80 columns, each indented.
fn wrapped(text: &str, indent: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= 80 => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("{:indent$}{word}", "")),
        }
    }
    lines.join("\n")
}

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans");
    let mut cases: Vec<PathBuf> = fs::read_dir(folder)
        .expect("tests/plans")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    cases.sort();
    cases
}

#[test]
fn every_case_is_planned_as_its_file_says() {
    let bless = std::env::var_os("QMPIN_BLESS").is_some();
    let mut wrong = Vec::new();
    for folder in cases() {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        let text = fs::read_to_string(folder.join("case.toml")).expect(&name);
        let case: Case = toml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (path, found) = (folder.join("plan.txt"), answer(&case));
        let expected = fs::read_to_string(&path).unwrap_or_default();
        if found == expected {
            continue;
        }
        if bless {
            fs::write(&path, &found).expect("plan.txt");
        } else {
            wrong.push(format!("--- {name}: expected\n{expected}+++ {name}: found\n{found}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} cases; if the new plans are right: QMPIN_BLESS=1 cargo test --test planning plans::\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn every_host_with_a_name_has_a_case() {
    let used: Vec<String> = cases()
        .iter()
        .map(|folder| fs::read_to_string(folder.join("case.toml")).expect("a case"))
        .map(|text| toml::from_str::<Case>(&text).expect("a case").host)
        .collect();
    for (name, _) in hosts::all() {
        assert!(used.iter().any(|host| host == name), "no case of tests/plans is on {name}");
    }
}
