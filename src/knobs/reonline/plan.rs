//! The knob *reonline*: the VM's CPUs are taken offline and online again, one after another, before its
//! first thread is pinned. Timers move to other CPUs then and stay there, and so does what the kernel
//! was busy with (`Documentation/core-api/cpu_hotplug.rst`).
//!
//! A CPU is left out where something would lose for good what it has:
//!
//! | what is alone there | because |
//! |---|---|
//! | a thread | without a CPU it may go anywhere, from then on (`kernel/sched/core.c: select_fallback_rq`) |
//! | a movable interrupt | its CPUs become all (`kernel/irq/cpuhotplug.c: migrate_one_irq`) |
//! | a bound kernel thread that does not come and go with its CPU | as any thread |
//!
//! and where it is the machine's first, has no switch, or is another lease's, a partition's or a resctrl
//! group's. No CPU at all is taken where the kernel itself forgets, see [`Never`].

use std::collections::BTreeMap;
use std::fmt;

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, Tid, VmName};
use crate::plan::report::Finding;
use crate::shown;
use crate::wording::{counted, cpus_in_words};

/// The rule's name in reports.
pub const RULE: &str = "reonline";

/// Why no CPU of this host is taken.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Never {
    /// A cpuset of cgroup v1 has no CPU any more that has been offline
    /// (`kernel/cgroup/cpuset-v1.c: cpuset1_hotplug_update_tasks`).
    CpusetV1,
    /// Before Linux 6.2 all threads in a cpuset forget the CPUs that they chose for themselves. It shows by
    /// what came with 6.7, `cpuset.cpus.exclusive`.
    OldKernel,
    /// Whenever a CPU comes, this kernel thread gets all CPUs of its node (before Linux 7.0,
    /// `mm/compaction.c: kcompactd_cpu_online`), and it has others.
    Kcompactd(String),
    /// What stands against it cannot be learnt.
    Unknown(String),
}

/// Why one CPU is left out.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Blocker {
    /// Much of the kernel's own work knows no other.
    First,
    /// There is no `cpu*/online`.
    NoSwitch,
    /// Another VM has it.
    Leased(VmName),
    /// A partition has it.
    Partition(String),
    /// A group of resctrl has it, and would not get it back (`Documentation/filesystems/resctrl.rst`).
    Resctrl(String),
    /// This thread may run nowhere else.
    Thread {
        /// Its number.
        tid: Tid,
        /// Its name.
        comm: String,
        /// What kind it is.
        kind: AloneKind,
    },
    /// This interrupt may fire nowhere else.
    Irq(u32),
}

/// What kind of thread is alone on a CPU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum AloneKind {
    /// Of a process.
    User,
    /// Of the kernel's, and it can be moved.
    Movable,
    /// Of the kernel's, and bound to the CPU by a program that does not correct it.
    Bound,
}

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Never::CpusetV1 => f.write_str("a cpuset of cgroup v1 would not get its CPUs back"),
            Never::OldKernel => f.write_str(
                "threads in cpusets may lose the affinity they chose (Linux before 6.2; known for sure from 6.7 on)",
            ),
            Never::Kcompactd(comm) => {
                write!(f, "{comm} has CPUs of its own and would be given its node's")
            }
            Never::Unknown(reason) => write!(f, "what stands against it cannot be learnt: {reason}"),
        }
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Blocker::First => f.write_str("it is the machine's first"),
            Blocker::NoSwitch => f.write_str("the kernel has no switch for it"),
            Blocker::Leased(vm) => write!(f, "VM {vm} has it"),
            Blocker::Partition(group) => write!(f, "the partition {group} has it"),
            Blocker::Resctrl(group) => write!(f, "the resctrl group {group} has it"),
            Blocker::Thread { tid, comm, .. } => {
                write!(f, "thread {tid} ({}) may run nowhere else", shown::line(comm))
            }
            Blocker::Irq(number) => write!(f, "interrupt {number} may fire nowhere else"),
        }
    }
}

/// What there is to know of the host.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Why no CPU is taken.
    pub never: Option<Never>,
    /// Why one is not; the first reason counts.
    pub blockers: BTreeMap<CpuId, Vec<Blocker>>,
}

/// What the other knobs move out of the way before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beforehand {
    /// It is done: what is still there stays.
    Done,
    /// Interrupts or kernel threads will be gone.
    WillMove {
        /// Whether interrupts will.
        irqs: bool,
        /// Whether kernel threads will.
        kthreads: bool,
    },
}

/// Which CPUs are taken, in order, and why the others are not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// These, ascending.
    pub taken: Vec<CpuId>,
    /// Not these.
    pub left_out: Vec<(CpuId, Blocker)>,
}

