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
//! The next rung is affinity alone. Which one it is, and why, is a [`Finding`].

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, Plan, counted, cpus_in_words};
use crate::cpuset::CpuSet;
use crate::ids::{Tid, VmName};
use crate::threads::{Role, Thread};

/// The rule's name in the report.
pub const RULE: &str = "partition";

/// What the partition file says when all is well.
pub const ISOLATED: &str = "isolated";

/// A threaded group in the VM's scope.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    /// vCPU threads, alone on their CPUs.
    Vcpus,
    /// Iothreads, and the workers they make.
    Iothreads,
    /// Everything else of QEMU's.
    Emulator,
}

impl Group {
    /// All of them, in the order in which they are filled.
    pub const ALL: [Group; 3] = [Group::Vcpus, Group::Iothreads, Group::Emulator];

    /// Its folder's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Group::Vcpus => "vcpus",
            Group::Iothreads => "iothreads",
            Group::Emulator => "emulator",
        }
    }

    /// Its path below a unit's cgroup.
    #[must_use]
    pub fn below(self, cgroup: &str) -> String {
        format!("{cgroup}/{}", self.name())
    }
}

/// Where in the unit a thread is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// In one of the groups.
    In(Group),
    /// In none of them, but in the unit's own cgroup: where it may run is up to its mask.
    Loose,
}

/// A unit that is the VM's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Site {
    /// Its name, as `100.scope`.
    pub unit: String,
    /// Its cgroup below the root, as `qemu.slice/100.scope`.
    pub cgroup: String,
}

/// Another VM's partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Whose.
    pub vm: VmName,
    /// The cgroup of its unit.
    pub cgroup: String,
    /// Its CPUs.
    pub cpus: CpuSet,
}

/// What each group is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The partition: the vCPUs', and nobody else's.
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
pub enum Rung {
    /// By a partition of these CPUs.
    Partition(Box<Target>),
    /// By the masks of its own threads: others may run there, too.
    Affinity,
}

/// Chooses the rung, and says why. `site` is the VM's own unit, or why it has none.
#[must_use]
pub fn choose(plan: &Plan, site: Result<&Site, &str>, shares: &[Share]) -> (Rung, Finding) {
    let chosen = site.map_err(str::to_owned).and_then(|site| Ok((site, target(plan, shares)?)));
    match chosen {
        Ok((site, target)) => {
            let reason = format!(
                "{} are an isolated partition in {}",
                cpus_in_words(&target.cpus),
                site.cgroup
            );
            (Rung::Partition(Box::new(target)), Finding::met(RULE, reason))
        }
        Err(reason) => (Rung::Affinity, affinity_alone(&reason)),
    }
}

/// The finding of the last rung.
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

/// The cgroups from below the root down to this one: each must allow the partition.
#[must_use]
pub fn levels(cgroup: &str) -> Vec<&str> {
    let ends = cgroup.match_indices('/').map(|(at, _)| at).chain([cgroup.len()]);
    ends.map(|end| &cgroup[..end]).collect()
}

/// The exclusive CPUs of one level: what is there, without what was ever ours and is no other VM's
/// below, and with what is to be ours now. What somebody else has put there stays.
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

/// One group as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupSeen {
    /// Whether it has `cpuset.cpus`: the controller is there.
    pub has_cpuset: bool,
    /// `cpuset.cpus`.
    pub cpus: CpuSet,
    /// `cpuset.cpus.exclusive`.
    pub exclusive: CpuSet,
    /// `cpuset.cpus.partition`, with the reason where it is invalid.
    pub partition: String,
    /// The threads in it.
    pub threads: BTreeSet<Tid>,
}

/// The partition as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// The groups that are there.
    pub groups: BTreeMap<Group, GroupSeen>,
    /// Threads in no group, but in the unit's own cgroup.
    pub loose: BTreeSet<Tid>,
    /// `cpuset.cpus.exclusive` of each level, top down.
    pub levels: Vec<(String, CpuSet)>,
}

impl Seen {
    /// Where a thread is; `None` where it is somewhere else.
    fn place(&self, tid: Tid) -> Option<Place> {
        let in_group = self.groups.iter().find(|(_, seen)| seen.threads.contains(&tid));
        let loose = self.loose.contains(&tid).then_some(Place::Loose);
        in_group.map(|(group, _)| Place::In(*group)).or(loose)
    }
}

/// One write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PartitionStep {
    /// A threaded group.
    Make(Group),
    /// The controller, for the groups in the unit.
    Enable,
    /// A thread goes where it belongs.
    Move {
        /// Which thread.
        thread: Thread,
        /// Where to.
        to: Place,
    },
    /// Where the threads of a group may run.
    SetCpus {
        /// Which group.
        group: Group,
        /// Where.
        cpus: CpuSet,
    },
    /// The exclusive CPUs of a cgroup.
    SetExclusive {
        /// Which cgroup.
        cgroup: String,
        /// Which CPUs.
        cpus: CpuSet,
    },
    /// The partition itself.
    Isolate,
}

