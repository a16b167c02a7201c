//! Plans of two other projects, as facts: a machine, what is taken of it, a guest, and what their tests expect. They
//! are compared by outcome, since CPU numbers are each planner's own choice. Where qmpin decides otherwise, the case
//! lists the fact that does not hold here, and why; a listed difference that no longer exists fails the test, too.
//!
//! - OpenStack Nova, `nova/tests/unit/virt/test_hardware.py`: `CPUPinningCellTestCase` and `CPUPinningTestCase`. Its
//!   cells have the CPUs that are dedicated to instances, and none of the host's: here the machine has one more core,
//!   behind a cache of its own, that is reserved. Where Nova gives an instance threads, the guest has them here.
//! - karpenter-provider-proxmox, `pkg/providers/cloudcapacity/cpumanager`: `policy_static_test.go`, and
//!   `cpu_assignment_test.go`, which it has from the kubelet, and `memmanager/policy_static_test.go` beside it. CPUs
//!   that are not available are another VM's here. It gives out both threads of a core: the guest has `threads=2`
//!   here, unless the case is about that.
//!
//! Where they do not say which CPUs share a cache, those of a node do here.

#![allow(clippy::expect_used, clippy::panic)] // that is how a test says no

use std::collections::{BTreeMap, BTreeSet};

use qmpin::cpuset::CpuSet;
use qmpin::guest::GuestMemory;
use qmpin::ids::{CoreId, CpuId, LlcId, NodeId};
use qmpin::plan::{Machine, Neighbour, Neighbours, Plan, PlanError, Request, Stay, plan};
use qmpin::policy::{CpuChoice, Origin, Policy, Sourced};
use qmpin::promises::Surroundings;
use qmpin::topology::{Core, Cpu, Llc, Node, Topology};

use crate::support::guests;

/// What a reference says of a case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fact {
    /// There is no plan.
    Refused,
    /// There is one.
    Fits,
    /// All vCPUs are on so many nodes.
    Nodes(usize),
    /// Each guest node is on one node, and on another than the others.
    NodeEach,
    /// All vCPUs are on this node.
    OnNode(u32),
    /// All vCPUs are behind so many caches.
    Caches(usize),
    /// The vCPUs are on so many cores.
    Cores(usize),
    /// vCPUs share cores, although there are enough for one each.
    Packed,
    /// Guest siblings are on host siblings.
    Together,
}

use Fact::{Caches, Cores, Fits, NodeEach, Nodes, OnNode, Packed, Refused, Together};

/// Which CPUs are the host's.
#[derive(Clone, Copy)]
enum Host {
    /// Those of a core that the machine has besides.
    Another,
    /// These, which the reference reserves.
    Reserved(&'static str),
    /// The reference reserves none, and no policy names any for qmpin.
    Auto,
}

struct Case {
    /// The name of the reference's test, or where it has a sentence, what the case is about.
    of: &'static str,
    /// Cores with their CPUs, a cache after `|`, a node after `||`.
    machine: &'static str,
    host: Host,
    /// Other VMs' CPUs.
    taken: &'static str,
    /// vCPUs, threads of a core, nodes.
    guest: (u32, u32, u32),
    /// The node that the memory is bound to.
    memory: Option<u32>,
    says: &'static [Fact],
    /// The facts that do not hold for qmpin, and why.
    differs: &'static [(Fact, &'static str)],
}

/// A case without anything in it.
const EMPTY: Case = Case {
    of: "",
    machine: "",
    host: Host::Another,
    taken: "",
    guest: (0, 1, 0),
    memory: None,
    says: &[],
    differs: &[],
};

const WHOLE_CORES: &str =
    "a core is one VM's as a whole: what runs on its siblings shares its caches and its time";
const ONLY_HOST: &str = "Nova's scheduler can take another host; qmpin has this one, and the VM runs on it: each vCPU \
                         gets a CPU of its own, and the report says what falls short";
const OWN_CORES: &str =
    "a guest that has threads=1 takes every vCPU for a core, so each gets one while there are any";

