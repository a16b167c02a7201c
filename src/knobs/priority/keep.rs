//! The priority of the VM's vCPU threads: given when others are off their CPUs, kept in every pass, taken
//! back at the end.

use std::collections::{BTreeMap, BTreeSet};

use crate::journal::{Journal, JournalError, Record};
use crate::knobs::execute::{Applied, execute};
use crate::knobs::outcome::Outcome;
use crate::knobs::priority::plan::{PriorityStep, Scheduled, raised, steps};
use crate::knobs::turn::Turn;
use crate::policy::VcpuSched;
use crate::scheduling::Scheduling;
use crate::threads::ThreadKey;

/// What a pass has changed about it.
#[derive(Debug, Default)]
pub struct PriorityReport {
    /// Every change and what became of it.
    pub applied: Vec<Applied<PriorityStep>>,
    /// Changes of threads that had been as they should: another program changed them.
    pub drifted: BTreeSet<ThreadKey>,
}

/// The VM's priority, as far as it has one.
#[derive(Debug, Default)]
pub(crate) struct Priority {
    /// Whether others are off the CPUs by now.
    is_due: bool,
    /// Threads that were seen to be as they should.
    settled: BTreeMap<ThreadKey, Scheduling>,
}

impl Priority {
    /// Says that others are off the VM's CPUs, as far as they will be. Whether there is anything to do.
    pub(crate) fn begin(&mut self, sched: VcpuSched, journal: &Journal) -> bool {
        self.is_due = sched != VcpuSched::Other || !journal.memory().scheduling().is_empty();
        self.is_due
    }

    /// Gives and takes, where that is not so.
    pub(crate) fn converge(
        &mut self,
        turn: &Turn<'_>,
        journal: &mut Journal,
    ) -> Result<PriorityReport, JournalError> {
        let Turn { bench, plan, snapshot, .. } = *turn;
        let priority = turn.policy.priority();
        if !self.is_due {
            return Ok(PriorityReport::default());
        }
        let seen: Vec<Scheduled> = snapshot
            .threads
            .iter()
            .filter_map(|thread| {
                // One that cannot be asked has ended, or will be asked in the next pass.
                let now = bench.sched.scheduling(thread.key.tid).ok()?;
                let (role, comm) = (thread.role.clone(), thread.comm.clone());
                Some(Scheduled { thread: thread.key, role, comm, now })
            })
            .collect();
        // How every thread is scheduled goes into the journal with the first change.
        let is_first = !journal.memory().scheduling().has_baseline();
        let before = || seen.iter().map(|one| (one.thread.tid, one.thread.start, one.now));
        let baseline = is_first.then(|| Record::Priorities(before().collect()));
        let raised = raised(plan, priority);
        let mut settled: BTreeMap<ThreadKey, Scheduling> =
            seen.iter().map(|one| (one.thread, one.now)).collect();
        let steps = steps(&raised, seen, journal.memory().scheduling());
        let drifted = steps
            .iter()
            .filter(|step| self.settled.get(&step.thread) == Some(&step.to))
            .map(|step| step.thread)
            .collect();
        let baseline = baseline.filter(|_| !steps.is_empty());
        let applied = execute(bench, journal, baseline, steps)?;
        for Applied { step, outcome } in &applied {
            match outcome {
                Outcome::Done => settled.insert(step.thread, step.to),
                _ => settled.remove(&step.thread),
            };
        }
        self.settled = settled;
        Ok(PriorityReport { applied, drifted })
    }
}
