//! What there is of a VM's partition against what there should be: the difference is writes.

use crate::cpuset::CpuSet;
use crate::knobs::partition::plan::{Target, level_target};
use crate::plan::Plan;
use crate::site::{Group, ISOLATED, Seat, Seen, Share, Site};
use crate::threads::{Role, Thread};

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
        to: Seat,
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
pub fn seat_of(plan: &Plan, target: &Target, role: &Role) -> Seat {
    match role {
        Role::Vcpu(index) => {
            let own = plan.vcpu(*index).is_some_and(|cpus| cpus.is_subset(&target.cpus));
            if own { Seat::In(Group::Vcpus) } else { Seat::Loose }
        }
        Role::Iothread(_) => Seat::In(Group::Iothreads),
        Role::Emulator | Role::Worker | Role::Vhost | Role::Kernel => Seat::In(Group::Emulator),
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
    let mut moves: Vec<(Seat, &Thread)> = threads
        .iter()
        .filter_map(|thread| {
            let wanted = seat_of(plan, target, &thread.role);
            let found = seen.seat(thread.key.tid)?;
            // A worker is created beside the thread that made it. Moving it costs all of the host's forks
            // a moment, so it stays where its CPUs are allowed.
            let may_stay = thread.role == Role::Worker
                && found == Seat::In(Group::Iothreads)
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::ids::{StartTicks, Tid, VcpuIndex};
    use crate::knobs::partition::plan::fixtures::{plan, set, site};
    use crate::knobs::partition::plan::target;
    use crate::site::{GroupSeen, levels};
    use crate::threads::ThreadKey;

    fn thread(tid: i32, role: Role) -> Thread {
        let key = ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        Thread { key, role, comm: "kvm".to_owned(), allowed: set("0-23").into(), last_cpu: None }
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
            // It has no CPU of its own, so it is in no way in the scope itself.
            thread(5, Role::Vcpu(VcpuIndex(9))),
            thread(6, Role::Emulator),
        ];
        let moves: Vec<(i32, Seat)> = placing(&plan, &target, &seen, &threads)
            .into_iter()
            .filter_map(|step| match step {
                PartitionStep::Move { thread, to } => Some((thread.key.tid.0, to)),
                _ => None,
            })
            .collect();
        let wanted = [(2, Group::Vcpus), (3, Group::Iothreads), (1, Group::Emulator)];
        assert_eq!(moves, wanted.map(|(tid, group)| (tid, Seat::In(group))));
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
