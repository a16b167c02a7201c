//! What the journal remembers of each thread. The same memory shows the writer what need not be written
//! again, and `restore` what was before.

use std::collections::{BTreeMap, HashSet};

use super::{Intent, PartitionUndo, Record, UnknownLines};
use crate::cpuset::CpuSet;
use crate::ids::{StartTicks, Tid};
use crate::knobs::core_scheduling::journal::CookieMemory;
use crate::knobs::priority::journal::SchedMemory;
use crate::mask::{Mask, Masks};
use crate::threads::ThreadKey;

/// What the journal remembers, sorted by thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub(super) main: Option<CpuSet>,
    pub(super) before: BTreeMap<ThreadKey, Mask>,
    pub(super) written: BTreeMap<ThreadKey, Written>,
    pub(super) written_len: usize,
    pub(super) ours: HashSet<Mask>,
    partition: Option<PartitionUndo>,
    /// The CPUs from which systemd was to exclude others, where it was.
    pub(super) slices: Option<CpuSet>,
    pub(super) scheduling: SchedMemory,
    cookie: CookieMemory,
    pub(super) unknown: Option<UnknownLines>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) order: usize,
    pub(super) from: Mask,
    pub(super) ours: Vec<Mask>,
}

impl Memory {
    /// Sorts a journal's records.
    #[must_use]
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Memory {
        let mut memory = Memory::default();
        for record in records {
            memory.add(record);
        }
        memory
    }

    /// Adds one record.
    pub fn add(&mut self, record: &Record) {
        match record {
            Record::Baseline(baseline) => {
                self.main.get_or_insert(baseline.main);
                self.add_before(&baseline.threads);
            }
            Record::Outside(threads) => self.add_before(threads),
            Record::Intent(intent) | Record::Narrowed(intent) => {
                let to = self.shared(intent.to);
                let before = self.before.get(&intent.thread);
                let from = before.filter(|before| ***before == intent.from).cloned();
                let from = from.unwrap_or_else(|| intent.from.into());
                let order = self.written_len;
                let written = self.written.entry(intent.thread).or_insert_with(|| {
                    self.written_len += 1;
                    Written { order, from, ours: Vec::with_capacity(1) }
                });
                if !written.ours.contains(&to) {
                    written.ours.push(to);
                }
            }
            // What was before is in the first; what was ours is in all of them.
            Record::Partition(undo) => {
                let known = self.partition.get_or_insert_with(|| undo.clone());
                known.cpus |= undo.cpus;
                if known.drop_in.is_none() {
                    known.drop_in.clone_from(&undo.drop_in);
                }
                known.allowed_set = known.allowed_set.or(undo.allowed_set);
            }
            Record::Slices(cpus) => *self.slices.get_or_insert(CpuSet::EMPTY) |= *cpus,
            Record::Priorities(threads) => self.scheduling.add_baseline(threads),
            Record::Priority(intent) => self.scheduling.add(intent),
            Record::Cookie(record) => self.cookie.add(*record),
        }
    }

    fn add_before(&mut self, threads: &[(Tid, StartTicks, CpuSet)]) {
        let mut masks = Masks::default();
        for (tid, start, cpus) in threads {
            let key = ThreadKey { tid: *tid, start: *start };
            self.before.entry(key).or_insert_with(|| masks.of(*cpus));
        }
    }

    /// A mask that is written by qmpin, with the memory that all of these share.
    fn shared(&mut self, cpus: CpuSet) -> Mask {
        if let Some(known) = self.ours.get(&cpus) {
            return known.clone();
        }
        let mask = Mask::from(cpus);
        self.ours.insert(mask.clone());
        mask
    }

    /// Whether the masks before the first write are known.
    #[must_use]
    pub fn has_baseline(&self) -> bool {
        self.main.is_some()
    }

    /// The partition that may have been made; its `cpus` are all that it ever had.
    #[must_use]
    pub fn partition(&self) -> Option<&PartitionUndo> {
        self.partition.as_ref()
    }

    /// Whether systemd was to exclude others from the VM's CPUs.
    #[must_use]
    pub fn has_slices(&self) -> bool {
        self.slices.is_some()
    }

    /// Lines of the file that this qmpin does not know how to undo.
    #[must_use]
    pub fn unknown(&self) -> Option<&UnknownLines> {
        self.unknown.as_ref()
    }

    /// All masks that qmpin has written.
    pub fn masks(&self) -> impl Iterator<Item = CpuSet> + '_ {
        self.ours.iter().map(|mask| **mask)
    }

    /// How threads were scheduled, and what of it qmpin wrote.
    #[must_use]
    pub fn scheduling(&self) -> &SchedMemory {
        &self.scheduling
    }

    /// The core-scheduling cookies that qmpin made.
    #[must_use]
    pub fn cookie(&self) -> &CookieMemory {
        &self.cookie
    }

    /// The main thread's mask before the first write.
    #[must_use]
    pub fn main(&self) -> Option<CpuSet> {
        self.main
    }

    /// Whether the thread was there before the first write.
    #[must_use]
    pub fn knows(&self, key: ThreadKey) -> bool {
        self.before.contains_key(&key)
    }

    /// Whether restoring would come out right without this record. It keeps the journal of a VM whose
    /// workers come and go all day from growing: a thread created later needs no line of its own, as long
    /// as its mask is known to be one that qmpin wrote.
    #[must_use]
    pub fn covers(&self, intent: &Intent) -> bool {
        self.is_ours(intent.thread, |ours| *ours == intent.to)
    }

    /// The mask the thread had before, or would have had without qmpin: one created later inherits the
    /// main thread's. `None` before there is a baseline, when nothing has been written yet.
    #[must_use]
    pub fn before(&self, key: ThreadKey) -> Option<CpuSet> {
        self.before.get(&key).map(|mask| **mask).or(self.main)
    }

    /// Whether qmpin may have given the thread a mask that satisfies `same`. A thread created later may
    /// have inherited any that qmpin wrote.
    pub fn is_ours(&self, key: ThreadKey, mut same: impl FnMut(&CpuSet) -> bool) -> bool {
        let same = |mask: &Mask| same(mask);
        if self.knows(key) {
            let written = self.written.get(&key);
            written.is_some_and(|written| written.ours.iter().any(same))
        } else {
            self.ours.iter().any(same)
        }
    }

    /// The threads that were there before, or were written since.
    pub fn threads(&self) -> impl Iterator<Item = ThreadKey> + '_ {
        let since = self.written.keys().filter(|key| !self.knows(**key));
        self.before.keys().chain(since).copied()
    }

    /// When the thread was first written; one that never was comes last.
    #[must_use]
    pub fn order(&self, key: ThreadKey) -> usize {
        self.written.get(&key).map_or(usize::MAX, |written| written.order)
    }
}
