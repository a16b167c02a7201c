//! Random questions about small machines: at most 12 CPUs, three caches and two nodes, and six vCPUs.

use std::collections::BTreeMap;
use std::fmt;

use qmpin::cpuset::CpuSet;
use qmpin::guest::{Allowed, Guest, GuestMemory};
use qmpin::ids::{CpuId, NodeId};
use qmpin::plan::{Neighbour, Neighbours};
use qmpin::policy::{CpuChoice, Origin, Policy, Sourced};
use qmpin::promises::{Promise, Promises, Strength, Surroundings};
use qmpin::topology::{CoreKind, Topology};

use crate::support::fake_host::{Caches, Cores, LlcShape, Numbering, Shape, node};
use crate::support::guests;

const CPUS_MAX: usize = 12;

/// A generator of numbers (splitmix64), so that the cases are the same everywhere.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn of(seed: u64) -> Dice {
        Dice(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number from `from` to `to`, both included.
    fn between(&mut self, from: usize, to: usize) -> usize {
        let span = (to - from + 1) as u64;
        from + usize::try_from(self.next() % span).expect("small")
    }

    fn one_in(&mut self, many: usize) -> bool {
        self.between(1, many) == 1
    }

    fn one<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.between(0, all.len() - 1)]
    }
}

/// A question about a VM that holds nothing yet.
pub(super) struct Case {
    pub(super) topology: Topology,
    pub(super) guest: Guest,
    pub(super) policy: Policy,
    pub(super) neighbours: Neighbours,
    pub(super) surroundings: Surroundings,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u32>| number.map_or("-".to_owned(), |n| n.to_string());
        for core in &self.topology.cores {
            let llc = number(core.llc.map(|llc| llc.0));
            let node = number(core.node.map(|node| node.0));
            let kind = match core.kind {
                None => "",
                Some(CoreKind::Performance) => " P",
                Some(CoreKind::Efficiency) => " E",
            };
            write!(f, "[{} llc {llc} node {node}{kind}] ", core.cpus)?;
        }
        for llc in &self.topology.llcs {
            write!(f, "{} MiB ", llc.size_bytes.unwrap_or_default() >> 20)?;
        }
        write!(f, "\n    guest")?;
        for vcpu in &self.guest.vcpus {
            let (node, core) = (number(vcpu.node), number(vcpu.core));
            write!(f, " {} (node {node}, core {core})", vcpu.index)?;
        }
        for GuestMemory { guest_node, bound, .. } in &self.guest.memory {
            let bound: Vec<u32> = bound.iter().map(|node| node.0).collect();
            write!(f, ", memory of {} on {bound:?}", number(*guest_node))?;
        }
        let Surroundings { allowed, promises, memory_on, .. } = &self.surroundings;
        write!(f, "\n    reserved {}", self.policy.host.reserved.value)?;
        write!(f, ", others {}", self.neighbours.exclusive())?;
        for promise in &promises.made {
            write!(f, ", {:?} {}", promise.strength, promise.cpus)?;
        }
        if let Some(allowed) = allowed {
            write!(f, ", allowed {}", allowed.cpus)?;
        }
        write!(f, ", isolated {}", promises.isolated)?;
        let lies: Vec<String> =
            memory_on.iter().map(|(node, bytes)| format!("{node}: {}", bytes >> 20)).collect();
        write!(f, ", memory lies on {}", lies.join(" "))
    }
}

/// A machine with one to three caches, SMT 1, 2 or 4, sometimes two kinds of cores, unequal caches, a cache over two
/// nodes, or no caches.
fn any_machine(dice: &mut Dice) -> Topology {
    let threads = dice.one(&[1, 2, 2, 2, 4]);
    let cores_max = (CPUS_MAX / threads).min(8);
    let mut cores = vec![1; dice.between(1, 3)];
    for _ in 0..dice.between(0, cores_max - cores.len()) {
        let at = dice.between(0, cores.len() - 1);
        cores[at] += 1;
    }
    let (hybrid, mixed, unequal) = (dice.one_in(6), dice.one_in(2), dice.one_in(4));
    let mut llcs = Vec::new();
    for count in cores {
        let small = match (hybrid, mixed) {
            (false, _) => 0,
            (true, true) => dice.between(0, count),
            (true, false) => dice.one(&[0, count]),
        };
        let fast = hybrid.then_some(CoreKind::Performance);
        let fast = Cores { count: count - small, threads, kind: fast };
        let small = Cores { count: small, threads: 1, kind: Some(CoreKind::Efficiency) };
        llcs.push(LlcShape {
            size_kib: if unequal { dice.one(&[16, 32, 96]) << 10 } else { 32 << 10 },
            cores: [fast, small].into_iter().filter(|some| some.count > 0).collect(),
        });
    }
    let first = if dice.one_in(2) { dice.between(1, llcs.len()) } else { llcs.len() };
    let there = llcs.split_off(first);
    let mut nodes = vec![node(0, 64, llcs)];
    if !there.is_empty() {
        nodes.push(node(dice.one(&[0, 1]), 64, there));
    }
    let numberings = [Numbering::SiblingsAdjacent, Numbering::SiblingsLast, Numbering::Interleaved];
    let caches = if dice.one_in(12) { Caches::None } else { Caches::L3 };
    let host = Shape { caches, ..Shape::new(nodes, dice.one(&numberings)) }.build();
    if dice.one_in(10) { host.with_one_llc_per_package().topology() } else { host.topology() }
}