const NOVA: [Case; 19] = [
    Case {
        of: "test_get_pinning_inst_too_large_cpu",
        machine: "0 1 2",
        guest: (4, 1, 0),
        says: &[Refused],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_inst_not_avail",
        machine: "0 1 2 3",
        taken: "0",
        guest: (4, 1, 0),
        says: &[Refused],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_no_sibling_fits_w_usage",
        machine: "0 1 2 3",
        taken: "1",
        guest: (3, 1, 0),
        says: &[Fits, Cores(3)],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_instance_siblings_host_siblings_fits_empty",
        machine: "0-1 2-3",
        guest: (4, 2, 0),
        says: &[Fits, Cores(2), Together],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_instance_siblings_host_siblings_fits_w_usage",
        machine: "0-3 4-7",
        taken: "1-2,5-6",
        guest: (4, 2, 0),
        says: &[Fits, Cores(2), Together],
        differs: &[(Fits, WHOLE_CORES)],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_host_siblings_fit_single_core",
        machine: "0-3 4-7",
        guest: (4, 4, 0),
        says: &[Fits, Cores(1), Together],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_host_siblings_instance_fit_optimize_threads",
        machine: "0-3 4-7",
        guest: (6, 2, 0),
        says: &[Fits, Cores(2), Together],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_host_siblings_large_instance_odd_fit",
        machine: "0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15",
        guest: (5, 1, 0),
        says: &[Fits, Packed],
        differs: &[(Packed, OWN_CORES)],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_require_policy_no_siblings",
        machine: "0 1 2 3 4 5 6 7",
        guest: (4, 2, 0),
        says: &[Refused],
        differs: &[(
            Refused,
            "siblings are a wish: on a machine without them, a guest with threads=2 runs on cores of its own, and \
             guest-siblings is reported as degraded",
        )],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_require_policy_too_few_siblings",
        machine: "0,4 1,5 2,6 3,7",
        taken: "0-2",
        guest: (4, 2, 0),
        says: &[Refused],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_require_policy_fits_w_usage",
        machine: "0,4 1,5 2,6 3,7",
        taken: "0-1",
        guest: (4, 2, 0),
        says: &[Fits, Cores(2), Together],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_isolate_policy_too_few_fully_free_cores",
        machine: "0-1 2-3",
        taken: "1",
        guest: (2, 1, 0),
        says: &[Refused],
        differs: &[(
            Refused,
            "that no other VM is on a core is always so; that two vCPUs of one VM share it is reported as own-core, \
             and is better than no CPU",
        )],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_isolate_policy_no_fully_free_cores",
        machine: "0-1 2-3",
        taken: "1-2",
        guest: (2, 1, 0),
        says: &[Refused],
        ..EMPTY
    },
    Case {
        of: "test_get_pinning_isolate_policy_fits_w_usage",
        machine: "0,4 1,5 2,6 3,7",
        taken: "0-1",
        guest: (2, 1, 0),
        says: &[Fits, Cores(2)],
        ..EMPTY
    },
    Case {
        of: "test_host_numa_fit_instance_to_host_single_cell_w_usage",
        machine: "0 1 || 2 3",
        taken: "0",
        guest: (2, 1, 1),
        says: &[Fits, OnNode(1)],
        ..EMPTY
    },
    Case {
        of: "test_host_numa_fit_instance_to_host_single_cell_fail",
        machine: "0 1 || 2 3",
        taken: "0,2",
        guest: (2, 1, 1),
        says: &[Refused],
        differs: &[(Refused, ONLY_HOST)],
        ..EMPTY
    },
    Case {
        of: "test_host_numa_fit_instance_to_host_fit",
        machine: "0 1 2 3 || 4 5 6 7",
        guest: (4, 1, 2),
        says: &[Fits, Nodes(2), NodeEach],
        ..EMPTY
    },
    Case {
        of: "test_host_numa_fit_instance_to_host_barely_fit",
        machine: "0 1 2 3 || 4 5 6 7 || 8 9 10 11",
        taken: "0,4-6,10-11",
        guest: (4, 1, 2),
        says: &[Fits, Nodes(2), NodeEach],
        ..EMPTY
    },
    Case {
        of: "test_host_numa_fit_instance_to_host_fail_topology",
        machine: "0 1 2 3 || 4 5 6 7",
        guest: (6, 1, 3),
        says: &[Refused],
        differs: &[(Refused, ONLY_HOST)],
        ..EMPTY
    },
];

