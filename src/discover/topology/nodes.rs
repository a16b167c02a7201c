//! The NUMA nodes: their CPUs, memory and distances. A node may lack CPUs or memory.

use super::attribute::{Notes, Why};
use super::{PerCpu, attribute};
use crate::cpuset::CpuSet;
use crate::discover::host::numbers_of_folders;
use crate::ids::NodeId;
use crate::sysroot::SysRoot;
use crate::topology::Node;

const NODE: &str = "sys/devices/system/node";

/// The online nodes in the order of their numbers, and the node of each CPU.
pub(super) fn read_nodes(
    root: &SysRoot,
    online: &CpuSet,
    notes: &mut Notes,
) -> (Vec<Node>, PerCpu<NodeId>) {
    let mut node_of = PerCpu::none();
    // A node list is written as a cpulist is, and no kernel has more than 1024 nodes.
    let numbers = match attribute::cpulist(root, &format!("{NODE}/online")) {
        Err(why) if why.absent => numbers_of_folders(root, NODE, "node").ok_or(why),
        numbers => numbers,
    };
    let Some(numbers) = notes.value_of(|| "the NUMA nodes".to_owned(), numbers) else {
        return (Vec::new(), node_of);
    };
    let mut nodes: Vec<Node> = Vec::with_capacity(numbers.len());
    let (mut known, mut twice, mut garbled) = (CpuSet::EMPTY, CpuSet::EMPTY, false);
    for number in numbers.iter() {
        let of_node = format!("{NODE}/node{number}");
        let cpus = attribute::cpulist(root, &format!("{of_node}/cpulist"));
        let cpus = notes.value_of(|| format!("the CPUs of node {number}"), cpus);
        let memory = attribute::parsed(root, &format!("{of_node}/meminfo"), parse_memory_bytes);
        let distances = read_distances(root, &format!("{of_node}/distance"), numbers.len());

        garbled |= cpus.is_none();
        let cpus = cpus.unwrap_or_default();
        if !cpus.is_subset(online) {
            let why = Why::new(format!("it lists CPUs {}, which are offline", cpus - *online));
            notes.add(format!("the CPUs of node {number}"), why);
        }
        let cpus = cpus & *online;
        twice |= cpus & known;
        known |= cpus;
        let Some(number) = u32::try_from(number.index()).ok().map(NodeId) else { continue };
        node_of.set(&cpus, Some(number));
        nodes.push(Node {
            node: number,
            cpus,
            memory_bytes: notes.value_of(|| format!("the memory of node {number}"), memory),
            distances: notes
                .value_of(|| format!("the distances of node {number}"), distances)
                .unwrap_or_default(),
        });
    }
    if !twice.is_empty() {
        notes.add_cpus("the node", &twice, Why::new(format!("two nodes list CPUs {twice}")));
        node_of.set(&twice, None);
        for node in &mut nodes {
            node.cpus -= twice;
        }
    }
    let nowhere = *online - known;
    if !nowhere.is_empty() && !garbled {
        let why = format!("no online node lists CPUs {nowhere}");
        notes.add_cpus("the node", &nowhere, Why::new(why));
    }
    (nodes, node_of)
}

/// `Node 0 MemTotal:  65777236 kB`, the first line of `nodeN/meminfo` (`drivers/base/node.c`).
fn parse_memory_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains("MemTotal:"))?;
    let (_, amount) = line.split_once("MemTotal:")?;
    let kib: u64 = amount.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// One distance for each online node, 10 being the node itself.
fn read_distances(root: &SysRoot, relative: &str, nodes: usize) -> Result<Vec<u32>, Why> {
    attribute::parsed(root, relative, |text| {
        let distances: Option<Vec<u32>> =
            text.split_ascii_whitespace().map(|distance| distance.parse().ok()).collect();
        distances.filter(|distances| distances.len() == nodes)
    })
}
