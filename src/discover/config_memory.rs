//! What a VM's Proxmox configuration says of its memory: how much, and on which nodes (`PVE/QemuServer/Memory.pm`).

use std::collections::{BTreeMap, BTreeSet};

use super::proxmox_config::is_numbered;
use crate::ids::NodeId;

/// The most vCPUs that a configuration may declare: a larger number in the file is an error.
pub(crate) const VCPUS_MAX: u32 = 4096;
/// What Proxmox gives a VM without `memory`, in MiB.
const MEMORY_MIB_DEFAULT: u64 = 512;

/// A `numaN` line: a node of the guest.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConfigNode {
    /// Which node.
    pub number: u32,
    /// The indices of its vCPUs; empty where the line has none.
    pub vcpus: BTreeSet<u32>,
    /// Its memory, in MiB; 0 where the line has none.
    pub memory_mib: u64,
    /// The nodes of the host that its memory is bound to; empty: the kernel chooses.
    pub on: BTreeSet<NodeId>,
}

/// Reads the `numaN` lines, by their numbers.
///
/// # Errors
/// The line that is not understood.
pub fn config_nodes(lines: &BTreeMap<String, String>) -> Result<Vec<ConfigNode>, String> {
    let mut nodes = Vec::new();
    for (key, text) in lines.iter().filter(|(key, _)| is_numbered(key, "numa")) {
        let wrong = || format!("{key}: {text} is not understood");
        let number = key.trim_start_matches("numa").parse().map_err(|_| wrong())?;
        let mut node = ConfigNode { number, ..ConfigNode::default() };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("cpus", list)) => node.vcpus = numbers(list).ok_or_else(wrong)?,
                Some(("memory", mib)) => node.memory_mib = mib.parse().map_err(|_| wrong())?,
                Some(("hostnodes", list)) => {
                    node.on = numbers(list).ok_or_else(wrong)?.into_iter().map(NodeId).collect();
                }
                _ => {}
            }
        }
        nodes.push(node);
    }
    nodes.sort_by_key(|node| node.number);
    Ok(nodes)
}

/// How much memory the VM has, in MiB.
///
/// # Errors
/// The line, where it has no number.
pub fn memory_mib(lines: &BTreeMap<String, String>) -> Result<u64, String> {
    let Some(text) = lines.get("memory") else { return Ok(MEMORY_MIB_DEFAULT) };
    let number = text.split(',').next().unwrap_or(text);
    let number = number.strip_prefix("current=").unwrap_or(number);
    number.parse().map_err(|_| format!("memory: {text} is no number of MiB"))
}

/// Proxmox's lists: `0-3;8`, ranges with semicolons between them.
fn numbers(list: &str) -> Option<BTreeSet<u32>> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        (from <= to && to < VCPUS_MAX).then_some(from..=to)
    };
    let ranges: Option<Vec<_>> = list.split(';').map(range).collect();
    Some(ranges?.into_iter().flatten().collect())
}

/// Whether the line of a disk gives it an iothread.
#[must_use]
pub fn has_iothread(text: &str) -> bool {
    let value = text.split(',').find_map(|part| part.strip_prefix("iothread="));
    value.is_some_and(|value| ["1", "on", "yes", "true"].contains(&value))
}

#[cfg(test)]
mod tests {
    use super::super::proxmox_config::lines_of;
    use super::*;

    #[test]
    fn a_line_is_understood_or_named() {
        let of = |text: &str| config_nodes(&lines_of(text));
        let text = "numa1: cpus=2;4-5,memory=3072\nnuma0: cpus=0-1,hostnodes=1;3,memory=1024,policy=bind\nnuma: 1\n";
        let nodes = of(text).expect("understood");
        let seen: Vec<_> = nodes.iter().map(|node| (node.number, node.memory_mib)).collect();
        assert_eq!(seen, [(0, 1024), (1, 3072)]);
        assert_eq!(nodes[0].on, BTreeSet::from([NodeId(1), NodeId(3)]));
        assert_eq!(nodes[1].vcpus, BTreeSet::from([2, 4, 5]));
        for bad in
            ["numa0: cpus=3-1", "numa0: cpus=0-9999", "numa0: memory=much", "numa0: hostnodes=x"]
        {
            let error = of(bad).expect_err(bad);
            assert!(error.starts_with("numa0: "), "{error}");
        }
        assert_eq!(of("numatune: x\nnumax: cpus=1\n"), Ok(Vec::new()));
    }

    #[test]
    fn memory_has_a_default_and_two_forms() {
        let of = |text: &str| memory_mib(&lines_of(text));
        assert_eq!(of(""), Ok(512));
        assert_eq!((of("memory: 2048"), of("memory: current=4096,x=1")), (Ok(2048), Ok(4096)));
        assert!(of("memory: lots").is_err_and(|why| why.contains("memory: lots")));
    }

    #[test]
    fn an_iothread_is_said_in_several_words() {
        for yes in ["a:0,iothread=1", "a:0,iothread=on,size=1G", "iothread=true", "a,iothread=yes"]
        {
            assert!(has_iothread(yes), "{yes}");
        }
        for no in ["a:0", "a:0,iothread=0", "a:iothread", "a:0,xiothread=1"] {
            assert!(!has_iothread(no), "{no}");
        }
    }
}
