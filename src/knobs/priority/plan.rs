//! The knob *sched*: the priority of vCPU threads. Never that of any other thread of the VM.
//!
//! ```text
//!   a vCPU with a CPU to itself   ─▶ what the policy says
//!   a vCPU that shares its CPU    ─▶ nothing: two that compute at one priority never take turns, and a
//!                                    helper below it would wait for good on a guest that waits for it
//!   anything else that has it     ─▶ what it had before: it was made by a vCPU's thread
//! ```

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::ids::VcpuIndex;
use crate::knobs::priority::journal::SchedMemory;
use crate::knobs::step::ThreadStep;
use crate::plan::Plan;
use crate::plan::report::{Finding, Why};
use crate::policy::{Level, VcpuPriority};
use crate::scheduling::{Scheduling, Throttling};
use crate::threads::{Role, ThreadKey};
use crate::wording::{counted, cpus_in_words};

/// The rule's name in reports.
pub const RULE: &str = "sched";

/// A thread and how it is scheduled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scheduled {
    /// Which thread.
    pub thread: ThreadKey,
    /// What it is for.
    pub role: Role,
    /// Its name, for display only.
    pub comm: String,
    /// How it is scheduled.
    pub now: Scheduling,
}

/// One change of how a thread is scheduled.
pub type PriorityStep = ThreadStep<Scheduling>;

/// The vCPUs that are to have the priority: those that are pinned, each to a CPU where no other thread of
/// the VM may run.
#[must_use]
pub fn raised(plan: &Plan, priority: VcpuPriority) -> BTreeMap<VcpuIndex, Scheduling> {
    let Some(wanted) = priority.sched.wanted().filter(|_| plan.isolation != Level::None) else {
        return BTreeMap::new();
    };
    let helpers = plan.emulator | plan.iothread_cpus;
    let users =
        |cpus: &CpuSet| plan.vcpus.iter().filter(|other| other.cpus.intersects(cpus)).count();
    plan.vcpus
        .iter()
        .filter(|planned| planned.why != Why::Overflow && !planned.cpus.intersects(&helpers))
        .filter(|planned| users(&planned.cpus) == 1 && priority.is_about(planned.vcpu))
        .map(|planned| (planned.vcpu, wanted))
        .collect()
}

/// The changes that lead there. `memory` says what qmpin has changed.
#[must_use]
pub fn steps(
    raised: &BTreeMap<VcpuIndex, Scheduling>,
    seen: Vec<Scheduled>,
    memory: &SchedMemory,
) -> Vec<PriorityStep> {
    let step = |of: Scheduled| {
        let wanted = match &of.role {
            Role::Vcpu(index) => raised.get(index).copied(),
            _ => None,
        };
        let own = || memory.is_ours(of.thread, &of.now).then(|| memory.before(of.thread));
        let to = wanted.or_else(own).filter(|to| *to != of.now)?;
        let Scheduled { thread, role, comm, now } = of;
        Some(ThreadStep { thread, role, comm, from: now, to })
    };
    seen.into_iter().filter_map(step).collect()
}