/// Where a thread belongs. A vCPU without CPUs of its own is in no group.
#[must_use]
pub fn place_of(plan: &Plan, target: &Target, role: &Role) -> Place {
    match role {
        Role::Vcpu(index) => {
            let own = plan.vcpu(*index).is_some_and(|cpus| cpus.is_subset(&target.cpus));
            if own { Place::In(Group::Vcpus) } else { Place::Loose }
        }
        Role::Iothread(_) => Place::In(Group::Iothreads),
        Role::Emulator | Role::Worker | Role::Vhost | Role::Kernel => Place::In(Group::Emulator),
    }
}

/// What is to be done for groups and threads. Threads go first, so that no group's CPUs are a thread's
/// that does not belong there.
#[must_use]
pub fn placing(
    plan: &Plan,
    target: &Target,
    seen: &Seen,
    threads: &[Thread],
) -> Vec<PartitionStep> {
    let missing = Group::ALL.into_iter().filter(|group| !seen.groups.contains_key(group));
    let mut steps: Vec<PartitionStep> = missing.map(PartitionStep::Make).collect();
    let has_cpuset = |group: Group| seen.groups.get(&group).is_some_and(|seen| seen.has_cpuset);
    if !Group::ALL.into_iter().all(has_cpuset) {
        steps.push(PartitionStep::Enable);
    }
    let mut moves: Vec<(Place, &Thread)> = threads
        .iter()
        .filter_map(|thread| {
            let wanted = place_of(plan, target, &thread.role);
            let found = seen.place(thread.key.tid)?;
            // A worker is born beside the thread that made it. Moving it costs all of the host's forks
            // a moment, so it stays where its CPUs are allowed.
            let may_stay = thread.role == Role::Worker
                && found == Place::In(Group::Iothreads)
                && target.emulator.is_subset(&target.iothreads);
            (found != wanted && !may_stay).then_some((wanted, thread))
        })
        .collect();
    // The vCPUs first; those without a group last.
    moves.sort_by_key(|(to, _)| *to);
    steps.extend(
        moves.into_iter().map(|(to, thread)| PartitionStep::Move { thread: thread.clone(), to }),
    );
    for group in [Group::Iothreads, Group::Emulator] {
        let cpus = target.of(group);
        if seen.groups.get(&group).is_none_or(|seen| seen.cpus != cpus) {
            steps.push(PartitionStep::SetCpus { group, cpus });
        }
    }
    steps
}

/// What is to be done for the partition: growing from the top down, shrinking from the bottom up.
#[must_use]
pub fn resizing(
    site: &Site,
    target: &Target,
    ever_ours: CpuSet,
    shares: &[Share],
    seen: &Seen,
) -> Vec<PartitionStep> {
    let mut steps = Vec::new();
    let mut shrinks = Vec::new();
    let set = |cgroup: &str, cpus| PartitionStep::SetExclusive { cgroup: cgroup.to_owned(), cpus };
    for (level, found) in &seen.levels {
        let wanted = level_target(level, *found, ever_ours, target.cpus, shares);
        let grown = *found | wanted;
        if grown != *found {
            steps.push(set(level, grown));
        }
        if grown != wanted {
            shrinks.push(set(level, wanted));
        }
    }
    let leaf = seen.groups.get(&Group::Vcpus);
    if leaf.is_none_or(|leaf| leaf.exclusive != target.cpus) {
        steps.push(set(&Group::Vcpus.below(&site.cgroup), target.cpus));
    }
    if leaf.is_none_or(|leaf| leaf.partition != ISOLATED) {
        steps.push(PartitionStep::Isolate);
    }
    steps.extend(shrinks.into_iter().rev());
    steps
}

