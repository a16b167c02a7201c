//! Where the guest's memory was bound: the reply to `query-memdev` (`MemoryList` in qapi/machine.json).

use serde::Deserialize;

use super::wire::Pending;
use crate::ids::NodeId;

/// The most backends, and the most nodes of one, that are read.
const BACKENDS_MAX: usize = 256;
const NODES_MAX: usize = 1024;

/// A piece of the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The guest's node, where the id says it as Proxmox and libvirt write it: `ram-node1`.
    pub guest_node: Option<u32>,
    /// Its size.
    pub bytes: u64,
    /// The host's nodes that it was bound to; none: the kernel chooses.
    pub on: Vec<NodeId>,
}

/// The members of a `Memdev` that matter.
#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    id: Option<String>,
    size: u64,
    #[serde(rename = "host-nodes", default)]
    host_nodes: Vec<u32>,
    #[serde(default)]
    policy: String,
}

/// Reads the reply. One that cannot be used says nothing: a plan can do without.
pub(super) fn read(answer: Pending) -> Vec<Backend> {
    let rows: Vec<Row> = match answer.read() {
        Ok(rows) => rows,
        Err(error) => {
            tracing::debug!("where the guest's memory is bound is not known: {error}");
            return Vec::new();
        }
    };
    if rows.len() > BACKENDS_MAX {
        tracing::debug!("where the guest's memory is bound is not known: {} pieces", rows.len());
        return Vec::new();
    }
    rows.into_iter().map(backend).collect()
}

fn backend(row: Row) -> Backend {
    let is_bound = ["bind", "preferred", "interleave"].contains(&row.policy.as_str());
    let nodes = row.host_nodes.into_iter().take(NODES_MAX).map(NodeId);
    Backend {
        guest_node: row.id.as_deref().and_then(|id| id.strip_prefix("ram-node")?.parse().ok()),
        bytes: row.size,
        on: if is_bound { nodes.collect() } else { Vec::new() },
    }
}
