//! What to do with one thread, from what the journal remembers. Pure.

use std::collections::{BTreeMap, HashSet};

use crate::cpuset::CpuSet;
use crate::journal::{Intent, Record};
use crate::threads::ThreadKey;

/// What the journal remembers, sorted by thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    main: Option<CpuSet>,
    untouched: BTreeMap<ThreadKey, CpuSet>,
    written: BTreeMap<ThreadKey, Written>,
    ours: HashSet<CpuSet>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    order: usize,
    before: CpuSet,
    ours: Vec<CpuSet>,
}

/// What to do with a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is as it was before.
    Nothing,
    /// It is as qmpin left it.
    PutBack {
        /// The mask it had before.
        to: CpuSet,
    },
    /// It is as somebody else left it.
    LeaveAlone {
        /// The mask it had before.
        before: CpuSet,
    },
}

impl Memory {
    /// Sorts a journal's records.
    #[must_use]
    pub fn of(records: impl IntoIterator<Item = Record>) -> Memory {
        let mut memory = Memory::default();
        for record in records {
            match record {
                // The first baseline is that of the process; later ones add threads found since, such
                // as kernel threads.
                Record::Baseline(baseline) => {
                    memory.main.get_or_insert(baseline.main);
                    for (tid, start, cpus) in baseline.threads {
                        memory.untouched.entry(ThreadKey { tid, start }).or_insert(cpus);
                    }
                }
                Record::Intent(intent) | Record::Narrowed(intent) => memory.remember(&intent),
            }
        }
        memory
    }

    fn remember(&mut self, intent: &Intent) {
        let order = self.written.len();
        let before = self.untouched.get(&intent.thread).copied();
        // A thread that was not there at the start was born with a mask that is already ours; what it
        // would have had is the main thread's.
        let before = before.or(self.main).unwrap_or(intent.from);
        let written = self.written.entry(intent.thread).or_insert_with(|| Written {
            order,
            before,
            ours: Vec::new(),
        });
        if !written.ours.contains(&intent.to) {
            written.ours.push(intent.to);
        }
        self.ours.insert(intent.to);
    }

    /// The threads that were written.
    pub fn written(&self) -> impl Iterator<Item = ThreadKey> + '_ {
        self.written.keys().copied()
    }

    /// When the thread was first written; one that never was comes last.
    #[must_use]
    pub fn order(&self, key: ThreadKey) -> usize {
        self.written.get(&key).map_or(usize::MAX, |written| written.order)
    }

    /// What to do with a thread that now has the mask `found`. Masks are compared on the `online`
    /// CPUs: the kernel shows no others.
    #[must_use]
    pub fn decide(&self, key: ThreadKey, found: &CpuSet, online: &CpuSet) -> Decision {
        let same = |other: &CpuSet| *found & *online == *other & *online;
        if let Some(written) = self.written.get(&key) {
            return if same(&written.before) {
                Decision::Nothing
            } else if written.ours.iter().any(same) {
                Decision::PutBack { to: written.before }
            } else {
                Decision::LeaveAlone { before: written.before }
            };
        }
        if let Some(before) = self.untouched.get(&key) {
            return if same(before) {
                Decision::Nothing
            } else {
                Decision::LeaveAlone { before: *before }
            };
        }
        let Some(main) = self.main else { return Decision::Nothing };
        if same(&main) {
            Decision::Nothing
        } else if self.ours.iter().any(same) {
            Decision::PutBack { to: main }
        } else {
            Decision::LeaveAlone { before: main }
        }
    }
}
