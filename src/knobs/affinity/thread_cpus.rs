//! Where a VM's threads are after a pass: what the kernel says, and not what was planned.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::knobs::affinity::diff::MaskStep;
use crate::knobs::execute::Applied;
use crate::knobs::outcome::Outcome;
use crate::mask::Mask;
use crate::plan::Plan;
use crate::threads::{Role, Thread, ThreadKey};

/// The CPUs that the threads of each kind may run on. Empty: there is no such thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThreadCpus {
    /// Those of vCPUs.
    pub vcpus: CpuSet,
    /// Those of iothreads.
    pub iothreads: CpuSet,
    /// Those of all other threads of QEMU.
    pub emulator: CpuSet,
}

impl ThreadCpus {
    /// Of threads as they were read, and what was written since. vCPUs that the plan leaves alone do not count.
    #[must_use]
    pub fn of<'a>(
        plan: &Plan,
        threads: impl IntoIterator<Item = &'a Thread>,
        applied: &[Applied<MaskStep>],
    ) -> ThreadCpus {
        let written = applied.iter().filter_map(|one| match &one.outcome {
            Outcome::Done => Some((one.step.thread, &one.step.to)),
            Outcome::Narrowed { to } => Some((one.step.thread, to)),
            Outcome::Gone | Outcome::Pending { .. } | Outcome::Refused { .. } => None,
        });
        let written: BTreeMap<ThreadKey, &Mask> = written.collect();
        let mut placed = ThreadCpus::default();
        for thread in threads {
            let cpus = **written.get(&thread.key).copied().unwrap_or(&thread.allowed);
            match &thread.role {
                Role::Vcpu(index) if plan.left_alone.contains(index) => {}
                Role::Vcpu(_) => placed.vcpus |= cpus,
                Role::Iothread(_) => placed.iothreads |= cpus,
                Role::Emulator | Role::Worker | Role::Vhost => placed.emulator |= cpus,
                // The kernel's own may be bound to every CPU.
                Role::Kernel => {}
            }
        }
        placed
    }

    /// Where vCPUs are: the VM's own CPUs where none is elsewhere.
    #[must_use]
    pub fn vcpus_in_words(&self, plan: &Plan) -> String {
        let planned = plan.vcpus.iter().fold(plan.exclusive, |all, planned| all | planned.cpus);
        if self.vcpus.is_subset(&plan.exclusive) {
            return plan.exclusive.to_string();
        }
        in_words(self.vcpus, self.vcpus, planned, plan.exclusive)
    }

    /// Where QEMU's other threads are. Workers that an iothread has made may be where it is.
    #[must_use]
    pub fn emulator_in_words(&self, plan: &Plan) -> String {
        let planned = plan.emulator | plan.iothread_cpus;
        in_words(self.emulator, plan.emulator, planned, plan.emulator)
    }

    /// All of it in a sentence, beside what was planned where that is something else.
    #[must_use]
    pub fn in_words(&self, plan: &Plan) -> String {
        let mut text = format!("vCPUs on {}", self.vcpus_in_words(plan));
        if !self.iothreads.is_empty() {
            let planned = plan.iothread_cpus;
            let iothreads = in_words(self.iothreads, planned, planned, planned);
            text.push_str(&format!(", iothreads on {iothreads}"));
        }
        text.push_str(&format!(", emulator on {}", self.emulator_in_words(plan)));
        text
    }
}

/// The CPUs `as_planned` where all of `found` is allowed; else those that were found, and those that were planned.
fn in_words(found: CpuSet, as_planned: CpuSet, allowed: CpuSet, planned: CpuSet) -> String {
    if found.is_subset(&allowed) {
        as_planned.to_string()
    } else {
        format!("{found} (planned: {planned})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{IothreadId, StartTicks, Tid, VcpuIndex};
    use crate::plan::{PlannedIothread, PlannedVcpu, Why};
    use crate::policy::Level;

    fn set(text: &str) -> CpuSet {
        text.parse().expect("a cpulist")
    }

    fn plan() -> Plan {
        let planned = |(index, cpus): (u32, &str)| PlannedVcpu {
            vcpu: VcpuIndex(index),
            cpus: set(cpus),
            why: Why::OwnCore,
        };
        Plan {
            vm: "100".parse().expect("a name"),
            vcpus: [(0, "12"), (1, "14")].map(planned).to_vec(),
            left_alone: vec![VcpuIndex(2)],
            iothreads: vec![PlannedIothread {
                iothread: IothreadId("io".to_owned()),
                cpus: set("0-3"),
            }],
            iothread_cpus: set("0-3"),
            emulator: set("4-11"),
            exclusive: set("12-15"),
            housekeeping: set("0-11"),
            isolated: CpuSet::EMPTY,
            displaced: Vec::new(),
            memory: None,
            isolation: Level::Pinned,
            report: Vec::new(),
        }
    }

    fn thread((tid, role, allowed): (i32, Role, &str)) -> Thread {
        let key = ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        Thread { key, role, comm: String::new(), allowed: set(allowed).into(), last_cpu: None }
    }

    fn applied(thread: &Thread, to: &str, outcome: Outcome<Mask>) -> Applied<MaskStep> {
        let Thread { key, role, comm, allowed, .. } = thread.clone();
        Applied {
            step: MaskStep { thread: key, role, comm, from: allowed, to: set(to).into() },
            outcome,
        }
    }

    #[test]
    fn a_thread_that_was_refused_is_where_it_was() {
        let plan = plan();
        let threads = [
            (1, Role::Emulator, "2-16"),
            (2, Role::Vcpu(VcpuIndex(0)), "2-16"),
            (3, Role::Vcpu(VcpuIndex(1)), "2-16"),
            (4, Role::Vcpu(VcpuIndex(2)), "0-23"),
            (5, Role::Iothread(IothreadId("io".to_owned())), "2-16"),
            (6, Role::Kernel, "0-23"),
        ]
        .map(thread);
        let done = |at: usize, to: &str| applied(&threads[at], to, Outcome::Done);
        let refused = |at: usize, to: &str| {
            let error = std::io::ErrorKind::InvalidInput.into();
            applied(&threads[at], to, Outcome::Refused { error })
        };
        let well = [done(0, "4-11"), done(1, "12"), done(2, "14"), done(4, "0-3")];
        let all = ThreadCpus::of(&plan, &threads, &well).in_words(&plan);
        assert_eq!(all, "vCPUs on 12-15, iothreads on 0-3, emulator on 4-11");
        let none = [refused(0, "4-11"), refused(1, "12"), refused(2, "14"), refused(4, "0-3")];
        let none = ThreadCpus::of(&plan, &threads, &none).in_words(&plan);
        let was = "vCPUs on 2-16 (planned: 12-15), iothreads on 2-16 (planned: 0-3), emulator on 2-16 (planned: 4-11)";
        assert_eq!(none, was);
        let narrowed = applied(&threads[0], "4-11", Outcome::Narrowed { to: set("4-5").into() });
        let some = [narrowed, done(1, "12"), refused(2, "14"), done(4, "0-3")];
        let some = ThreadCpus::of(&plan, &threads, &some).in_words(&plan);
        assert!(some.starts_with("vCPUs on 2-16 (planned: 12-15), iothreads on 0-3"), "{some}");
        let without = ThreadCpus::of(&plan, &threads[..3], &[]).in_words(&plan);
        assert!(!without.contains("iothreads"), "{without}");
    }
}