/// Chooses among the VM's CPUs.
///
/// # Errors
/// Why none is taken.
pub fn choose(exclusive: &CpuSet, facts: &Facts, beforehand: Beforehand) -> Result<Choice, Never> {
    if let Some(never) = &facts.never {
        return Err(never.clone());
    }
    let stays = |blocker: &&Blocker| match (blocker, beforehand) {
        (Blocker::Irq(_), Beforehand::WillMove { irqs, .. }) => !irqs,
        (
            Blocker::Thread { kind: AloneKind::Movable, .. },
            Beforehand::WillMove { kthreads, .. },
        ) => !kthreads,
        _ => true,
    };
    let mut choice = Choice::default();
    for cpu in exclusive.iter() {
        let blockers = facts.blockers.get(&cpu).map(Vec::as_slice).unwrap_or_default();
        match blockers.iter().find(stays) {
            Some(blocker) => choice.left_out.push((cpu, blocker.clone())),
            None => choice.taken.push(cpu),
        }
    }
    Ok(choice)
}

/// What would be done, for `qmpin plan`.
#[must_use]
pub fn finding(choice: &Result<Choice, Never>) -> Finding {
    match choice {
        Err(never) => Finding::impossible(RULE, format!("no CPU is taken offline: {never}")),
        Ok(Choice { taken, left_out }) => {
            let taken: CpuSet = taken.iter().copied().collect();
            let taken = format!("{} offline and online again, first", cpus_in_words(&taken));
            match left_out.first() {
                None => Finding::met(RULE, taken),
                Some((cpu, blocker)) => {
                    let left = counted(left_out.len(), "CPU");
                    let reason = format!("{taken}; {left} left out, such as {cpu}: {blocker}");
                    Finding::degraded(RULE, reason)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Verdict;

    fn cpu(number: usize) -> CpuId {
        CpuId::from_index(number).expect("a CPU")
    }

    fn facts(blockers: &[(usize, Blocker)]) -> Facts {
        let mut facts = Facts::default();
        for (at, blocker) in blockers {
            facts.blockers.entry(cpu(*at)).or_default().push(blocker.clone());
        }
        facts
    }

    fn thread(kind: AloneKind) -> Blocker {
        Blocker::Thread { tid: Tid(7), comm: "x".to_owned(), kind }
    }

    #[test]
    fn what_would_lose_something_is_left_out_and_the_rest_goes_in_order() {
        let mine: CpuSet = "4-7".parse().expect("a cpulist");
        let found =
            facts(&[(5, thread(AloneKind::User)), (7, Blocker::Irq(9)), (9, Blocker::First)]);
        let choice = choose(&mine, &found, Beforehand::Done).expect("a choice");
        assert_eq!(choice.taken, [cpu(4), cpu(6)]);
        let left: Vec<CpuId> = choice.left_out.iter().map(|(cpu, _)| *cpu).collect();
        assert_eq!(left, [cpu(5), cpu(7)]);
        assert_eq!(finding(&Ok(choice)).verdict, Verdict::Degraded);
        let all = choose(&mine, &Facts::default(), Beforehand::Done);
        assert_eq!(finding(&all).verdict, Verdict::Met);
    }

    #[test]
    fn changes_of_other_knobs_do_not_block_it() {
        let mine: CpuSet = "4".parse().expect("a cpulist");
        let taken = |blocker: Blocker, irqs, kthreads| {
            let beforehand = Beforehand::WillMove { irqs, kthreads };
            let choice = choose(&mine, &facts(&[(4, blocker)]), beforehand).expect("a choice");
            choice.taken.len()
        };
        assert_eq!(taken(Blocker::Irq(1), true, false), 1);
        assert_eq!(taken(Blocker::Irq(1), false, true), 0);
        assert_eq!(taken(thread(AloneKind::Movable), false, true), 1);
        assert_eq!(taken(thread(AloneKind::Movable), true, false), 0);
        for kind in [AloneKind::User, AloneKind::Bound] {
            assert_eq!(taken(thread(kind), true, true), 0, "{kind:?}");
        }
    }

    #[test]
    fn a_kernel_that_forgets_takes_none() {
        let facts = Facts { never: Some(Never::CpusetV1), ..Facts::default() };
        let mine = CpuSet::single(cpu(4));
        let choice = choose(&mine, &facts, Beforehand::Done);
        assert_eq!(choice, Err(Never::CpusetV1));
        assert_eq!(finding(&choice).verdict, Verdict::Impossible);
    }
}
