//! The knob *affinity*: one thread's mask, by `sched_setaffinity(2)`.

use std::io;

use crate::cgroups::CgroupTree;
use crate::discover::cpusets;
use crate::journal::{Intent, Record};
use crate::knobs::affinity::diff::MaskStep;
use crate::knobs::bench::Bench;
use crate::knobs::execute::Step;
use crate::knobs::outcome::Outcome;
use crate::mask::Mask;

impl Step for MaskStep {
    type Bench<'a> = Bench<'a>;
    type Record = Record;
    type Outcome = Outcome<Mask>;

    fn undo(&self) -> Option<Record> {
        let intent = Intent { thread: self.thread, from: *self.from, to: *self.to };
        Some(Record::Intent(intent))
    }

    fn carry_out(&self, bench: &mut Bench<'_>) -> Outcome<Mask> {
        match bench.set(self.thread, &self.to, |now| *now == self.to) {
            Outcome::Refused { error } => {
                Outcome::Refused { error: with_cause(bench, self, error) }
            }
            outcome => outcome,
        }
    }

    /// What the kernel made of a mask of qmpin counts as qmpin's, too: restore must know it again.
    fn noted(&self, outcome: &Outcome<Mask>) -> Option<Record> {
        let Outcome::Narrowed { to } = outcome else { return None };
        let intent = Intent { thread: self.thread, from: *self.from, to: **to };
        Some(Record::Narrowed(intent))
    }
}

/// `EINVAL` says that the thread's cpuset has none of these CPUs: names the cgroup.
fn with_cause(bench: &Bench<'_>, step: &MaskStep, error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(nix::libc::EINVAL) {
        return error;
    }
    let (tree, pid) = (CgroupTree::of(bench.root), bench.process.pid);
    match cpusets::forbidden_by(bench.root, &tree, pid, step.thread.tid, &step.to) {
        Some(why) => io::Error::new(error.kind(), format!("{error}: {why}")),
        None => error,
    }
}
