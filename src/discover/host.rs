//! Small facts about the host that are read again and again.

use super::doubt::{Doubt, doubt_of};
use super::{DiscoverError, FirstWay, is_alive, lives};
use crate::cpuset::CpuSet;
use crate::error::chain;
use crate::ids::{CpuId, VmName};
use crate::leases::{Lease, StateDir};
use crate::sched::Sched;
use crate::scheduling::Throttling;
use crate::sysroot::{ReadError, SysRoot};

/// The kernel's id of this boot (`/proc/sys/kernel/random/boot_id`).
///
/// # Errors
/// [`ReadError`].
pub fn boot_id(root: &SysRoot) -> Result<String, ReadError> {
    Ok(root.read("proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The CPUs that are online now. One small file: cheap enough for every pass.
///
/// # Errors
/// [`DiscoverError`] where the file cannot be read or understood.
pub fn online_cpus(root: &SysRoot) -> Result<CpuSet, DiscoverError> {
    const PATH: &str = "sys/devices/system/cpu/online";
    let text = match root.read_attribute(PATH) {
        Err(error) if error.is_absent() => {
            return online_by_folders(root).ok_or(DiscoverError::OnlineUnreadable(error));
        }
        text => text.map_err(DiscoverError::OnlineUnreadable)?,
    };
    CpuSet::parse_cpulist(text.trim_end_matches('\0'))
        .map_err(|source| DiscoverError::OnlineGarbled { path: root.root().join(PATH), source })
}

/// The CPUs with a folder that does not say they are offline: captures may lack the list, and a CPU that can never go
/// offline has no file for that (`Documentation/core-api/cpu_hotplug.rst`).
fn online_by_folders(root: &SysRoot) -> Option<CpuSet> {
    const CPU: &str = "sys/devices/system/cpu";
    let all = numbers_of_folders(root, CPU, "cpu")?;
    let is_online = |cpu: &CpuId| {
        let text = root.read_attribute(&format!("{CPU}/cpu{cpu}/online"));
        text.map_or_else(|error| error.is_absent(), |text| text.trim() != "0")
    };
    let online: CpuSet = all.iter().filter(is_online).collect();
    (!online.is_empty()).then_some(online)
}

/// The numbers of the folders with this name and a number, such as `cpu12` or `node1`; `None`: there is none.
pub(super) fn numbers_of_folders(root: &SysRoot, folder: &str, name: &str) -> Option<CpuSet> {
    let names = root.folder(folder).and_then(|folder| folder.names()).ok()?;
    let number = |found: &String| {
        let digits = found.strip_prefix(name)?;
        CpuId::from_index(digits.parse().ok()?)
    };
    let numbers: CpuSet = names.iter().filter_map(number).collect();
    (!numbers.is_empty()).then_some(numbers)
}

/// Every CPU that there is, those that are offline as well; where the kernel does not say, those that are
/// online.
#[must_use]
pub fn present_cpus(root: &SysRoot) -> CpuSet {
    let present = root.read("sys/devices/system/cpu/present").ok();
    let present = present.and_then(|text| CpuSet::parse_cpulist(&text).ok());
    present.unwrap_or_default() | online_cpus(root).unwrap_or_default()
}

/// The CPUs that `isolcpus=` takes from the scheduler's domains, and so from every process that does not ask for them
/// (`kernel/sched/isolation.c`, `drivers/base/cpu.c`). Kernels may show those of partitions in the same file.
#[must_use]
pub fn isolcpus(root: &SysRoot) -> CpuSet {
    let line = root.read_lossy("proc/cmdline").unwrap_or_default();
    if !line.split_ascii_whitespace().any(|word| word.starts_with("isolcpus=")) {
        return CpuSet::EMPTY;
    }
    let text = root.read_lossy("sys/devices/system/cpu/isolated").unwrap_or_default();
    CpuSet::parse_cpulist(text.trim()).unwrap_or_default()
}

/// Whether the kernel keeps some time for others beside real-time threads. Where it does not say, it
/// does: that is its default.
#[must_use]
pub fn rt_throttling(root: &SysRoot) -> Throttling {
    match root.read("proc/sys/kernel/sched_rt_runtime_us") {
        Ok(text) if text.trim() == "-1" => Throttling::Off,
        _ => Throttling::On,
    }
}

/// Every lease that can be read. Those that cannot are in [`doubts`].
#[must_use]
pub fn all_leases(state: &StateDir) -> Vec<Lease> {
    vms(state).iter().filter_map(|vm| state.lease(vm).ok().flatten()).collect()
}

fn vms(state: &StateDir) -> Vec<VmName> {
    state.vms().unwrap_or_else(|error| {
        tracing::warn!("{}", chain(&error));
        Vec::new()
    })
}

/// The leases whose QEMU lives, and those that cannot be read, of which a warning comes once, and again when the
/// file changes. Each file is read once.
#[must_use]
pub fn live_leases_and_doubts(
    root: &SysRoot,
    sched: &dyn Sched,
    state: &StateDir,
    boot_id: &str,
) -> (Vec<Lease>, Vec<Doubt>) {
    let (mut leases, mut doubts) = (Vec::new(), Vec::new());
    for vm in vms(state) {
        match state.lease(&vm) {
            Ok(lease) => leases.extend(lease),
            Err(error) => doubts.extend(doubt_of(root, sched, state, &vm, &error, boot_id)),
        }
    }
    leases.retain(|lease| lease.boot_id == boot_id && lives(root, lease.qemu).unwrap_or(true));
    for doubt in doubts.iter().filter(|doubt| state.is_news(&doubt.vm)) {
        tracing::warn!("{doubt}");
    }
    (leases, doubts)
}

/// Every lease that cannot be read, of a VM that may live.
#[must_use]
pub fn doubts(root: &SysRoot, sched: &dyn Sched, state: &StateDir, boot_id: &str) -> Vec<Doubt> {
    let of = |vm: &VmName| doubt_of(root, sched, state, vm, &state.lease(vm).err()?, boot_id);
    vms(state).iter().filter_map(of).collect()
}

/// The leases whose QEMU lives. One of which that cannot be learnt is taken to live.
#[must_use]
pub fn live_leases(root: &SysRoot, state: &StateDir, boot_id: &str) -> Vec<Lease> {
    let mut leases = all_leases(state);
    leases.retain(|lease| lease.boot_id == boot_id && lives(root, lease.qemu).unwrap_or(true));
    leases
}

/// Which way a command that only looks should ask: a supervisor holds the VM's own socket, so beside
/// one it is a lease.
#[must_use]
pub fn way_beside_supervisor(root: &SysRoot, state: &StateDir, vm: &VmName) -> FirstWay {
    let supervisor = state.lease(vm).ok().flatten().and_then(|lease| lease.supervisor);
    match supervisor {
        Some(process) if is_alive(root, process) => FirstWay::Lease,
        _ => FirstWay::Best,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_minus_one_is_no_throttling() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = SysRoot::at(dir.path());
        assert_eq!(rt_throttling(&root), Throttling::On, "a kernel that says nothing");
        let folder = dir.path().join("proc/sys/kernel");
        std::fs::create_dir_all(&folder).expect("a folder");
        for (text, throttling) in [("950000\n", Throttling::On), ("-1\n", Throttling::Off)] {
            std::fs::write(folder.join("sched_rt_runtime_us"), text).expect("a file");
            assert_eq!(rt_throttling(&root), throttling, "{text}");
        }
    }
}