/// 8 cores with siblings 8 apart, two caches.
const SMT_8: &str = "0,8 1,9 2,10 3,11 | 4,12 5,13 6,14 7,15";
/// 16 cores, a cache for each four, two nodes.
const TWO_NODES_16: &str = "0 1 2 3 | 4 5 6 7 || 8 9 10 11 | 12 13 14 15";
/// The same as one node.
const ONE_NODE_16: &str = "0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15";
/// Two sockets of three cores, numbered in turn.
const TWO_SOCKETS_12: &str = "0,6 2,8 4,10 || 1,7 3,9 5,11";
/// Four nodes of ten cores, siblings 40 apart.
const FOUR_NODES_80: &str = "0,40 1,41 2,42 3,43 4,44 5,45 6,46 7,47 8,48 9,49 || \
                             10,50 11,51 12,52 13,53 14,54 15,55 16,56 17,57 18,58 19,59 || \
                             20,60 21,61 22,62 23,63 24,64 25,65 26,66 27,67 28,68 29,69 || \
                             30,70 31,71 32,72 33,73 34,74 35,75 36,76 37,77 38,78 39,79";

const KARPENTER: [Case; 15] = [
    Case {
        of: "four CPUs of an empty host, whose guest has no threads",
        machine: SMT_8,
        guest: (4, 1, 0),
        says: &[Fits, Nodes(1), Caches(1), Packed],
        differs: &[(Packed, OWN_CORES)],
        ..EMPTY
    },
    Case {
        of: "as many CPUs as a cache has, and a core of the other is reserved",
        machine: SMT_8,
        host: Host::Reserved("0,8"),
        guest: (8, 2, 0),
        says: &[Fits, Nodes(1), Caches(1), Cores(4)],
        ..EMPTY
    },
    Case {
        of: "memory that node 0 has room for, and two of its CPUs are reserved",
        machine: TWO_NODES_16,
        host: Host::Reserved("0,3"),
        guest: (4, 1, 0),
        memory: Some(0),
        says: &[Fits, OnNode(0), Caches(1), Cores(4)],
        ..EMPTY
    },
    Case {
        of: "memory that node 1 alone has room for",
        machine: TWO_NODES_16,
        host: Host::Reserved("0,3"),
        guest: (6, 1, 0),
        memory: Some(1),
        says: &[Fits, OnNode(1), Caches(2), Cores(6)],
        ..EMPTY
    },
    Case {
        of: "memory that is asked for on node 1",
        machine: TWO_NODES_16,
        guest: (2, 1, 0),
        memory: Some(1),
        says: &[Fits, OnNode(1), Cores(2)],
        ..EMPTY
    },
    Case {
        of: "all CPUs of the machine, none reserved",
        machine: SMT_8,
        host: Host::Auto,
        guest: (16, 2, 0),
        says: &[Fits, Caches(2), Cores(8)],
        differs: &[(
            Fits,
            "the host keeps a core: its own threads, and QEMU's emulator and iothreads, would run on the vCPUs' CPUs",
        )],
        ..EMPTY
    },
    Case {
        of: "more vCPUs than the machine has CPUs",
        machine: TWO_SOCKETS_12,
        guest: (32, 2, 0),
        says: &[Refused],
        ..EMPTY
    },
    Case {
        of: "more memory than the machine has",
        machine: TWO_SOCKETS_12,
        guest: (8, 2, 0),
        says: &[Refused],
        differs: &[(
            Refused,
            "qmpin plans a VM that QEMU has started: whether the host has its memory is known by then, and the \
             planner counts CPUs alone",
        )],
        ..EMPTY
    },
    Case {
        of: "more than two caches, of which one has a CPU less",
        machine: ONE_NODE_16,
        host: Host::Reserved("0"),
        guest: (10, 1, 0),
        says: &[Fits, Caches(3), Cores(10)],
        ..EMPTY
    },
    Case {
        of: "the cache that holds them, beside one that does not",
        machine: SMT_8,
        taken: "0-1,8-9",
        guest: (6, 2, 0),
        says: &[Fits, Caches(1), Cores(3)],
        ..EMPTY
    },
    Case {
        of: "a whole cache and a core of the other",
        machine: SMT_8,
        host: Host::Reserved("0,8"),
        guest: (10, 2, 0),
        says: &[Fits, Caches(2), Cores(5)],
        ..EMPTY
    },
    Case {
        of: "single CPUs are left over of most caches",
        machine: TWO_NODES_16,
        taken: "0-2,9-11,13-15",
        guest: (2, 1, 0),
        says: &[Fits, OnNode(0), Caches(1), Cores(2)],
        ..EMPTY
    },
    Case {
        of: "a core more than a socket has",
        machine: TWO_SOCKETS_12,
        guest: (8, 2, 0),
        says: &[Fits, Nodes(2), Cores(4)],
        ..EMPTY
    },
    Case {
        of: "as many as a node has, and one node is taken",
        machine: FOUR_NODES_80,
        taken: "0-9,40-49",
        guest: (20, 2, 0),
        says: &[Fits, Nodes(1), Cores(10)],
        ..EMPTY
    },
    Case {
        of: "as many as three nodes have, and a core of the first is taken",
        machine: FOUR_NODES_80,
        host: Host::Reserved("0,40"),
        guest: (60, 2, 0),
        says: &[Fits, Nodes(3), Cores(30)],
        ..EMPTY
    },
];

