//! The way back from what is remembered to the fewest records that come to it: what a journal holds that is
//! written anew.

use std::collections::HashSet;

use super::{Baseline, Intent, Memory, Record};
use crate::cpuset::CpuSet;
use crate::ids::{StartTicks, Tid};
use crate::knobs::priority::journal::{PriorityIntent, SchedMemory};
use crate::mask::Mask;
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
        let mut kept: HashSet<Mask> = HashSet::new();
        let ended: Vec<ThreadKey> = self
            .written
            .iter()
            .filter(|(key, written)| {
                let is_needed = lives(**key);
                if is_needed {
                    kept.extend(written.ours.iter().cloned());
                }
                !is_needed
            })
            .map(|(key, _)| *key)
            .collect();
        for key in ended {
            let is_needed = self.written.get_mut(&key).is_some_and(|written| {
                written.ours.retain(|mask| kept.insert(mask.clone()));
                !written.ours.is_empty()
            });
            if !is_needed {
                self.written.remove(&key);
            }
        }
        self.scheduling.forget_threads(lives);
    }
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
        let mut kept = Vec::new();
        for (key, ours) in &self.written {
            if lives(*key) {
                kept.extend(ours.iter().copied());
            }
        }
        self.written.retain(|key, ours| {
            lives(*key) || {
                ours.retain(|ours| {
                    let is_new = !kept.contains(ours);
                    if is_new {
                        kept.push(*ours);
                    }
                    is_new
                });
                !ours.is_empty()
            }
        });
        let written = &self.written;
        // What had a priority of its own may have passed it on.
        self.before.retain(|key, seen| {
            lives(*key) || written.contains_key(key) || *seen != Scheduling::OTHER
        });
    }
}
