//! The way back from what is remembered to the fewest records that come to it: what a journal holds that is
//! written anew.

use std::collections::{BTreeMap, BTreeSet};

use super::{Baseline, Intent, Memory, Record};
use crate::cpuset::CpuSet;
use crate::ids::{StartTicks, Tid};
use crate::knobs::priority::journal::{PriorityIntent, SchedMemory};
use crate::scheduling::Scheduling;
use crate::threads::ThreadKey;

impl Memory {
    /// The records that come to this.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let threads: Vec<(Tid, StartTicks, CpuSet)> =
            self.before.iter().map(|(key, cpus)| (key.tid, key.start, **cpus)).collect();
        let mut records = Vec::new();
        match self.main {
            Some(main) => records.push(Record::Baseline(Baseline { main, threads })),
            None if threads.is_empty() => {}
            None => records.push(Record::Outside(threads)),
        }
        records.extend(self.partition().cloned().map(Record::Partition));
        records.extend(self.slices.map(Record::Slices));
        let mut written: Vec<_> = self.written.iter().collect();
        written.sort_by_key(|(_, written)| written.order);
        for (thread, written) in written {
            let intents = written.ours.iter().map(|to| Intent {
                thread: *thread,
                from: *written.from,
                to: **to,
            });
            records.extend(intents.map(Record::Intent));
        }
        records.extend(self.scheduling.records());
        records.extend(self.cookie().records().map(Record::Cookie));
        records
    }

    /// Forgets threads that have ended. What they were given is kept once: a thread that is created later may have
    /// inherited it.
    pub(super) fn forget_threads(&mut self, lives: impl Fn(ThreadKey) -> bool) {
        self.before.retain(|key, _| lives(*key));
        forget_written(&mut self.written, |written| &mut written.ours, &lives);
        self.scheduling.forget_threads(lives);
    }
}

/// Forgets the threads that have ended. A value that qmpin wrote (`ours`) is kept with one of them where no record that
/// stays has it.
fn forget_written<W, T: Clone + PartialEq>(
    written: &mut BTreeMap<ThreadKey, W>,
    ours: impl Fn(&mut W) -> &mut Vec<T>,
    lives: impl Fn(ThreadKey) -> bool,
) {
    let living: BTreeSet<ThreadKey> = written.keys().copied().filter(|key| lives(*key)).collect();
    let mut kept: Vec<T> = Vec::new();
    let mut is_new = |one: &T| {
        let is_new = !kept.contains(one);
        if is_new {
            kept.push(one.clone());
        }
        is_new
    };
    for (_, record) in written.iter_mut().filter(|(key, _)| living.contains(key)) {
        for one in ours(record) {
            is_new(one);
        }
    }
    written.retain(|key, record| {
        living.contains(key) || {
            let ours = ours(record);
            ours.retain(|one| is_new(one));
            !ours.is_empty()
        }
    });
}

impl SchedMemory {
    fn records(&self) -> Vec<Record> {
        let before = self.before.iter().map(|(key, seen)| (key.tid, key.start, *seen));
        let baseline = self.has_baseline.then(|| Record::Priorities(before.collect()));
        let written = self.written.iter().flat_map(|(thread, ours)| {
            let (thread, from) = (*thread, self.before(*thread));
            ours.iter().map(move |to| Record::Priority(PriorityIntent { thread, from, to: *to }))
        });
        baseline.into_iter().chain(written).collect()
    }

    /// As [`Memory::forget_threads`]. At least one of the threads that were changed is kept, even if all have
    /// ended, because a thread that one of them made may have its priority.
    fn forget_threads(&mut self, lives: impl Fn(ThreadKey) -> bool) {
        forget_written(&mut self.written, |ours| ours, &lives);
        let written = &self.written;
        // What had a priority of its own may have passed it on.
        self.before.retain(|key, seen| {
            lives(*key) || written.contains_key(key) || *seen != Scheduling::OTHER
        });
    }
}