fn cpus(list: &str) -> CpuSet {
    list.parse().expect("a cpulist")
}

/// The CPU of the core that is the host's, where the reference's machine has none.
const HOST: &str = "200";

/// The machine of a case, core by core in the order of their first CPUs.
fn topology(case: &Case) -> Topology {
    let mut cores: Vec<(CpuSet, u32, u32)> = Vec::new();
    let (mut cache, mut node) = (0, 0);
    for word in case.machine.split_whitespace() {
        match word {
            "|" => cache += 1,
            "||" => (cache, node) = (cache + 1, node + 1),
            list => cores.push((cpus(list), cache, node)),
        }
    }
    if let Host::Another = case.host {
        cores.push((cpus(HOST), cache + 1, 0));
    }
    cores.sort_by_key(|(cpus, ..)| cpus.first());
    let union = |of: &dyn Fn(&(CpuSet, u32, u32)) -> bool| {
        let some = cores.iter().filter(|core| of(core));
        some.fold(CpuSet::EMPTY, |all, (cpus, ..)| all | *cpus)
    };
    let mut topology = Topology::default();
    let caches: BTreeSet<u32> = cores.iter().map(|(_, cache, _)| *cache).collect();
    for cache in caches {
        let cpus = union(&|(_, other, _)| *other == cache);
        topology.llcs.push(Llc { llc: LlcId(cache), cpus, size_bytes: Some(32 << 20) });
    }
    for at in 0..=node {
        let distances = (0..=node).map(|other| if other == at { 10 } else { 20 }).collect();
        let cpus = union(&|(_, _, other)| *other == at);
        topology.nodes.push(Node { node: NodeId(at), cpus, memory_bytes: None, distances });
    }
    for (id, (cpus, cache, node)) in (0..).zip(&cores) {
        let (llc, node, package) = (Some(LlcId(*cache)), Some(NodeId(*node)), Some(*node));
        let core = CoreId(id);
        topology.cores.push(Core {
            id: core,
            cpus: *cpus,
            llc,
            node,
            package,
            die: None,
            kind: None,
            rank: None,
        });
        topology.cpus.extend(cpus.iter().map(|id| Cpu {
            id,
            online: true,
            package,
            die: None,
            node,
            llc,
            core: Some(core),
            siblings: *cpus,
            kind: None,
        }));
    }
    topology.cpus.sort_by_key(|cpu| cpu.id);
    topology
}

/// A plan, and what the facts are about.
struct Outcome {
    /// The core, cache and node of each vCPU.
    on: Vec<(CoreId, LlcId, NodeId)>,
    /// The nodes of each guest node.
    nodes: BTreeMap<Option<u32>, BTreeSet<NodeId>>,
    /// The cores of each guest core.
    cores: BTreeMap<Option<u32>, BTreeSet<CoreId>>,
    /// How many free cores there were.
    free: usize,
}

