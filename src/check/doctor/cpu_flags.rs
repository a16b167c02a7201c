//! `cpu-flags`: CPU properties that a VM's configuration has no word for (`PVE/QemuServer/CPUFlags.pm` names those
//! that it has). They are set by `-global`, which keeps the flags that Proxmox itself gives; a second `-cpu` would lose
//! them.

use super::advice::{Advice, costs, fine, info, unknown};
use super::args_line::{self, QemuOption, WhenThere};
use super::cpu_type;
use super::facts::VmFacts;
use super::smp::{self, Shape};
use crate::policy::Level;
use crate::sysroot::SysRoot;

const CHECK: &str = "cpu-flags";
/// CPU types without `topoext` on AMD (target/i386/cpu.c: `no_autoenable_flags`; `PVE/QemuServer/CPUConfig.pm:
/// builtin_models_by_arch`). Types of AMD's own have it, and those of other vendors have no use for it.
const WITHOUT_TOPOEXT: [&str; 8] =
    ["host", "max", "kvm64", "qemu64", "x86-64-v2", "x86-64-v2-AES", "x86-64-v3", "x86-64-v4"];

/// What `cpu-flags` has come to.
#[derive(Debug, Default)]
pub(super) struct Flags {
    /// That siblings are not seen as such, and the option that fixes it.
    pub(super) topoext: Option<Advice>,
    pub(super) option: Option<QemuOption>,
    /// All else, with nothing for the common line.
    pub(super) others: Vec<Advice>,
}

/// Judges the CPU of a Proxmox VM, which has that shape from its next start on. Other architectures have no such
/// properties.
pub(super) fn flags(root: &SysRoot, vm: &VmFacts<'_>, shape: Option<Shape>) -> Option<Flags> {
    let only = |advice| Some(Flags { others: vec![advice], ..Flags::default() });
    let config = match vm.config.as_ref()? {
        Ok(config) => config,
        Err(why) => return only(unknown(CHECK, format!("not checked: {why}"))),
    };
    let vendor = match cpu_type::field(root, "vendor_id") {
        Ok(vendor) => vendor,
        Err(why) => return only(unknown(CHECK, format!("the host's CPU is not known: {why}"))),
    };
    let args = config.args.as_deref().unwrap_or_default();
    let is_named = |property: &str| args_line::names_property(args, property);
    let kind = cpu_type::of(config);
    let mut found = Flags::default();
    let has_siblings = shape.is_some_and(|shape| shape.threads > 1);
    let is_amd = ["AuthenticAMD", "HygonGenuine"].contains(&vendor.as_str());
    let is_without = WITHOUT_TOPOEXT.contains(&kind) || kind.starts_with("custom-");
    if has_siblings && is_amd && is_without && !is_named("topoext") {
        let reason = format!(
            "cpu: {kind} has no topoext, without which a guest on AMD takes siblings for cores, also with threads=2"
        );
        found.topoext = Some(costs(CHECK, reason, None));
        found.option = Some(global("topoext"));
    }
    if is_dedicated(vm) && config.line("ostype") == Some("l26") && !is_named("kvm-hint-dedicated") {
        let reason = "its vCPUs have CPUs of their own: with this option, in its one line args:, a Linux guest spins \
                      for locks instead of halting, and polls before it halts; where it shares CPUs, as on a host \
                      without qmpin, a vCPU then spins in vain";
        found.others.push(info(CHECK, reason, Some(written(&global("kvm-hint-dedicated")))));
    }
    let is_steady = cpu_type::field(root, "flags").is_ok_and(|flags| {
        let has = |flag: &str| flags.split_ascii_whitespace().any(|one| one == flag);
        has("constant_tsc") && has("nonstop_tsc")
    });
    if kind == "host" && is_steady && !is_named("invtsc") {
        let reason = "the host's TSC is steady: with this option, in its one line args:, the guest trusts it as its \
                      clock without an exit; QEMU then refuses live migration and snapshots with memory";
        found.others.push(info(CHECK, reason, Some(written(&global("invtsc")))));
    }
    if found.topoext.is_none() && found.others.is_empty() {
        found.others.push(fine(CHECK, format!("cpu: {kind} lacks none of those that are checked")));
    }
    Some(found)
}

/// Whether nothing else runs on the vCPUs' CPUs by the plan.
fn is_dedicated(vm: &VmFacts<'_>) -> bool {
    vm.plan.as_ref().is_ok_and(|plan| {
        let has_own = smp::seats(plan, &vm.guest).is_some();
        has_own && plan.isolation >= Level::Exclusive && !plan.exclusive.is_empty()
    })
}

