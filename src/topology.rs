//! The host's CPUs as qmpin sees them: `Topology → Node → Llc → Core → Cpu`. A word, not a reader:
//! `discover::topology` fills it from sysfs, the planner and the picture read it.
//!
//! What the kernel does not say is `None` here, never a guess. Only online CPUs belong to cores,
//! LLC groups and nodes; an offline CPU is listed in `cpus` alone, because the kernel removes its
//! topology files.

use serde::{Serialize, Serializer};

use crate::cpuset::CpuSet;
use crate::ids::{CoreId, CpuId, LlcId, NodeId};

/// What kind of core a CPU belongs to on a hybrid machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreKind {
    /// A fast core (Intel P-core, the larger `cpu_capacity` on Arm).
    Performance,
    /// A small core.
    Efficiency,
}

/// One hardware thread.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// Whether the kernel schedules on it now.
    pub online: bool,
    /// `physical_package_id`.
    pub package: Option<u32>,
    /// `die_id`, within its package.
    pub die: Option<u32>,
    /// The NUMA node it belongs to.
    pub node: Option<NodeId>,
    /// The LLC group it belongs to.
    pub llc: Option<LlcId>,
    /// The core it belongs to.
    pub core: Option<CoreId>,
    /// The online CPUs of its core, itself included. Empty where the kernel says nothing.
    pub siblings: CpuSet,
    /// The kind of core, on hybrid machines.
    pub kind: Option<CoreKind>,
}

/// A core: one or more SMT siblings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Core {
    /// Its dense id.
    pub id: CoreId,
    /// Its online CPUs.
    pub cpus: CpuSet,
    /// The LLC group it belongs to.
    pub llc: Option<LlcId>,
    /// The NUMA node it belongs to.
    pub node: Option<NodeId>,
    /// `physical_package_id`.
    pub package: Option<u32>,
    /// `die_id`, within its package.
    pub die: Option<u32>,
    /// The kind of core, on hybrid machines.
    pub kind: Option<CoreKind>,
    /// How much the processor prefers it: a larger number is better. It may change while the machine runs.
    pub rank: Option<u32>,
}

/// The CPUs that share a last-level cache.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Llc {
    /// Its dense id.
    pub llc: LlcId,
    /// The online CPUs that share it.
    pub cpus: CpuSet,
    /// How large it is.
    pub size_bytes: Option<u64>,
}

/// A NUMA node. It may have no CPUs (memory only) or no memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Node {
    /// Its number.
    pub node: NodeId,
    /// Its online CPUs.
    pub cpus: CpuSet,
    /// How much memory it has.
    pub memory_bytes: Option<u64>,
    /// The distance to each online node, in the order of their numbers; 10 is itself. None: the kernel does not say.
    #[serde(serialize_with = "null_if_empty")]
    pub distances: Vec<u32>,
}

fn null_if_empty<S: Serializer>(distances: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    Some(distances).filter(|distances| !distances.is_empty()).serialize(serializer)
}

/// Something the kernel did not say, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unknown {
    /// What is not known, such as `the LLC of CPU 3`.
    pub what: String,
    /// Why, such as `could not read …: No such file or directory`.
    pub reason: String,
}

/// The whole machine. `cpus` is ascending by number, `cores` and `llcs` by their dense ids,
/// `nodes` by number.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Topology {
    /// Every CPU the kernel calls present, offline ones included.
    pub cpus: Vec<Cpu>,
    /// Every core with an online CPU.
    pub cores: Vec<Core>,
    /// Every LLC group with an online CPU.
    pub llcs: Vec<Llc>,
    /// Every online NUMA node.
    pub nodes: Vec<Node>,
    /// What could not be learnt.
    pub unknown: Vec<Unknown>,
}

impl Topology {
    /// All online CPUs.
    #[must_use]
    pub fn online(&self) -> CpuSet {
        self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.id).collect()
    }

    /// The CPU of that number, if it is present.
    #[must_use]
    pub fn cpu(&self, id: CpuId) -> Option<&Cpu> {
        // Without holes in the numbers, a CPU's place is its number.
        let there = self.cpus.get(id.index()).filter(|cpu| cpu.id == id);
        there.or_else(|| {
            self.cpus.binary_search_by_key(&id, |cpu| cpu.id).ok().map(|at| &self.cpus[at])
        })
    }

    /// The core a CPU belongs to.
    #[must_use]
    pub fn core_of(&self, id: CpuId) -> Option<&Core> {
        self.cpu(id)?.core.and_then(|core| self.cores.get(core.0 as usize))
    }

    /// The NUMA distance between two nodes, where the kernel says it.
    #[must_use]
    pub fn distance(&self, from: NodeId, to: NodeId) -> Option<u32> {
        let at = self.nodes.iter().position(|node| node.node == to)?;
        self.nodes.iter().find(|node| node.node == from)?.distances.get(at).copied()
    }
}