fn planned(case: &Case) -> Option<Outcome> {
    let topology = topology(case);
    let mut policy = Policy::default();
    let reserved = match case.host {
        Host::Another => Some(cpus(HOST)),
        Host::Reserved(list) => Some(cpus(list)),
        Host::Auto => None,
    };
    if let Some(reserved) = reserved {
        let value = CpuChoice::Cpus(reserved);
        policy.host.reserved = Sourced { value, origin: Origin::Flag { flag: "--test" } };
    }
    let taken = cpus(case.taken);
    let mut neighbours = Neighbours::default();
    if !taken.is_empty() {
        let vm = "101".parse().expect("a name");
        neighbours.push(Neighbour { vm, exclusive: taken, helpers: CpuSet::EMPTY, doubt: None });
    }
    let (vcpus, threads, nodes) = case.guest;
    let mut guest = guests::guest(vcpus, threads, nodes, &[]);
    let bound = case.memory.map(NodeId).map(|node| vec![node]);
    guest.memory.extend(bound.map(|bound| GuestMemory {
        guest_node: None,
        bytes: 12 << 30,
        bound,
    }));
    let asked = plan(&Request {
        vm: &"100".parse().expect("a name"),
        machine: &Machine::of(&topology),
        guest: &guest,
        policy: &policy,
        neighbours: &neighbours,
        surroundings: &Surroundings::default(),
        held: &BTreeMap::new(),
        stay: Stay::Always,
    });
    let plan: Plan = match asked {
        Ok(plan) => plan,
        Err(PlanError::Infeasible { .. }) => return None,
        Err(error) => panic!("{}: {error}", case.of),
    };
    let blocked = taken | reserved.unwrap_or_default();
    let is_free = |core: &&Core| !core.cpus.intersects(&blocked);
    let free = topology.cores.iter().filter(is_free).count();
    let mut outcome =
        Outcome { on: Vec::new(), nodes: BTreeMap::new(), cores: BTreeMap::new(), free };
    let mut used = CpuSet::EMPTY;
    for vcpu in &guest.vcpus {
        let on = plan.vcpu(vcpu.index).expect("every vCPU is planned");
        let cpu: CpuId = on.first().expect("a CPU");
        assert_eq!(on.len(), 1, "{}: vCPU {} has a CPU of its own", case.of, vcpu.index);
        assert!(!on.intersects(&(used | blocked)), "{}: CPU {cpu} is another's", case.of);
        used |= on;
        let core = topology.core_of(cpu).expect("known");
        let node = core.node.expect("known");
        outcome.on.push((core.id, core.llc.expect("known"), node));
        outcome.nodes.entry(vcpu.node).or_default().insert(node);
        outcome.cores.entry(vcpu.core).or_default().insert(core.id);
    }
    Some(outcome)
}

impl Outcome {
    fn count<T: Ord>(&self, of: impl Fn(&(CoreId, LlcId, NodeId)) -> T) -> usize {
        self.on.iter().map(of).collect::<BTreeSet<T>>().len()
    }

    fn cores(&self) -> usize {
        self.count(|(core, ..)| *core)
    }

    fn nodes(&self) -> usize {
        self.count(|(.., node)| *node)
    }
}

/// Whether a fact holds; `None`: there is no plan to look at.
fn holds(fact: Fact, outcome: Option<&Outcome>) -> Option<bool> {
    match (fact, outcome) {
        (Refused, outcome) => Some(outcome.is_none()),
        (Fits, outcome) => Some(outcome.is_some()),
        (_, None) => None,
        (Nodes(number), Some(outcome)) => Some(outcome.nodes() == number),
        (OnNode(node), Some(outcome)) => {
            Some(outcome.on.iter().all(|(.., on)| *on == NodeId(node)))
        }
        (NodeEach, Some(outcome)) => {
            let one_each = outcome.nodes.values().all(|nodes| nodes.len() == 1);
            Some(one_each && outcome.nodes() == outcome.nodes.len())
        }
        (Caches(number), Some(outcome)) => Some(outcome.count(|(_, cache, _)| *cache) == number),
        (Cores(number), Some(outcome)) => Some(outcome.cores() == number),
        (Packed, Some(outcome)) => {
            let number = outcome.on.len();
            Some(outcome.free >= number && outcome.cores() < number)
        }
        (Together, Some(outcome)) => Some(outcome.cores.values().all(|cores| cores.len() == 1)),
    }
}

fn compare(cases: &[Case]) {
    for case in cases {
        let outcome = planned(case);
        let failed: Vec<Fact> = case
            .says
            .iter()
            .copied()
            .filter(|fact| holds(*fact, outcome.as_ref()) == Some(false))
            .collect();
        let listed: Vec<Fact> = case.differs.iter().map(|(fact, _)| *fact).collect();
        let on = outcome.map(|outcome| outcome.on);
        assert_eq!(failed, listed, "{}: what does not hold, and what is listed: {on:?}", case.of);
        assert!(!case.says.is_empty(), "{}", case.of);
        assert!(case.differs.iter().all(|(_, why)| !why.is_empty()), "{}", case.of);
    }
}

#[test]
fn outcomes_are_novas_but_for_the_differences_listed() {
    compare(&NOVA);
}

#[test]
fn outcomes_are_those_of_karpenter_provider_proxmox_but_for_the_differences_listed() {
    compare(&KARPENTER);
}

/// A reference that most cases differ from would be none.
#[test]
fn most_cases_agree() {
    for cases in [&NOVA[..], &KARPENTER] {
        let agree = cases.iter().filter(|case| case.differs.is_empty()).count();
        assert!(agree * 3 >= cases.len() * 2, "{agree} of {}", cases.len());
    }
}