fn global(property: &str) -> QemuOption {
    let value = format!("x86_64-cpu.{property}=on");
    QemuOption { name: "-global", value, when_there: WhenThere::Add }
}

fn written(option: &QemuOption) -> String {
    format!("{} {}", option.name, option.value)
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{self, Tree, World};
    use super::*;

    fn host(vendor: &str, flags: &str) -> Tree {
        let text = format!("vendor_id\t: {vendor}\nflags\t\t: {flags}\n");
        Tree::new(&[("proc/cpuinfo", text.as_str())])
    }

    fn of(tree: &Tree, threads: u32, config: &str, isolation: Level) -> Flags {
        let world = World::new(1, 5, 2);
        world.vm_of(&fixture::guest(1, 1, 4, threads), Some(config), |vm| {
            if let Ok(plan) = &mut vm.plan {
                plan.isolation = isolation;
            }
            flags(&tree.root(), vm, Shape::of(&vm.guest)).expect("Proxmox's")
        })
    }

    #[test]
    fn siblings_on_amd_need_topoext() {
        let (amd, intel) = (host("AuthenticAMD", "fpu"), host("GenuineIntel", "fpu"));
        for (tree, threads, config, severity) in [
            (&amd, 2, "cpu: host\n", Severity::Costs),
            (&amd, 2, "", Severity::Costs),
            (&amd, 2, "cpu: custom-mine\n", Severity::Costs),
            (&amd, 1, "cpu: host\n", Severity::Fine),
            (&amd, 2, "cpu: EPYC-Milan\n", Severity::Fine),
            (&amd, 2, "args: -cpu host,+topoext\n", Severity::Fine),
            (&intel, 2, "cpu: host\n", Severity::Fine),
        ] {
            let found = of(tree, threads, config, Level::Pinned);
            let all: Vec<Severity> =
                found.topoext.iter().chain(&found.others).map(|one| one.severity).collect();
            assert_eq!(all, [severity], "{config}: {found:?}");
            let option = (severity == Severity::Costs).then(|| global("topoext"));
            assert_eq!(found.option, option, "{config}");
        }
    }

    #[test]
    fn what_loses_something_is_a_choice() {
        let tree = host("GenuineIntel", "fpu constant_tsc nonstop_tsc");
        let mends = |config: &str, isolation| -> Vec<String> {
            let found = of(&tree, 1, config, isolation);
            assert!(found.others.iter().all(|one| one.severity != Severity::Costs));
            found.others.into_iter().filter_map(|one| one.mend).collect()
        };
        let (hint, tsc) =
            ("-global x86_64-cpu.kvm-hint-dedicated=on", "-global x86_64-cpu.invtsc=on");
        let linux = "cpu: host\nostype: l26\n";
        assert_eq!(mends(linux, Level::Exclusive), [hint, tsc]);
        assert_eq!(mends(linux, Level::Pinned), [tsc], "others may run there");
        assert_eq!(
            mends("cpu: host\nostype: win11\n", Level::Strict),
            [tsc],
            "Windows knows no hint"
        );
        assert_eq!(mends("cpu: kvm64\n", Level::Pinned), [""; 0]);
        let chosen = format!("{linux}args: {hint} -cpu host,-invtsc\n");
        assert_eq!(mends(&chosen, Level::Exclusive), [""; 0]);
        let found = of(&host("GenuineIntel", "constant_tsc"), 1, "cpu: host\n", Level::Pinned);
        assert_eq!(found.others[0].severity, Severity::Fine, "a TSC that stops");
    }

    #[test]
    fn what_is_not_known_of_the_cpu_is_said() {
        let none = of(&Tree::new(&[]), 2, "cpu: host\n", Level::Pinned);
        assert_eq!(none.others[0].severity, Severity::Unknown);
        let arm = of(&Tree::new(&[("proc/cpuinfo", "CPU part\t: 0xd0c\n")]), 2, "", Level::Pinned);
        assert_eq!(arm.others[0].severity, Severity::Unknown);
        World::flat(4).vm(4, None, |vm| {
            assert!(flags(&Tree::new(&[]).root(), vm, None).is_none(), "not Proxmox's");
            vm.config = Some(Err("it is not there".to_owned()));
            let unread = flags(&Tree::new(&[]).root(), vm, None).expect("Proxmox's");
            assert_eq!(unread.others[0].severity, Severity::Unknown);
        });
    }
}
