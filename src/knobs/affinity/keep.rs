//! The masks of the VM's threads, kept in every pass.

use std::collections::{BTreeMap, BTreeSet};

use crate::journal::{Journal, JournalError, Record};
use crate::knobs::affinity::diff::{MaskStep, desired, diff};
use crate::knobs::affinity::limit::Limit;
use crate::knobs::affinity::thread_cpus::ThreadCpus;
use crate::knobs::execute::{Applied, execute};
use crate::knobs::turn::Turn;
use crate::mask::{Mask, Masks};
use crate::plan::Plan;
use crate::threads::{Thread, ThreadKey};

/// What a pass has changed about them.
#[derive(Debug, Default)]
pub struct AffinityReport {
    /// Every step and what became of it.
    pub applied: Vec<Applied<MaskStep>>,
    /// Steps for threads that had been where they belong: another program moved them.
    pub drifted: BTreeSet<ThreadKey>,
    /// Which threads cannot be pinned where they belong, because the VM's cgroup does not allow it.
    pub barred: Vec<String>,
    /// Where the VM's threads are now.
    pub placed: ThreadCpus,
}

/// The VM's masks.
#[derive(Debug, Default)]
pub(crate) struct Affinity {
    /// What the VM's cgroup allows.
    pub(crate) limit: Limit,
    /// Where each thread was seen to be, when that was where it belongs.
    settled: BTreeMap<ThreadKey, Mask>,
    /// Where the threads are.
    placed: ThreadCpus,
}

impl Affinity {
    /// Before the first pass.
    pub(crate) fn within(limit: Limit) -> Affinity {
        Affinity { limit, ..Affinity::default() }
    }

    /// Where the threads are after the last pass.
    pub(crate) fn placed(&self) -> ThreadCpus {
        self.placed
    }

    /// Takes masks that the kernel changes by itself, as it limits units, for no other program's doing.
    pub(crate) fn expect_changes(&mut self) {
        self.settled.clear();
    }

    /// Pins what is not where the plan has it. The baseline, where there is none yet, is journalled first.
    pub(crate) fn converge(
        &mut self,
        turn: &Turn<'_>,
        journal: &mut Journal,
        baseline: Option<Record>,
    ) -> Result<AffinityReport, JournalError> {
        let Turn { plan, snapshot, bench, .. } = *turn;
        let of_process: BTreeSet<ThreadKey> =
            snapshot.threads.iter().map(|thread| thread.key).collect();
        // Kernel threads are read here: a partition that was just built has moved them.
        let now = |thread: &Thread| {
            let allowed = bench.sched.affinity(thread.key.tid).ok()?.into();
            Some(Thread { allowed, ..thread.clone() })
        };
        let outside: Vec<Thread> = snapshot.outside.iter().filter_map(now).collect();
        let threads = || snapshot.threads.iter().chain(&outside);
        let mut steps = diff(plan, turn.ground.process.pid, threads(), &snapshot.online);
        let is_drift =
            |step: &&MaskStep| self.settled.get(&step.thread).is_some_and(|cpus| *cpus == step.to);
        let drifted = steps.iter().filter(is_drift).map(|step| step.thread).collect();
        self.settled = settled(plan, threads(), &steps);
        let barred = self.limit.bar(&mut steps, &of_process);
        let applied = execute(bench, journal, baseline, steps)?;
        for applied in applied.iter().filter(|applied| !applied.fell_short()) {
            self.settled.insert(applied.step.thread, applied.step.to.clone());
        }
        self.placed = ThreadCpus::of(plan, threads(), &applied);
        Ok(AffinityReport { applied, drifted, barred, placed: self.placed })
    }
}

fn settled<'a>(
    plan: &Plan,
    threads: impl Iterator<Item = &'a Thread>,
    steps: &[MaskStep],
) -> BTreeMap<ThreadKey, Mask> {
    let mut masks = Masks::default();
    let moving: BTreeSet<ThreadKey> = steps.iter().map(|step| step.thread).collect();
    threads
        .filter(|thread| !moving.contains(&thread.key))
        .filter_map(|thread| Some((thread.key, masks.of(desired(plan, &thread.role)?))))
        .collect()
}