/// Whole cores side by side, or any CPUs.
fn some_cpus(dice: &mut Dice, topology: &Topology, most: usize) -> CpuSet {
    let cores = &topology.cores;
    if dice.one_in(2) {
        let (first, count) = (dice.between(0, cores.len() - 1), dice.between(1, most.div_ceil(2)));
        let some = cores.iter().skip(first).take(count);
        return some.fold(CpuSet::EMPTY, |all, core| all | core.cpus);
    }
    let cpus: Vec<CpuId> = topology.online().iter().collect();
    (0..dice.between(1, most)).map(|_| dice.one(&cpus)).collect()
}

fn any_promises(dice: &mut Dice, topology: &Topology) -> Promises {
    let mut made = Vec::new();
    let mut promise = |strength, cpus| {
        let what = format!("{}.service", made.len());
        made.push(Promise { what, cpus, tid: None, strength });
    };
    if dice.one_in(6) {
        promise(Strength::Hard, some_cpus(dice, topology, 3));
    }
    if dice.one_in(3) {
        for _ in 0..dice.between(1, 3) {
            let most = dice.one(&[1, 3, 6]);
            promise(Strength::Soft, some_cpus(dice, topology, most));
        }
    }
    let isolated = if dice.one_in(5) { some_cpus(dice, topology, 8) } else { CpuSet::EMPTY };
    Promises { made, isolated }
}

/// The guest's memory: bound to a node or to all, or not bound.
fn any_memory(dice: &mut Dice, nodes: &[NodeId], guest_node: Option<u32>) -> GuestMemory {
    let bound = match dice.between(1, 6) {
        1 => Vec::new(),
        2 => nodes.to_vec(),
        _ => vec![dice.one(nodes)],
    };
    GuestMemory { guest_node, bytes: 1 << 30, bound }
}

pub(super) fn any(dice: &mut Dice) -> Case {
    let topology = any_machine(dice);
    let mut policy = Policy::default();
    if dice.one_in(4) {
        let value = CpuChoice::Cpus(some_cpus(dice, &topology, 3));
        policy.host.reserved = Sourced { value, origin: Origin::Flag { flag: "--test" } };
    }
    let mut neighbours = Neighbours::default();
    if dice.one_in(4) {
        let exclusive = some_cpus(dice, &topology, 4);
        let helpers = topology.online() - exclusive;
        let vm = "101".parse().expect("a name");
        neighbours.push(Neighbour { vm, exclusive, helpers, doubt: None });
    }
    let promises = any_promises(dice, &topology);
    let allowed = dice.one_in(10).then(|| {
        let cpus = some_cpus(dice, &topology, 9);
        Allowed { cpus, why: format!("100.scope allows only {cpus}") }
    });
    let (vcpus, threads) = (dice.between(1, 6), dice.one(&[1, 1, 2]));
    let guest_nodes = if vcpus > threads && dice.one_in(5) { 2 } else { 0 };
    let [vcpus, threads] = [vcpus, threads].map(|number| u32::try_from(number).expect("small"));
    let mut guest = guests::guest(vcpus, threads, guest_nodes, &[]);
    let nodes: Vec<NodeId> = topology.nodes.iter().map(|node| node.node).collect();
    let mut memory_on = BTreeMap::new();
    if nodes.len() > 1 && dice.one_in(2) {
        let of: &[Option<u32>] = if guest_nodes == 0 { &[None] } else { &[Some(0), Some(1)] };
        guest.memory = of.iter().map(|of| any_memory(dice, &nodes, *of)).collect();
        if dice.one_in(3) {
            guest.memory.iter_mut().for_each(|piece| piece.bound.clear());
            let bytes = |dice: &mut Dice| dice.between(0, 8) as u64 * (128 << 20);
            memory_on = nodes.iter().map(|node| (*node, bytes(dice))).collect();
        }
    }
    let surroundings = Surroundings { allowed, promises, memory_on, ..Surroundings::default() };
    Case { topology, guest, policy, neighbours, surroundings }
}