/// What was built, in a line.
#[must_use]
pub fn in_words(steps: usize, site: &Site, target: &Target) -> String {
    let cpus = cpus_in_words(&target.cpus);
    format!("{cpus}: an isolated partition in {} ({})", site.cgroup, counted(steps, "write"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StartTicks, VcpuIndex};
    use crate::plan::{PlannedVcpu, Why};
    use crate::policy::Level;
    use crate::threads::ThreadKey;

    fn set(text: &str) -> CpuSet {
        CpuSet::parse_cpulist(text).expect("a cpulist")
    }

    fn plan(exclusive: &str, helpers: &str) -> Plan {
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
            isolation: Level::Exclusive,
            report: vec![],
        }
    }

    fn site() -> Site {
        Site { unit: "100.scope".to_owned(), cgroup: "qemu.slice/100.scope".to_owned() }
    }

    fn share(vm: &str, cpus: &str) -> Share {
        let cgroup = format!("qemu.slice/{vm}.scope");
        Share { vm: vm.parse().expect("a name"), cgroup, cpus: set(cpus) }
    }

    fn thread(tid: i32, role: Role) -> Thread {
        let key = ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        Thread { key, role, comm: "kvm".to_owned(), allowed: set("0-23"), last_cpu: None }
    }

    fn levels_seen(exclusive: &str) -> Vec<(String, CpuSet)> {
        let levels = levels("qemu.slice/100.scope").into_iter();
        levels.map(|level| (level.to_owned(), set(exclusive))).collect()
    }

    fn built(cpus: &str) -> Seen {
        let group = |cpus: &str, exclusive: &str| GroupSeen {
            has_cpuset: true,
            cpus: set(cpus),
            exclusive: set(exclusive),
            ..GroupSeen::default()
        };
        let mut vcpus = group("", cpus);
        vcpus.partition = ISOLATED.to_owned();
        let groups = BTreeMap::from([
            (Group::Vcpus, vcpus),
            (Group::Iothreads, group("0-11", "")),
            (Group::Emulator, group("0-11", "")),
        ]);
        Seen { groups, loose: BTreeSet::new(), levels: levels_seen(cpus) }
    }

    fn exclusives(steps: &[PartitionStep]) -> Vec<String> {
        let words = |step: &PartitionStep| match step {
            PartitionStep::SetExclusive { cgroup, cpus } => format!("{cgroup}={cpus}"),
            PartitionStep::Isolate => "isolate".to_owned(),
            other => format!("{other:?}"),
        };
        steps.iter().map(words).collect()
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
    fn every_reason_against_a_partition_is_said() {
        let none = |plan: &Plan, site: Result<&Site, &str>, shares: &[Share], word: &str| {
            let (rung, finding) = choose(plan, site, shares);
            assert_eq!(rung, Rung::Affinity);
            assert_eq!(finding.verdict, crate::plan::Verdict::Degraded);
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
        let (rung, _) = choose(&plan("12-19", "0-11"), Ok(&site), &[share("101", "20-21")]);
        assert!(matches!(rung, Rung::Partition(target) if target.cpus == set("12-19")));
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

    #[test]
    fn a_partition_is_built_top_down_and_then_nothing_is_left_to_do() {
        let plan = plan("12-19", "0-11");
        let target = target(&plan, &[]).expect("a target");
        let nothing = Seen { levels: levels_seen(""), ..Seen::default() };
        let steps = resizing(&site(), &target, set("12-19"), &[], &nothing);
        let all = [
            "qemu.slice=12-19",
            "qemu.slice/100.scope=12-19",
            "qemu.slice/100.scope/vcpus=12-19",
            "isolate",
        ];
        assert_eq!(exclusives(&steps), all);
        assert_eq!(resizing(&site(), &target, set("12-19"), &[], &built("12-19")), []);
        assert_eq!(placing(&plan, &target, &built("12-19"), &[]), []);
    }

    #[test]
    fn it_grows_from_the_top_and_shrinks_from_the_leaf() {
        let grown = target(&plan("12-21", "0-11"), &[]).expect("a target");
        let steps = resizing(&site(), &grown, set("12-21"), &[], &built("12-19"));
        assert_eq!(
            exclusives(&steps),
            ["qemu.slice=12-21", "qemu.slice/100.scope=12-21", "qemu.slice/100.scope/vcpus=12-21"]
        );
        let shrunk = target(&plan("12-17", "0-11"), &[]).expect("a target");
        let steps = resizing(&site(), &shrunk, set("12-19"), &[], &built("12-19"));
        assert_eq!(
            exclusives(&steps),
            ["qemu.slice/100.scope/vcpus=12-17", "qemu.slice/100.scope=12-17", "qemu.slice=12-17"]
        );
    }

    #[test]
    fn threads_go_where_they_belong_vcpus_first() {
        let plan = plan("12-13", "0-11");
        let target = target(&plan, &[]).expect("a target");
        let mut seen = built("12-13");
        seen.loose = BTreeSet::from([Tid(1), Tid(2), Tid(3), Tid(5)]);
        seen.groups.get_mut(&Group::Iothreads).expect("a group").threads.insert(Tid(4));
        let io = crate::ids::IothreadId("io".to_owned());
        let threads = [
            thread(1, Role::Emulator),
            thread(2, Role::Vcpu(VcpuIndex(0))),
            thread(3, Role::Iothread(io)),
            thread(4, Role::Worker),
            // It has no CPU of its own, so it is in nobody's way in the scope itself.
            thread(5, Role::Vcpu(VcpuIndex(9))),
            thread(6, Role::Emulator),
        ];
        let moves: Vec<(i32, Place)> = placing(&plan, &target, &seen, &threads)
            .into_iter()
            .filter_map(|step| match step {
                PartitionStep::Move { thread, to } => Some((thread.key.tid.0, to)),
                _ => None,
            })
            .collect();
        let wanted = [(2, Group::Vcpus), (3, Group::Iothreads), (1, Group::Emulator)];
        assert_eq!(moves, wanted.map(|(tid, group)| (tid, Place::In(group))));
    }

    #[test]
    fn an_invalid_partition_is_asked_for_again() {
        let target = target(&plan("12-19", "0-11"), &[]).expect("a target");
        let mut seen = built("12-19");
        seen.groups.get_mut(&Group::Vcpus).expect("a group").partition =
            "isolated invalid (…)".to_owned();
        assert_eq!(resizing(&site(), &target, set("12-19"), &[], &seen), [PartitionStep::Isolate]);
    }
}
