//! `qmpin topology --json`: the schema `qmpin.topology/1`.

use serde::Serialize;

use crate::cpuset::CpuSet;
use crate::ids::{CoreId, CpuId, LlcId, NodeId, VmName};
use crate::render::owners::Owners;
use crate::topology::{CoreKind, Llc, Node, Topology};

/// The topology for programs. CPU sets are cpulist strings; `null` where the kernel says nothing, and
/// so for all fields of an offline CPU. Memory and cache sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct TopologyDocument<'a> {
    schema: &'static str,
    cpus: Vec<CpuEntry<'a>>,
    llcs: &'a [Llc],
    nodes: &'a [Node],
}

#[derive(Clone, Debug, Serialize)]
struct CpuEntry<'a> {
    cpu: CpuId,
    online: bool,
    package: Option<u32>,
    die: Option<u32>,
    node: Option<NodeId>,
    llc: Option<LlcId>,
    core: Option<CoreId>,
    siblings: Option<CpuSet>,
    kind: Option<CoreKind>,
    owner: Option<&'a VmName>,
}

impl<'a> TopologyDocument<'a> {
    /// The document of a machine whose CPUs belong to `owners`.
    #[must_use]
    pub fn new(topology: &'a Topology, owners: &'a Owners) -> TopologyDocument<'a> {
        let cpus = topology.cpus.iter().map(|cpu| CpuEntry {
            cpu: cpu.id,
            online: cpu.online,
            package: cpu.package,
            die: cpu.die,
            node: cpu.node,
            llc: cpu.llc,
            core: cpu.core,
            siblings: Some(cpu.siblings).filter(|siblings| !siblings.is_empty()),
            kind: cpu.kind,
            owner: owners.of(cpu.id),
        });
        TopologyDocument {
            schema: "qmpin.topology/1",
            cpus: cpus.collect(),
            llcs: &topology.llcs,
            nodes: &topology.nodes,
        }
    }
}
