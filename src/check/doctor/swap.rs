//! `swap`: whether the guest's memory is on a disk.

use super::advice::{Advice, costs, fine, info, unknown};
use super::read::{line, number};
use crate::ids::{Pid, VmName};
use crate::sysroot::SysRoot;

const CHECK: &str = "swap";
const MEMINFO: &str = "proc/meminfo";
const SWAPPINESS: &str = "proc/sys/vm/swappiness";
/// From here on the kernel hardly swaps while there is file cache to drop.
const LOW_SWAPPINESS: u64 = 10;

/// Judges the host's swap, and how much of the VM is in it.
pub(super) fn advice(root: &SysRoot, vm: Option<(&VmName, Pid)>) -> Vec<Advice> {
    let mut found = vec![of_host(root)];
    found.extend(vm.map(|(vm, process)| of_vm(root, vm, process)));
    found
}

fn of_host(root: &SysRoot) -> Advice {
    let (total, free) = match (line(root, MEMINFO, "SwapTotal"), line(root, MEMINFO, "SwapFree")) {
        (Ok(total), Ok(free)) => (total, free),
        (Err(why), _) | (_, Err(why)) => return unknown(CHECK, format!("not known: {why}")),
    };
    if total == 0 {
        return fine(CHECK, "the host has no swap");
    }
    let used = total.saturating_sub(free) >> 10;
    let total = total >> 10;
    match number(root, SWAPPINESS) {
        Ok(swappiness) if used > 0 && swappiness > LOW_SWAPPINESS => info(
            CHECK,
            format!(
                "{used} of {total} MiB of the host's swap are in use, and vm.swappiness = {swappiness} swaps guests' \
                 memory before file cache is dropped; a page that comes back takes 0.1 to 10 ms; at 1 the host loses \
                 file cache first"
            ),
            Some("sysctl vm.swappiness=1".to_owned()),
        ),
        _ => fine(CHECK, format!("{used} of {total} MiB of the host's swap are in use")),
    }
}

fn of_vm(root: &SysRoot, vm: &VmName, process: Pid) -> Advice {
    let swapped = match line(root, &format!("proc/{process}/status"), "VmSwap") {
        Ok(swapped) => swapped,
        Err(why) => return unknown(CHECK, format!("VM {vm}: not known: {why}")),
    };
    if swapped == 0 {
        return fine(CHECK, format!("no memory of VM {vm} is in swap"));
    }
    let mib = swapped.div_ceil(1 << 10);
    let reason = format!(
        "{mib} MiB of VM {vm} are in swap: a vCPU that touches one of these pages stops for 0.1 to 10 ms"
    );
    // All of the swap is read back, not that of this VM alone.
    let read = || {
        let used =
            line(root, MEMINFO, "SwapTotal")?.saturating_sub(line(root, MEMINFO, "SwapFree")?);
        Ok::<_, String>((used, line(root, MEMINFO, "MemAvailable")?))
    };
    match read() {
        Ok((used, available)) if used < available => {
            let reason = format!(
                "{reason}; {} MiB are available for the {} MiB in swap; reading them back loads the disk meanwhile",
                available >> 10,
                used >> 10
            );
            costs(CHECK, reason, Some("swapoff -a && swapon -a".to_owned()))
        }
        Ok((used, available)) => {
            let reason = format!(
                "{reason}; {} MiB are available, too few for the {} MiB in swap: give VMs less memory",
                available >> 10,
                used >> 10
            );
            costs(CHECK, reason, None)
        }
        Err(why) => {
            costs(CHECK, format!("{reason}; whether they fit in memory is not known: {why}"), None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::Tree;
    use super::*;

    fn found(meminfo: &str, swappiness: &str, status: &str) -> Vec<Advice> {
        let tree =
            Tree::new(&[(MEMINFO, meminfo), (SWAPPINESS, swappiness), ("proc/500/status", status)]);
        let vm = "100".parse().expect("a name");
        advice(&tree.root(), Some((&vm, Pid(500))))
    }

    #[test]
    fn memory_of_the_vm_in_swap_costs_and_comes_back_where_it_fits() {
        let meminfo = |available: u64| {
            format!("MemAvailable: {available} kB\nSwapTotal: 8388604 kB\nSwapFree: 7340028 kB\n")
        };
        let status = "Name:\tkvm\nVmSwap:\t  524288 kB\n";
        let [host, vm] = &found(&meminfo(4_194_304), "60\n", status)[..] else { panic!("two") };
        assert_eq!(host.severity, Severity::Info);
        assert!(
            host.reason.starts_with("1024 of 8191 MiB") && host.reason.contains("swappiness = 60")
        );
        assert_eq!(host.mend.as_deref(), Some("sysctl vm.swappiness=1"));
        assert_eq!(vm.severity, Severity::Costs);
        assert!(vm.reason.starts_with("512 MiB of VM 100 are in swap"), "{}", vm.reason);
        assert_eq!(vm.mend.as_deref(), Some("swapoff -a && swapon -a"));
        let [_, vm] = &found(&meminfo(1_000_000), "60\n", status)[..] else { panic!("two") };
        assert_eq!((vm.severity, &vm.mend), (Severity::Costs, &None), "it would not fit");
    }

    #[test]
    fn swap_that_is_not_used_is_fine_and_silence_is_unknown() {
        let status = "VmSwap:\t0 kB\n";
        for (meminfo, swappiness, severity) in [
            ("SwapTotal: 0 kB\nSwapFree: 0 kB\n", "60\n", Severity::Fine),
            ("SwapTotal: 100 kB\nSwapFree: 100 kB\n", "60\n", Severity::Fine),
            ("SwapTotal: 9000 kB\nSwapFree: 100 kB\n", "1\n", Severity::Fine),
            ("SwapTotal: 9000 kB\n", "60\n", Severity::Unknown),
        ] {
            let both = found(meminfo, swappiness, status);
            assert_eq!(both[0].severity, severity, "{meminfo}: {both:?}");
            assert_eq!(both[1].severity, Severity::Fine, "{both:?}");
        }
        assert_eq!(found("", "", "Name: kvm\n")[1].severity, Severity::Unknown);
    }
}