/// How far the policy's wish is met, where it has one.
#[must_use]
pub fn finding(plan: &Plan, priority: VcpuPriority, throttling: Throttling) -> Option<Finding> {
    let sched = priority.sched;
    sched.wanted()?;
    let raised = raised(plan, priority);
    let on: CpuSet = plan
        .vcpus
        .iter()
        .filter(|planned| raised.contains_key(&planned.vcpu))
        .fold(CpuSet::EMPTY, |all, planned| all | planned.cpus);
    let all = plan.vcpus.iter().map(|planned| &planned.vcpu).chain(&plan.left_alone);
    let left = all.filter(|vcpu| priority.is_about(**vcpu)).count() - raised.len();
    if plan.isolation == Level::None {
        let reason = format!("{sched} is for pinned vCPUs, and isolation = \"none\" pins none");
        return Some(Finding::impossible(RULE, reason));
    }
    if raised.is_empty() {
        let which = priority.vcpus.map_or(String::new(), |vcpus| format!(" of vCPUs {vcpus}"));
        let reason =
            format!("{sched} is for vCPUs that have a CPU to themselves, and none{which} has");
        return Some(Finding::impossible(RULE, reason));
    }
    let mut short = Vec::new();
    if left > 0 {
        let have = if left == 1 { "has not" } else { "have not" };
        short.push(format!(
            "{} {have}: no CPU that the VM's other threads leave to it",
            counted(left, "vCPU")
        ));
    }
    if throttling == Throttling::Off {
        short.push(format!(
            "kernel.sched_rt_runtime_us = -1: while the guest computes, the kernel's own threads on {} may \
             not run at all, unless it has a fair server (Linux 6.12)",
            cpus_in_words(&on)
        ));
    }
    let run = if raised.len() == 1 { "runs" } else { "run" };
    let given = format!("{} {run} as {sched}", counted(raised.len(), "vCPU"));
    Some(if short.is_empty() {
        Finding::met(RULE, given)
    } else {
        Finding::degraded(RULE, format!("{given}; {}", short.join("; ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StartTicks, Tid};
    use crate::journal::{Memory, Record};
    use crate::knobs::priority::journal::PriorityIntent;
    use crate::plan::{PlannedVcpu, Verdict};
    use crate::policy::VcpuSched;
    use crate::scheduling::OnFork;

    fn set(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    fn sched() -> VcpuPriority {
        let sched = VcpuSched::try_from("fifo:1".to_owned()).expect("a policy");
        VcpuPriority { sched, vcpus: None }
    }

    #[test]
    fn only_the_vcpus_that_are_named_have_it() {
        let good = plan(&[("4", Why::OwnCore), ("5", Why::OwnCore)], "0-3");
        let some = |list: &str| VcpuPriority { vcpus: list.parse().ok(), ..sched() };
        let of =
            |list| raised(&good, some(list)).into_keys().map(|index| index.0).collect::<Vec<_>>();
        assert_eq!((of("1"), of("0-7"), of("2")), (vec![1], vec![0, 1], vec![]));
        let verdict = |list| finding(&good, some(list), Throttling::On).map(|found| found.verdict);
        assert_eq!(verdict("1"), Some(Verdict::Met));
        assert_eq!(verdict("2-3"), Some(Verdict::Impossible));
    }

    fn fifo() -> Scheduling {
        sched().sched.wanted().expect("a priority")
    }

    fn plan(vcpus: &[(&str, Why)], emulator: &str) -> Plan {
        let vcpus = (0..).zip(vcpus).map(|(index, (cpus, why))| PlannedVcpu {
            vcpu: VcpuIndex(index),
            cpus: set(cpus),
            why: *why,
        });
        Plan {
            vm: "100".parse().expect("a name"),
            vcpus: vcpus.collect(),
            left_alone: vec![],
            iothreads: vec![],
            iothread_cpus: set(emulator),
            emulator: set(emulator),
            exclusive: set("4-7"),
            housekeeping: set("0-3"),
            isolated: CpuSet::EMPTY,
            displaced: Vec::new(),
            memory: None,
            isolation: Level::Pinned,
            report: vec![],
        }
    }

    fn thread(tid: i32, role: Role, now: Scheduling) -> Scheduled {
        let thread = ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        Scheduled { thread, role, comm: String::new(), now }
    }

    #[test]
    fn a_vcpu_has_it_that_has_a_cpu_to_itself() {
        let of = |plan: &Plan| -> Vec<u32> {
            raised(plan, sched()).into_keys().map(|index| index.0).collect()
        };
        let good = plan(&[("4", Why::OwnCore), ("5", Why::OwnCore)], "0-3");
        assert_eq!(of(&good), [0, 1]);
        assert_eq!(raised(&good, VcpuPriority::default()), BTreeMap::new());
        assert_eq!(of(&Plan { isolation: Level::None, ..good.clone() }), [0; 0]);
        let wrapped = plan(&[("4", Why::OwnCore), ("5", Why::OwnCore), ("4", Why::Wrapped)], "0-3");
        assert_eq!(of(&wrapped), [1]);
        let overflown = plan(&[("4", Why::OwnCore), ("0-3", Why::Overflow)], "0-3");
        assert_eq!(of(&overflown), [0]);
        let beside_helpers = plan(&[("4", Why::OwnCore), ("5", Why::OwnCore)], "0-4");
        assert_eq!(of(&beside_helpers), [1]);
    }

    #[test]
    fn result_is_reported() {
        let verdict = |plan: &Plan, throttling| {
            finding(plan, sched(), throttling).map(|finding| finding.verdict)
        };
        let good = plan(&[("4", Why::OwnCore), ("5", Why::OwnCore)], "0-3");
        assert_eq!(verdict(&good, Throttling::On), Some(Verdict::Met));
        assert_eq!(verdict(&good, Throttling::Off), Some(Verdict::Degraded));
        let none = Plan { isolation: Level::None, ..good.clone() };
        assert_eq!(verdict(&none, Throttling::On), Some(Verdict::Impossible));
        let wrapped = plan(&[("4", Why::OwnCore), ("4", Why::Wrapped)], "0-3");
        assert_eq!(verdict(&wrapped, Throttling::On), Some(Verdict::Impossible));
        let partly = plan(&[("4", Why::OwnCore), ("0-3", Why::Overflow)], "0-3");
        assert_eq!(verdict(&partly, Throttling::On), Some(Verdict::Degraded));
        assert_eq!(finding(&good, VcpuPriority::default(), Throttling::Off), None);
    }

    #[test]
    fn only_vcpus_get_it_and_what_they_have_made_loses_it() {
        let raised = raised(&plan(&[("4", Why::OwnCore)], "0-3"), sched());
        let (vcpu, other) = (Role::Vcpu(VcpuIndex(0)), Scheduling::OTHER);
        let seen = |child: Scheduling| {
            vec![
                thread(1, Role::Emulator, other),
                thread(2, vcpu.clone(), other),
                thread(3, Role::Worker, child),
            ]
        };
        let before = Memory::default();
        let first = steps(&raised, seen(other), before.scheduling());
        assert_eq!(first.len(), 1, "{first:?}");
        assert_eq!((first[0].thread.tid.0, first[0].to), (2, fifo()));
        let intent = PriorityIntent { thread: first[0].thread, from: other, to: fifo() };
        let after = Memory::of(&[Record::Priorities(vec![]), Record::Priority(intent)]);
        let child = Scheduling { on_fork: OnFork::Inherit, ..fifo() };
        let mut now = seen(child);
        now[1].now = fifo();
        let second = steps(&raised, now.clone(), after.scheduling());
        assert_eq!(second.len(), 1, "{second:?}");
        assert_eq!((second[0].thread.tid.0, second[0].to), (3, other));
        // An external change is corrected, and one that is no longer wanted is undone.
        now[1].now = Scheduling { priority: 5, ..fifo() };
        assert_eq!(steps(&raised, now.clone(), after.scheduling())[0].to, fifo());
        now[1].now = fifo();
        let undone = steps(&BTreeMap::new(), now, after.scheduling());
        assert_eq!(undone.iter().map(|step| step.to).collect::<Vec<_>>(), [other, other]);
    }
}
