//! `ksm`: whether the kernel merges equal pages of guests (`Documentation/admin-guide/mm/ksm.rst`). That saves memory,
//! and a guest that writes to a merged page waits for a copy.

use super::advice::{Advice, costs, fine, info, unknown};
use super::facts::VmFacts;
use super::read::{line, number};
use crate::sysroot::SysRoot;

const CHECK: &str = "ksm";
const RUN: &str = "sys/kernel/mm/ksm/run";
const MIB: u64 = 1 << 20;

/// Judges whether the kernel scans for equal pages, and whether it has merged pages of this VM.
pub(super) fn advice(root: &SysRoot, vm: Option<&VmFacts<'_>>) -> Vec<Advice> {
    let mut found = vec![of_host(root)];
    found.extend(vm.and_then(|vm| of_vm(root, vm)));
    found
}

fn of_host(root: &SysRoot) -> Advice {
    let run = match number(root, RUN) {
        Ok(run) => run,
        Err(why) => return unknown(CHECK, format!("not known: {why}")),
    };
    if run != 1 {
        return fine(CHECK, "the kernel does not look for equal pages");
    }
    let file = |name: &str| number(root, &format!("sys/kernel/mm/ksm/{name}"));
    let pace = match (file("pages_to_scan"), file("sleep_millisecs")) {
        (Ok(pages), Ok(ms)) => format!(", {pages} pages every {ms} ms"),
        _ => String::new(),
    };
    let scans = format!(
        "the kernel looks for equal pages of guests{pace}; a write to a merged page takes a copy"
    );
    let mend = "systemctl disable --now ksmtuned; echo 0 >/sys/kernel/mm/ksm/run".to_owned();
    // Both have to be known: the host needs the memory that merging has saved when merging ends.
    match (file("general_profit"), line(root, "proc/meminfo", "MemAvailable")) {
        (Ok(saved), Ok(available)) if saved / 1024 < available / 2 => costs(
            CHECK,
            format!(
                "{scans}; it saves {} MiB, and {} MiB are available without; pages that are merged stay so (echo 2 \
                 copies them all)",
                saved / MIB,
                available >> 10
            ),
            Some(mend),
        ),
        (Ok(saved), Ok(available)) => info(
            CHECK,
            format!(
                "{scans}; it saves {} MiB, and only {} MiB are available without: ending it loses memory that the host \
                 may need",
                saved / MIB,
                available >> 10
            ),
            None,
        ),
        _ => info(
            CHECK,
            format!(
                "{scans}; how much memory it saves is not known, and ending it loses that memory"
            ),
            None,
        ),
    }
}

/// Judges the pages of this VM; `None`: there is nothing to say beside the host's.
fn of_vm(root: &SysRoot, vm: &VmFacts<'_>) -> Option<Advice> {
    let merged = line(root, &format!("proc/{}/ksm_stat", vm.process), "ksm_merging_pages").ok()?;
    if merged == 0 {
        return None;
    }
    let name = vm.vm;
    let reason = format!(
        "{merged} pages of VM {name} are merged with others: each first write to one takes a copy"
    );
    let Some(config) = &vm.config else { return Some(info(CHECK, reason, None)) };
    if config.as_ref().is_ok_and(|config| config.line("allow-ksm") == Some("0")) {
        let reason = format!("{reason}; allow-ksm: 0 counts from its next start on");
        return Some(costs(CHECK, reason, Some(format!("qm shutdown {name} && qm start {name}"))));
    }
    let reason = format!(
        "{reason}; allow-ksm 0 (qemu-server 9.0.27) excludes this VM from its next start on, and loses the memory that \
         these pages save"
    );
    Some(info(CHECK, reason, Some(format!("qm set {name} --allow-ksm 0"))))
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{Tree, World};
    use super::*;

    fn files(run: &str, profit: Option<&str>, available: u64) -> Tree {
        let meminfo = format!("MemAvailable: {available} kB\n");
        let mut files = vec![
            (RUN, run),
            ("sys/kernel/mm/ksm/pages_to_scan", "1250\n"),
            ("sys/kernel/mm/ksm/sleep_millisecs", "10\n"),
            ("proc/meminfo", meminfo.as_str()),
            ("proc/500/ksm_stat", "ksm_rmap_items 9\nksm_merging_pages 300\n"),
        ];
        files.extend(profit.map(|profit| ("sys/kernel/mm/ksm/general_profit", profit)));
        Tree::new(&files)
    }

    #[test]
    fn merging_is_to_be_ended_only_where_the_memory_is_there() {
        let saved = Some("1073741824\n");
        for (run, profit, available, severity) in [
            ("0\n", saved, 9 << 20, Severity::Fine),
            ("2\n", saved, 9 << 20, Severity::Fine),
            ("1\n", saved, 9 << 20, Severity::Costs),
            ("1\n", saved, 1 << 20, Severity::Info),
            ("1\n", None, 9 << 20, Severity::Info),
            ("on\n", saved, 9 << 20, Severity::Unknown),
        ] {
            let found = of_host(&files(run, profit, available).root());
            assert_eq!(found.severity, severity, "{run}{available}: {found:?}");
            assert_eq!(found.mend.is_some(), severity == Severity::Costs, "{found:?}");
        }
        let found = of_host(&files("1\n", saved, 9 << 20).root());
        for words in ["1250 pages every 10 ms", "saves 1024 MiB", "9216 MiB are available"] {
            assert!(found.reason.contains(words), "{words}: {}", found.reason);
        }
        assert!(
            found.mend.is_some_and(|mend| mend.starts_with("systemctl disable --now ksmtuned"))
        );
        assert_eq!(of_host(&Tree::new(&[]).root()).severity, Severity::Unknown);
    }

    #[test]
    fn pages_of_the_vm_are_counted_and_the_vm_alone_can_be_excluded() {
        let (world, tree) = (World::flat(4), files("0\n", None, 1));
        let of = |config: Option<&str>| world.vm(4, config, |vm| of_vm(&tree.root(), vm));
        let merged = of(Some("cores: 4\n")).expect("300 pages");
        assert_eq!(merged.severity, Severity::Info);
        assert!(merged.reason.starts_with("300 pages of VM 100"), "{}", merged.reason);
        assert_eq!(merged.mend.as_deref(), Some("qm set 100 --allow-ksm 0"));
        let later = of(Some("allow-ksm: 0\n")).expect("300 pages");
        assert_eq!(later.mend.as_deref(), Some("qm shutdown 100 && qm start 100"));
        assert_eq!(of(None).expect("300 pages").mend, None, "not Proxmox's");
        let none = Tree::new(&[("proc/500/ksm_stat", "ksm_merging_pages 0\n")]);
        assert_eq!(world.vm(4, None, |vm| of_vm(&none.root(), vm)), None);
        assert_eq!(world.vm(4, None, |vm| of_vm(&Tree::new(&[]).root(), vm)), None);
    }
}
