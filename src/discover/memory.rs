//! Where memory is: which nodes have some, and how a VM's is spread over them.

use std::collections::BTreeMap;

use super::cgroup;
use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::ids::{NodeId, Pid};
use crate::sysroot::SysRoot;

/// What of `memory.numa_stat` is a guest's memory: of its own, of a file, and shared
/// (`Documentation/admin-guide/cgroup-v2.rst`). `shmem` is a part of `file`.
const KINDS: [&str; 2] = ["anon", "file"];
/// Huge pages are counted apart, each size in a file of its own.
const HUGE: [&str; 2] = ["hugetlb.2MB.numa_stat", "hugetlb.1GB.numa_stat"];

/// Whether all memory is on one node, so that nothing depends on where it is.
pub(crate) fn has_one_node(root: &SysRoot) -> bool {
    let nodes = root.read("sys/devices/system/node/has_memory").unwrap_or_default();
    // Node numbers are written as CPU numbers are.
    CpuSet::parse_cpulist(nodes.trim()).is_ok_and(|nodes| nodes.len() < 2)
}

/// How many bytes of the VM's memory are on each node, by its own cgroup; empty where that cannot be known. `numa_maps`
/// says more, and takes the longer the larger the VM is, with its address space locked.
pub(crate) fn by_node(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    process: Pid,
) -> BTreeMap<NodeId, u64> {
    let mut found = BTreeMap::new();
    if has_one_node(root) {
        return found;
    }
    let Some(group) = cgroup::own_cgroup(root, cgroups, process) else { return found };
    let read = |file: &str| cgroups.read(&format!("{group}/{file}")).unwrap_or_default();
    let normal = read("memory.numa_stat");
    let normal =
        normal.lines().filter(|line| KINDS.contains(&line.split(' ').next().unwrap_or("")));
    let huge: Vec<String> = HUGE.iter().map(|file| read(file)).collect();
    let huge = huge.iter().flat_map(|text| text.lines()).filter(|line| line.starts_with("total="));
    for part in normal.chain(huge).flat_map(str::split_ascii_whitespace) {
        if let Some((node, bytes)) = part.split_once('=')
            && let Some(node) = node.strip_prefix('N').and_then(|node| node.parse().ok())
            && let Ok(bytes) = bytes.parse::<u64>()
        {
            let sum: &mut u64 = found.entry(NodeId(node)).or_default();
            *sum = sum.saturating_add(bytes);
        }
    }
    found
}

/// How much of a VM's memory is in transparent huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HugeShare {
    /// Its anonymous memory, in bytes; huge pages that were reserved are not in it.
    pub anon: u64,
    /// What of it is in huge pages, in bytes.
    pub huge: u64,
}

/// Returns how much of the VM's memory is in transparent huge pages, by its own cgroup. `smaps` has more, and takes
/// the longer the larger the VM is.
pub(crate) fn huge_share(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Option<HugeShare> {
    let group = cgroup::own_cgroup(root, cgroups, process)?;
    let text = cgroups.read(&format!("{group}/memory.stat")).ok()?;
    let value = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
    };
    Some(HugeShare { anon: value("anon")?, huge: value("anon_thp")? })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cgroups::CgroupTree;

    fn host(nodes: &str, files: &[(&str, &str)]) -> BTreeMap<u32, u64> {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("a file");
        };
        write("sys/devices/system/node/has_memory", nodes);
        write("proc/500/cgroup", "0::/qemu.slice/100.scope\n");
        write("sys/fs/cgroup/qemu.slice/100.scope/cgroup.procs", "500\n");
        for (file, text) in files {
            write(&format!("sys/fs/cgroup/qemu.slice/100.scope/{file}"), text);
        }
        let root = SysRoot::at(dir.path());
        let found = by_node(&root, &CgroupTree::of(&root), Pid(500));
        found.into_iter().map(|(node, bytes)| (node.0, bytes)).collect()
    }

    #[test]
    fn all_kinds_of_a_guests_memory_are_counted_once() {
        let normal =
            "anon N0=1000 N1=0\nfile N0=20 N1=300\nkernel_stack N0=7 N1=7\nshmem N0=20 N1=300\n";
        let huge = "total=4194304 N0=0 N1=4194304\nhierarchical_total=4194304 N0=0 N1=4194304\n";
        let files = [("memory.numa_stat", normal), ("hugetlb.2MB.numa_stat", huge)];
        assert_eq!(host("0-1\n", &files), BTreeMap::from([(0, 1020), (1, 4_194_604)]));
    }

    #[test]
    fn what_cannot_be_read_or_makes_no_difference_is_not_known() {
        assert_eq!(host("0\n", &[("memory.numa_stat", "anon N0=1000\n")]), BTreeMap::new());
        assert_eq!(host("0-1\n", &[]), BTreeMap::new());
        let garbled = "anon N0=many N=5 Nx=1 N1\nanonymous N0=3\n\nanon\n";
        assert_eq!(host("0-1\n", &[("memory.numa_stat", garbled)]), BTreeMap::new());
    }

    #[test]
    fn huge_pages_are_counted_by_the_cgroup() {
        let tree = |stat: &str| {
            let dir = tempfile::tempdir().expect("a folder");
            for (path, text) in [
                ("proc/500/cgroup", "0::/qemu.slice/100.scope\n"),
                ("sys/fs/cgroup/qemu.slice/100.scope/cgroup.procs", "500\n"),
                ("sys/fs/cgroup/qemu.slice/100.scope/memory.stat", stat),
            ] {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
                fs::write(path, text).expect("a file");
            }
            let root = SysRoot::at(dir.path());
            huge_share(&root, &CgroupTree::of(&root), Pid(500))
        };
        let share = Some(HugeShare { anon: 4_194_304, huge: 2_097_152 });
        assert_eq!(tree("anon 4194304\nfile 7\nanon_thp 2097152\n"), share);
        assert_eq!(tree("anon 4194304\n"), None, "an older kernel");
    }
}
