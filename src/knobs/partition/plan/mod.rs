//! The knob *partition*: an isolated cpuset partition in the VM's own scope or service, deep below the
//! root group (a "remote partition", `Documentation/admin-guide/cgroup-v2.rst`, `cpuset.cpus.exclusive`).
//!
//! ```text
//!   qemu.slice                cpuset.cpus.exclusive: this VM's CPUs and those of the VMs beside it
//!   └─ 100.scope              cpuset.cpus.exclusive: this VM's
//!      ├─ vcpus               the same, cpuset.cpus.partition: isolated
//!      ├─ iothreads           cpuset.cpus: where iothreads may run
//!      └─ emulator            cpuset.cpus: where everything else may run
//! ```
//!
//! Where that cannot be, systemd excludes the units beside the VM from its CPUs (*slices*); where
//! that cannot be either, there are the masks of its threads alone. Which one it is, and why, is a
//! [`Finding`].

pub mod steps;

pub use crate::knobs::partition::plan::steps::{PartitionStep, placing, resizing, seat_of};

use crate::cpuset::CpuSet;
use crate::plan::{Finding, Plan};
use crate::site::{Group, Share, Site};
use crate::wording::{counted, cpus_in_words};

/// The rule's name in the report.
pub const RULE: &str = "partition";

/// What each group is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The partition: the vCPUs', and no other thread's.
    pub cpus: CpuSet,
    /// The iothreads'.
    pub iothreads: CpuSet,
    /// The rest's.
    pub emulator: CpuSet,
}

impl Target {
    /// What a group is to have.
    #[must_use]
    pub fn of(&self, group: Group) -> CpuSet {
        match group {
            Group::Vcpus => self.cpus,
            Group::Iothreads => self.iothreads,
            Group::Emulator => self.emulator,
        }
    }
}

/// How the VM's CPUs are kept its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Separation {
    /// By a partition of these CPUs.
    Partition(Box<Target>),
    /// By `AllowedCPUs=` of the units beside the VM; this is the cgroup of its process.
    Slices(String),
    /// By the masks of its own threads: others may run there, too.
    Affinity,
}

/// Chooses partition or fallback, and says why. `site` is the VM's own unit, or why it has none; `beside` the cgroup
/// of its process, or why systemd cannot help.
#[must_use]
pub fn choose(
    plan: &Plan,
    site: Result<&Site, &str>,
    beside: Result<&str, &str>,
    shares: &[Share],
) -> (Separation, Finding) {
    let target = match target(plan, shares) {
        Ok(target) => target,
        Err(reason) => return (Separation::Affinity, affinity_alone(&reason)),
    };
    match site {
        Ok(site) => {
            let finding = isolated(site, &target);
            (Separation::Partition(Box::new(target)), finding)
        }
        Err(reason) => lower(plan, beside, reason),
    }
}

/// The finding of a partition.
#[must_use]
pub fn isolated(site: &Site, target: &Target) -> Finding {
    let cpus = cpus_in_words(&target.cpus);
    Finding::met(RULE, format!("{cpus} are an isolated partition in {}", site.cgroup))
}

/// The next fallback, because a partition is not possible for this reason.
#[must_use]
pub fn lower(plan: &Plan, beside: Result<&str, &str>, reason: &str) -> (Separation, Finding) {
    if !plan.exclusive.is_empty() && plan.exclusive == plan.isolated {
        let cpus = cpus_in_words(&plan.exclusive);
        let what = format!(
            "no partition is needed, processes are excluded from {cpus} since boot: {reason}"
        );
        return (Separation::Affinity, Finding::met(RULE, what));
    }
    match beside {
        Ok(cgroup) if !plan.exclusive.is_empty() && !plan.housekeeping.is_empty() => {
            let what = format!(
                "no isolated partition, systemd keeps the units beside {cgroup} off {}: {reason}",
                cpus_in_words(&plan.exclusive)
            );
            (Separation::Slices(cgroup.to_owned()), Finding::degraded(RULE, what))
        }
        Ok(_) => (Separation::Affinity, affinity_alone(reason)),
        Err(other) if other == reason => (Separation::Affinity, affinity_alone(reason)),
        Err(other) => (Separation::Affinity, affinity_alone(&format!("{reason}; {other}"))),
    }
}

