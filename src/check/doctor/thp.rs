//! `huge-pages`: whether a guest's memory is in pages of 2 MiB, and what that costs
//! (`Documentation/admin-guide/mm/transhuge.rst`). QEMU asks for them itself (`MADV_HUGEPAGE`).

use super::advice::{Advice, costs, fine, unknown};
use super::facts::VmFacts;
use super::read::chosen;
use crate::sysroot::SysRoot;

const CHECK: &str = "huge-pages";
const ENABLED: &str = "sys/kernel/mm/transparent_hugepage/enabled";
const DEFRAG: &str = "sys/kernel/mm/transparent_hugepage/defrag";

/// Judges the host's setting, and says how much of the VM's memory is in huge pages now.
pub(super) fn advice(root: &SysRoot, vm: Option<&VmFacts<'_>>) -> Advice {
    if let Some(size) = vm.and_then(|vm| vm.read_config()?.line("hugepages")) {
        let reason = format!(
            "hugepages: {size}: its memory is in huge pages from the start, reserved for it"
        );
        return fine(CHECK, reason);
    }
    let (enabled, defrag) = match (chosen(root, ENABLED), chosen(root, DEFRAG)) {
        (Ok(enabled), Ok(defrag)) => (enabled, defrag),
        (Err(why), _) | (_, Err(why)) => return unknown(CHECK, format!("not known: {why}")),
    };
    let now = vm.map(now).unwrap_or_default();
    if enabled == "never" {
        let reason = format!(
            "transparent huge pages are off: guests' memory is in pages of 4 KiB, and each miss of the TLB walks up to \
             24 entries instead of 19{now}; madvise gives them to QEMU alone, and costs khugepaged's time, and memory \
             where a guest touches little of 2 MiB"
        );
        return costs(CHECK, reason, Some(format!("echo madvise >/{ENABLED}")));
    }
    if defrag == "always" {
        let reason = format!(
            "defrag is always: every program may stop at a page fault until memory is compacted{now}; madvise keeps \
             that to QEMU and others that ask, and others get fewer huge pages"
        );
        return costs(CHECK, reason, Some(format!("echo madvise >/{DEFRAG}")));
    }
    fine(CHECK, format!("transparent huge pages: {enabled}, defrag: {defrag}{now}"))
}

/// How much of the VM's memory is in huge pages, in words; nothing where it is not known.
fn now(vm: &VmFacts<'_>) -> String {
    let Some(share) = vm.huge else { return String::new() };
    format!("; now {} of its {} MiB are in huge pages", share.huge >> 20, share.anon >> 20)
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{Tree, World};
    use super::*;
    use crate::discover::HugeShare;

    fn tree(enabled: &str, defrag: &str) -> Tree {
        Tree::new(&[(ENABLED, enabled), (DEFRAG, defrag)])
    }

    #[test]
    fn never_and_defrag_for_all_cost_and_say_what_the_change_costs() {
        for (enabled, defrag, severity, mend) in [
            ("always [madvise] never\n", "always [madvise] never\n", Severity::Fine, None),
            ("[always] madvise never\n", "always [defer+madvise] never\n", Severity::Fine, None),
            (
                "always madvise [never]\n",
                "[madvise]\n",
                Severity::Costs,
                Some((ENABLED, "khugepaged")),
            ),
            (
                "[always] madvise never\n",
                "[always]\n",
                Severity::Costs,
                Some((DEFRAG, "fewer huge pages")),
            ),
            ("odd\n", "[madvise]\n", Severity::Unknown, None),
        ] {
            let found = advice(&tree(enabled, defrag).root(), None);
            assert_eq!(found.severity, severity, "{enabled}{defrag}: {found:?}");
            assert_eq!(found.mend, mend.map(|(file, _)| format!("echo madvise >/{file}")));
            let price = mend.map_or("", |(_, price)| price);
            assert!(found.reason.contains(price), "{price}: {}", found.reason);
        }
        assert_eq!(advice(&Tree::new(&[]).root(), None).severity, Severity::Unknown);
    }

    #[test]
    fn a_vm_with_hugepages_of_its_own_needs_none_of_it() {
        let world = World::flat(4);
        let tree = tree("always madvise [never]\n", "[always]\n");
        let own = world.vm(4, Some("hugepages: 2\n"), |vm| advice(&tree.root(), Some(&*vm)));
        assert_eq!(own.severity, Severity::Fine, "{own:?}");
        let share = Some(HugeShare { anon: 100 << 20, huge: 60 << 20 });
        let now = world.vm(4, Some("cores: 4\n"), |vm| {
            vm.huge = share;
            advice(&tree.root(), Some(&*vm))
        });
        assert!(now.reason.contains("now 60 of its 100 MiB"), "{}", now.reason);
    }
}
