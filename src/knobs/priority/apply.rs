//! The knob *sched*: how one thread is scheduled, by `sched_setscheduler(2)`.

use std::io;

use crate::journal::Record;
use crate::knobs::bench::Bench;
use crate::knobs::execute::Step;
use crate::knobs::outcome::Outcome;
use crate::knobs::priority::journal::PriorityIntent;
use crate::knobs::priority::plan::PriorityStep;
use crate::scheduling::{Class, Scheduling};

impl Step for PriorityStep {
    type Bench<'a> = Bench<'a>;
    type Record = Record;
    type Outcome = Outcome<Scheduling>;

    fn undo(&self) -> Option<Record> {
        let intent = PriorityIntent { thread: self.thread, from: self.from, to: self.to };
        Some(Record::Priority(intent))
    }

    fn carry_out(&self, bench: &mut Bench<'_>) -> Outcome<Scheduling> {
        if self.from.class == Class::Deadline {
            // Its budget would be lost: only its owner can restore it.
            let reason = "it has a deadline, which could not be restored";
            let error = io::Error::new(io::ErrorKind::InvalidInput, reason);
            return Outcome::Refused { error };
        }
        bench.set(self.thread, &self.to, |now| *now == self.to)
    }
}