/// The finding of the last fallback.
#[must_use]
pub fn affinity_alone(reason: &str) -> Finding {
    let what = "no isolated partition, the VM's threads are pinned and others may run on its CPUs";
    Finding::degraded(RULE, format!("{what}: {reason}"))
}

/// What each group is to have by this plan.
///
/// # Errors
/// Why there can be no partition, in a sentence.
pub fn target(plan: &Plan, shares: &[Share]) -> Result<Target, String> {
    let target =
        Target { cpus: plan.exclusive, iothreads: plan.iothread_cpus, emulator: plan.emulator };
    if target.cpus.is_empty() {
        return Err("the plan gives the VM no CPU of its own".to_owned());
    }
    let helpers = (target.iothreads | target.emulator) & target.cpus;
    if !helpers.is_empty() {
        let cpus = cpus_in_words(&helpers);
        return Err(format!("the policy has emulator threads or iothreads on the vCPUs' {cpus}"));
    }
    if plan.housekeeping.is_empty() {
        return Err("it would leave the host no CPU".to_owned());
    }
    match shares.iter().find(|share| share.cpus.intersects(&target.cpus)) {
        Some(share) => {
            let cpus = cpus_in_words(&(share.cpus & target.cpus));
            Err(format!("{cpus} are still in the partition of VM {}", share.vm))
        }
        None => Ok(target),
    }
}

/// The exclusive CPUs of one level: what is there, without what was ever ours and is no other VM's
/// below, and with what this VM is to have now. What another program has put there stays.
#[must_use]
pub fn level_target(
    level: &str,
    found: CpuSet,
    ever_ours: CpuSet,
    ours: CpuSet,
    shares: &[Share],
) -> CpuSet {
    let others: CpuSet = shares
        .iter()
        .filter(|share| is_below(&share.cgroup, level))
        .fold(CpuSet::EMPTY, |all, share| all | share.cpus);
    (found - (ever_ours - others)) | ours
}

