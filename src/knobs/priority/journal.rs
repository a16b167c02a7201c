//! What the journal remembers of how threads were scheduled: the part of [`crate::journal::Memory`] that is about
//! that.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{StartTicks, Tid};
use crate::scheduling::Scheduling;
use crate::threads::ThreadKey;

/// A change of how a thread is scheduled, about to happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PriorityIntent {
    /// Which thread.
    pub thread: ThreadKey,
    /// What was seen.
    pub from: Scheduling,
    /// What it is to have.
    pub to: Scheduling,
}

/// How threads were scheduled, and what of it is our doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SchedMemory {
    pub(crate) has_baseline: bool,
    pub(crate) before: BTreeMap<ThreadKey, Scheduling>,
    pub(crate) written: BTreeMap<ThreadKey, Vec<Scheduling>>,
}

impl SchedMemory {
    pub(crate) fn add_baseline(&mut self, threads: &[(Tid, StartTicks, Scheduling)]) {
        self.has_baseline = true;
        for (tid, start, seen) in threads {
            self.before.entry(ThreadKey { tid: *tid, start: *start }).or_insert(*seen);
        }
    }

    pub(crate) fn add(&mut self, intent: &PriorityIntent) {
        // One that was plugged later is seen first as it is first written.
        self.before.entry(intent.thread).or_insert(intent.from);
        let written = self.written.entry(intent.thread).or_default();
        if !written.contains(&intent.to) {
            written.push(intent.to);
        }
    }

    /// Whether restoring would come out right without this line.
    pub(crate) fn covers(&self, intent: &PriorityIntent) -> bool {
        // Back to what it was before, or what it would have had: no line says more about that.
        intent.to == self.before(intent.thread)
            || self.written.get(&intent.thread).is_some_and(|ours| ours.contains(&intent.to))
    }

    /// Whether it is known how all threads were scheduled before the first change.
    #[must_use]
    pub fn has_baseline(&self) -> bool {
        self.has_baseline
    }

    /// Whether nothing was ever changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.written.is_empty()
    }

    /// What the thread had before the first change. One created later would have had nothing special.
    #[must_use]
    pub fn before(&self, key: ThreadKey) -> Scheduling {
        self.before.get(&key).copied().unwrap_or(Scheduling::OTHER)
    }

    /// Whether the thread was changed.
    #[must_use]
    pub fn has_written(&self, key: ThreadKey) -> bool {
        self.written.contains_key(&key)
    }

    /// Whether what the thread has now is qmpin's doing: given to it, or to the thread that made it.
    ///
    /// What is made by a thread of ours has none of it (`SCHED_RESET_ON_FORK`), unless another program has
    /// taken that off. And where another thread had the same before qmpin, it may be that one's child.
    #[must_use]
    pub fn is_ours(&self, key: ThreadKey, now: &Scheduling) -> bool {
        match (self.written.get(&key), self.before.contains_key(&key)) {
            (Some(ours), _) => ours.iter().any(|ours| ours.runs_as(now)),
            (None, true) => false,
            (None, false) => {
                let theirs = self.before.iter().filter(|(other, _)| !self.has_written(**other));
                self.written.values().flatten().any(|ours| ours.runs_as(now))
                    && !theirs.map(|(_, seen)| seen).any(|seen| seen.runs_as(now))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::VcpuSched;
    use crate::scheduling::OnFork;

    fn key(tid: i32) -> ThreadKey {
        ThreadKey { tid: Tid(tid), start: StartTicks(7) }
    }

    fn fifo() -> Scheduling {
        VcpuSched::try_from("fifo:1".to_owned()).ok().and_then(VcpuSched::wanted).expect("a policy")
    }

    fn memory(main: Scheduling) -> SchedMemory {
        let mut memory = SchedMemory::default();
        let other = Scheduling::OTHER;
        memory.add_baseline(&[(Tid(1), StartTicks(7), main), (Tid(2), StartTicks(7), other)]);
        memory.add(&PriorityIntent { thread: key(2), from: Scheduling::OTHER, to: fifo() });
        memory
    }

    #[test]
    fn what_was_given_is_ours_and_what_was_there_is_not() {
        let memory = memory(Scheduling::OTHER);
        let without_flag = Scheduling { on_fork: OnFork::Inherit, ..fifo() };
        assert!(memory.is_ours(key(2), &fifo()) && memory.is_ours(key(2), &without_flag));
        assert!(!memory.is_ours(key(2), &Scheduling { priority: 2, ..fifo() }));
        assert!(!memory.is_ours(key(1), &fifo()), "never written");
        assert!(memory.is_ours(key(3), &without_flag), "a child");
        assert_eq!(memory.before(key(3)), Scheduling::OTHER);
    }

    #[test]
    fn thread_created_later_may_have_it_from_another_program() {
        let memory = memory(fifo());
        assert!(!memory.is_ours(key(3), &fifo()));
        assert!(memory.is_ours(key(2), &fifo()));
    }

    #[test]
    fn a_line_is_written_once() {
        let memory = memory(Scheduling::OTHER);
        let intent = |tid, to| PriorityIntent { thread: key(tid), from: Scheduling::OTHER, to };
        assert!(memory.covers(&intent(2, fifo())));
        assert!(memory.covers(&intent(2, Scheduling::OTHER)));
        assert!(memory.covers(&intent(9, Scheduling::OTHER)));
        assert!(!memory.covers(&intent(9, fifo())));
    }
}
