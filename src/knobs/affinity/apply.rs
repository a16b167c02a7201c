//! *apply*: carries out steps, one at a time, and chooses nothing.
//!
//! ```text
//!   steps ──▶ all their undos made durable ──▶ for each: is it still that thread? write, read back
//! ```
//!
//! A step the kernel refuses is an outcome, not an error; the rest goes on. Only a journal that cannot
//! be written stops everything, before the first write.

use crate::discover::Grips;
use crate::journal::{Intent, Journal, JournalError, Record};
use crate::knobs::affinity::diff::Step;
use crate::knobs::outcome::{Applied, Outcome};
use crate::mask::Mask;
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// How many records are made durable at once: a VM may have very many threads.
const RECORDS_AT_A_TIME: usize = 1024;

/// Everything a step needs to be carried out.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    /// Where threads are looked up just before each write.
    pub root: &'a SysRoot,
    /// Who sets masks.
    pub sched: &'a dyn Sched,
    /// What proves at once that a thread is still the one it was; without, its line is read.
    pub grips: &'a Grips,
    /// The QEMU process: a thread of another is never written.
    pub process: ProcessKey,
}

/// Carries out the steps in their order. The baseline, where there is none yet, goes into the journal
/// with them, and without them, too.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable; then nothing was written.
pub fn apply(
    bench: Bench<'_>,
    journal: &mut Journal,
    baseline: Option<Record>,
    steps: Vec<Step>,
) -> Result<Vec<Applied<Mask>>, JournalError> {
    let intent = |step: &Step| Intent { thread: step.thread, from: *step.from, to: *step.to };
    let mut records = baseline.into_iter().chain(steps.iter().map(intent).map(Record::Intent));
    loop {
        let some: Vec<Record> = records.by_ref().take(RECORDS_AT_A_TIME).collect();
        if some.is_empty() {
            break;
        }
        journal.append(some)?;
    }
    let applied: Vec<Applied<Mask>> = steps
        .into_iter()
        .map(|step| {
            let outcome = crate::knobs::affinity::write::write(bench, &step);
            Applied { step, outcome }
        })
        .collect();
    // What the kernel made of a mask of qmpin counts as qmpin's, too: restore must know it again.
    let narrowed: Vec<Record> = applied
        .iter()
        .filter_map(|applied| match &applied.outcome {
            Outcome::Narrowed { to } => {
                let Step { thread, from, .. } = &applied.step;
                Some(Record::Narrowed(Intent { thread: *thread, from: **from, to: **to }))
            }
            _ => None,
        })
        .collect();
    journal.append(narrowed)?;
    Ok(applied)
}
