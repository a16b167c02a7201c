//! Planning for a machine of 1,024 CPUs and 500 VMs. No QEMU: the planner is a function.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qmpin::cpuset::CpuSet;
use qmpin::guest::{Guest, GuestVcpu};
use qmpin::ids::{CoreId, CpuId, LlcId, NodeId, VcpuIndex, VmName};
use qmpin::plan::{Declared, Machine, Neighbour, Neighbours, Plan, Request, Stay, plan, plan_all};
use qmpin::policy::Policy;
use qmpin::promises::Surroundings;
use qmpin::topology::{Core, Cpu, Llc, Node, Topology};

use crate::figures::{Samples, Table};

const CORES: u32 = 512;
const CORES_PER_LLC: u32 = 8;
const CORES_PER_NODE: u32 = 64;
const VMS: u32 = 500;
const ROUNDS: usize = 20;

pub(crate) fn measure(table: &mut Table) {
    let (topology, policy) = (machine(CORES), Policy::default());
    let (mut one, mut all, mut together) =
        (Samples::default(), Samples::default(), Samples::default());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let last = fill(&topology, &policy, VMS);
        one.add(last);
        all.add(start.elapsed());
        let declared = (0..VMS).map(|number| Declared {
            vm: (100 + number).to_string().parse().unwrap(),
            guest: guest(),
            devices: Vec::new(),
            policy: policy.clone(),
        });
        let declared: Vec<Declared> = declared.collect();
        let start = Instant::now();
        let (none, around) = (Neighbours::default(), Surroundings::default());
        let planned = plan_all(&Machine::of(&topology), declared, none, &around, &policy);
        together.add(start.elapsed());
        assert!(planned.plans.iter().all(|(_, plan)| plan.is_ok()));
    }
    table.alone("planning on 1024 CPUs: a VM beside 499 others", &one, "");
    table.alone("planning on 1024 CPUs: 500 VMs, one by one", &all, "< 5 ms");
    table.alone("planning on 1024 CPUs: 500 VMs by `plan --all`", &together, "< 50 ms");
    // Nearly full each: a machine of twice the size has twice the VMs.
    for cores in [32, 64, 128, 256, 512] {
        let topology = machine(cores);
        let mut one = Samples::default();
        for _ in 0..ROUNDS {
            one.add(fill(&topology, &policy, cores - 6));
        }
        let what = format!("planning on {} CPUs: a VM beside {} others", 2 * cores, cores - 7);
        table.alone(&what, &one, "");
    }
}

/// Places so many VMs one by one, and returns how long the last one took.
fn fill(topology: &Topology, policy: &Policy, vms: u32) -> Duration {
    let machine = Machine::of(topology);
    let mut neighbours = Neighbours::default();
    let mut last = Duration::ZERO;
    for number in 0..vms {
        let start = Instant::now();
        let vm: VmName = (100 + number).to_string().parse().unwrap();
        let plan = plan_of(&vm, &machine, policy, &neighbours);
        let helpers = plan.emulator | plan.iothread_cpus;
        neighbours.push(Neighbour { vm, exclusive: plan.exclusive, helpers, doubt: None });
        last = start.elapsed();
    }
    last
}

fn plan_of(vm: &VmName, machine: &Machine<'_>, policy: &Policy, neighbours: &Neighbours) -> Plan {
    let guest = guest();
    let held = BTreeMap::new();
    plan(&Request {
        vm,
        machine,
        guest: &guest,
        policy,
        neighbours,
        surroundings: &Surroundings::default(),
        held: &held,
        stay: Stay::Always,
    })
    .expect("a plan")
}

fn guest() -> Guest {
    // Two SMT threads of one guest core: a VM fills a core, and 500 of them nearly the machine.
    let vcpu = |index| GuestVcpu {
        index: VcpuIndex(index),
        node: None,
        socket: Some(0),
        die: None,
        cluster: None,
        core: Some(0),
        thread: Some(index),
    };
    Guest {
        vcpus: vec![vcpu(0), vcpu(1)],
        iothreads: Vec::new(),
        beyond: Vec::new(),
        memory: Vec::new(),
    }
}

/// Nodes of eight LLC groups of eight cores of two threads, as many as there are cores for; siblings are far apart.
fn machine(cores: u32) -> Topology {
    let cpu = |number: u32| CpuId::from_index(number as usize).unwrap();
    let siblings = |core: u32| CpuSet::from_iter([cpu(core), cpu(core + cores)]);
    let of =
        |cores: std::ops::Range<u32>| cores.fold(CpuSet::EMPTY, |all, core| all | siblings(core));
    let mut topology = Topology::default();
    topology.cpus.extend((0..2 * cores).map(|number| {
        let core = number % cores;
        Cpu {
            id: cpu(number),
            online: true,
            package: Some(0),
            die: Some(0),
            node: Some(NodeId(core / CORES_PER_NODE)),
            llc: Some(LlcId(core / CORES_PER_LLC)),
            core: Some(CoreId(core)),
            siblings: siblings(core),
            kind: None,
        }
    }));
    topology.cores.extend((0..cores).map(|core| Core {
        id: CoreId(core),
        cpus: siblings(core),
        llc: Some(LlcId(core / CORES_PER_LLC)),
        node: Some(NodeId(core / CORES_PER_NODE)),
        package: Some(0),
        die: Some(0),
        kind: None,
        rank: None,
    }));
    topology.llcs.extend((0..cores / CORES_PER_LLC).map(|llc| Llc {
        llc: LlcId(llc),
        cpus: of(llc * CORES_PER_LLC..(llc + 1) * CORES_PER_LLC),
        size_bytes: Some(32 << 20),
    }));
    let nodes = cores.div_ceil(CORES_PER_NODE);
    topology.nodes.extend((0..nodes).map(|node| Node {
        node: NodeId(node),
        cpus: of(node * CORES_PER_NODE..cores.min((node + 1) * CORES_PER_NODE)),
        memory_bytes: Some(64 << 30),
        distances: (0..nodes).map(|other| if other == node { 10 } else { 32 }).collect(),
    }));
    topology
}
