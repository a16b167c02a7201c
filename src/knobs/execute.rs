//! The one executor: carries out the steps of every knob in their order, and chooses nothing.
//!
//! ```text
//!   steps ──▶ the undo of all of them durable ──▶ for each: check, write, read back ──▶ what came of it noted
//! ```
//!
//! A step the kernel refuses is an outcome, not an error; the rest goes on. Only a journal that cannot be written stops
//! everything, before the first write. A new knob says what a step of its own is ([`Step`]), and this order is kept for
//! it.

use crate::journal::{Journal, JournalError, Record};

/// How many records are made durable at once: a VM may have very many threads.
const RECORDS_AT_A_TIME: usize = 1024;

/// What the executor has to know of a knob's step.
pub trait Step {
    /// What it is carried out with.
    type Bench<'a>;
    /// A line of the journal that has its undo.
    type Record;
    /// What may become of it.
    type Outcome;

    /// What has to be durable before it; `None` where that is so already, or there is nothing to undo.
    fn undo(&self) -> Option<Self::Record>;

    /// Checks, writes, reads back.
    fn carry_out(&self, bench: &mut Self::Bench<'_>) -> Self::Outcome;

    /// What a restore has to know of the outcome beside the undo.
    fn noted(&self, _outcome: &Self::Outcome) -> Option<Self::Record> {
        None
    }
}

/// A step and what became of it.
#[derive(Debug)]
pub struct Applied<S: Step> {
    /// The step.
    pub step: S,
    /// What became of it.
    pub outcome: S::Outcome,
}

/// A journal as the executor needs it.
pub trait Undo {
    /// One line of it.
    type Record;

    /// Adds records, all or none, and returns once they are durable.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing may be written to any knob.
    fn append(&mut self, records: Vec<Self::Record>) -> Result<(), JournalError>;
}

impl Undo for Journal {
    type Record = Record;

    fn append(&mut self, records: Vec<Record>) -> Result<(), JournalError> {
        Journal::append(self, records)
    }
}

/// Carries out steps. `first` goes into the journal before their undo, also where there are none.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable, and then nothing was written; or where it could not be
/// noted what came of the steps.
pub fn execute<S: Step>(
    mut bench: S::Bench<'_>,
    journal: &mut impl Undo<Record = S::Record>,
    first: Option<S::Record>,
    steps: Vec<S>,
) -> Result<Vec<Applied<S>>, JournalError> {
    make_durable(journal, first, &steps)?;
    let applied = carry_out(&mut bench, steps);
    journal.append(applied.iter().filter_map(|one| one.step.noted(&one.outcome)).collect())?;
    Ok(applied)
}

/// Makes the undo of steps durable.
///
/// # Errors
/// [`JournalError`]; then none of them may be carried out.
pub fn make_durable<S: Step>(
    journal: &mut impl Undo<Record = S::Record>,
    first: Option<S::Record>,
    steps: &[S],
) -> Result<(), JournalError> {
    let mut records = first.into_iter().chain(steps.iter().filter_map(Step::undo));
    loop {
        let some: Vec<S::Record> = records.by_ref().take(RECORDS_AT_A_TIME).collect();
        if some.is_empty() {
            return Ok(());
        }
        journal.append(some)?;
    }
}

/// Carries out steps whose undo is durable.
pub fn carry_out<S: Step>(bench: &mut S::Bench<'_>, steps: Vec<S>) -> Vec<Applied<S>> {
    let one = |step: S| Applied { outcome: step.carry_out(bench), step };
    steps.into_iter().map(one).collect()
}

/// The same up to the first one whose outcome is a refusal, for steps that stand on each other.
pub fn carry_out_in_turn<S, E>(bench: &mut S::Bench<'_>, steps: Vec<S>) -> Vec<Applied<S>>
where
    S: Step<Outcome = Result<(), E>>,
{
    let mut applied = Vec::new();
    for step in steps {
        let outcome = step.carry_out(bench);
        let is_refused = outcome.is_err();
        applied.push(Applied { step, outcome });
        if is_refused {
            break;
        }
    }
    applied
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::path::PathBuf;

    use super::*;

    /// What happened, in its order.
    type Log = RefCell<Vec<String>>;

    struct Paper<'a> {
        log: &'a Log,
        appends_left: usize,
    }

    impl Undo for Paper<'_> {
        type Record = String;

        fn append(&mut self, records: Vec<String>) -> Result<(), JournalError> {
            if self.appends_left == 0 {
                let (path, source) = (PathBuf::from("x"), io::ErrorKind::StorageFull.into());
                return Err(JournalError::Io { action: "write", path, source });
            }
            self.appends_left -= 1;
            self.log.borrow_mut().extend(records);
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Write(usize);

    impl Step for Write {
        type Bench<'a> = &'a Log;
        type Record = String;
        type Outcome = bool;

        fn undo(&self) -> Option<String> {
            (self.0 > 0).then(|| format!("undo {}", self.0))
        }

        fn carry_out(&self, log: &mut &Log) -> bool {
            log.borrow_mut().push(format!("write {}", self.0));
            self.0.is_multiple_of(2)
        }

        fn noted(&self, is_even: &bool) -> Option<String> {
            (!is_even).then(|| format!("noted {}", self.0))
        }
    }

    #[test]
    fn nothing_is_written_before_the_undo_of_all_is_durable_and_a_refusal_stops_nothing() {
        let log = Log::default();
        let mut paper = Paper { log: &log, appends_left: 9 };
        let steps = [0, 1, 2].map(Write).into();
        let applied = execute(&log, &mut paper, Some("first".to_owned()), steps).expect("paper");
        let outcomes: Vec<bool> = applied.iter().map(|one| one.outcome).collect();
        assert_eq!(outcomes, [true, false, true]);
        let order = ["first", "undo 1", "undo 2", "write 0", "write 1", "write 2", "noted 1"];
        assert_eq!(*log.borrow(), order);
    }

    #[test]
    fn where_the_undo_of_one_is_not_durable_none_is_written() {
        for appends_left in 0..3 {
            let log = Log::default();
            let mut paper = Paper { log: &log, appends_left };
            let steps: Vec<Write> = (1..=2 * RECORDS_AT_A_TIME + 1).map(Write).collect();
            execute(&log, &mut paper, None, steps).expect_err("no room");
            assert!(log.borrow().iter().all(|line| line.starts_with("undo")), "{appends_left}");
        }
    }
}