fn is_below(cgroup: &str, level: &str) -> bool {
    cgroup.strip_prefix(level).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What was built, in a line.
#[must_use]
pub fn in_words(steps: usize, site: &Site, target: &Target) -> String {
    let cpus = cpus_in_words(&target.cpus);
    format!("{cpus}: an isolated partition in {} ({})", site.cgroup, counted(steps, "write"))
}

#[cfg(test)]
mod fixtures {
    use super::{Plan, Site};
    use crate::cpuset::CpuSet;
    use crate::ids::VcpuIndex;
    use crate::plan::{PlannedVcpu, Why};
    use crate::policy::Level;

    pub(crate) fn set(text: &str) -> CpuSet {
        CpuSet::parse_cpulist(text).expect("a cpulist")
    }

    pub(crate) fn plan(exclusive: &str, helpers: &str) -> Plan {
        let vcpu = |(at, cpu): (u32, _)| PlannedVcpu {
            vcpu: VcpuIndex(at),
            cpus: CpuSet::single(cpu),
            why: Why::OwnCore,
        };
        Plan {
            vm: "100".parse().expect("a name"),
            vcpus: (0..).zip(set(exclusive).iter()).map(vcpu).collect(),
            left_alone: vec![],
            iothreads: vec![],
            iothread_cpus: set(helpers),
            emulator: set(helpers),
            exclusive: set(exclusive),
            housekeeping: set("0-23") - set(exclusive),
            isolated: CpuSet::EMPTY,
            displaced: Vec::new(),
            memory: None,
            isolation: Level::Exclusive,
            report: vec![],
        }
    }

    pub(crate) fn site() -> Site {
        Site { unit: "100.scope".to_owned(), cgroup: "qemu.slice/100.scope".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::fixtures::{plan, set, site};
    use super::*;
    use crate::plan::Verdict;
    use crate::site::levels;

    fn share(vm: &str, cpus: &str) -> Share {
        let cgroup = format!("qemu.slice/{vm}.scope");
        Share { vm: vm.parse().expect("a name"), cgroup, cpus: set(cpus) }
    }

    #[test]
    fn cpus_that_were_isolated_at_boot_need_no_partition() {
        let isolated = |cpus: &str| Plan { isolated: set(cpus), ..plan("12-19", "0-11") };
        let reason = "CPUs 12-19 are isolated on the kernel command line";
        let (separation, finding) = choose(&isolated("12-19"), Err(reason), Err(reason), &[]);
        assert_eq!((separation, finding.verdict), (Separation::Affinity, Verdict::Met));
        assert!(finding.reason.contains("CPUs 12-19 since boot"), "{}", finding.reason);
        let (_, finding) = choose(&isolated("12-17"), Err(reason), Err(reason), &[]);
        assert_eq!(finding.verdict, Verdict::Degraded);
    }

    #[test]
    fn the_levels_of_a_cgroup_go_down_to_it() {
        assert_eq!(
            levels("a.slice/a-b.slice/c.scope"),
            ["a.slice", "a.slice/a-b.slice", "a.slice/a-b.slice/c.scope"]
        );
        assert_eq!(levels("c.scope"), ["c.scope"]);
    }

    #[test]
    fn every_reason_against_a_partition_is_named() {
        let none = |plan: &Plan, site: Result<&Site, &str>, shares: &[Share], word: &str| {
            let (separation, finding) = choose(plan, site, Err("no systemd"), shares);
            assert_eq!(separation, Separation::Affinity);
            assert_eq!(finding.verdict, Verdict::Degraded);
            assert!(finding.reason.contains(word), "{}", finding.reason);
        };
        let site = site();
        none(&plan("12-19", "0-11"), Err("it runs in session-3.scope"), &[], "session-3.scope");
        none(&plan("12-19", "0-12"), Ok(&site), &[], "CPU 12");
        none(&plan("", "0-11"), Ok(&site), &[], "no CPU of its own");
        none(&plan("12-19", "0-11"), Ok(&site), &[share("101", "18-20")], "VM 101");
        let mut all = plan("12-19", "0-11");
        all.housekeeping = CpuSet::EMPTY;
        none(&all, Ok(&site), &[], "the host no CPU");
        let (separation, _) =
            choose(&plan("12-19", "0-11"), Ok(&site), Err(""), &[share("101", "20-21")]);
        assert!(matches!(separation, Separation::Partition(target) if target.cpus == set("12-19")));
    }

    #[test]
    fn without_a_unit_of_its_own_systemd_keeps_others_off() {
        let plan = plan("12-19", "0-11");
        let session = "user.slice/user-0.slice/session-3.scope";
        let (separation, finding) =
            choose(&plan, Err("it is in session-3.scope"), Ok(session), &[]);
        assert_eq!(separation, Separation::Slices(session.to_owned()));
        assert_eq!(finding.verdict, Verdict::Degraded);
        assert!(finding.reason.contains("CPUs 12-19: it is in session-3"), "{}", finding.reason);
        let (separation, finding) =
            choose(&plan, Err("it is in /"), Err("there is no systemd"), &[]);
        assert_eq!(separation, Separation::Affinity);
        assert!(finding.reason.ends_with("it is in /; there is no systemd"), "{}", finding.reason);
    }

    #[test]
    fn a_level_keeps_what_is_others() {
        let shares = [share("101", "8-11")];
        let level = |found, ever, ours| {
            level_target("qemu.slice", set(found), set(ever), set(ours), &shares).to_string()
        };
        assert_eq!(level("8-11", "12-19", "12-19"), "8-19");
        assert_eq!(level("8-19", "12-19", ""), "8-11");
        assert_eq!(
            level("8-19", "8-19", ""),
            "8-11",
            "what was ours once and is VM 101's now stays"
        );
        assert_eq!(level("2,8-19", "12-19", ""), "2,8-11", "an administrator's stays");
        let own =
            level_target("qemu.slice/100.scope", set("12-19"), set("12-19"), set(""), &shares);
        assert!(own.is_empty());
        let like = level_target("qemu.slice/10", set("8-11"), set("8-11"), set(""), &shares);
        assert!(like.is_empty(), "101.scope is not below 10");
    }
}
