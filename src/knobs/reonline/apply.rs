//! The knob *reonline*: takes one CPU offline and brings it online again.
//!
//! ```text
//!   journal: what is kept, and that the switch was 1 ─▶ 0, read back ─▶ 1, read back ─▶ what has changed
//!                                                                             is restored ─▶ settled
//! ```
//!
//! Killed in between, the host's journal has a switch that was 1: the next qmpin brings it online.

use std::time::Duration;
use std::{io, thread};

use crate::discover::{online_cpus, present_cpus};
use crate::ids::CpuId;
use crate::journal::JournalError;
use crate::knobs::ground::Host;
use crate::knobs::host::apply::apply_host;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::memory::HostRecord;
use crate::knobs::host::outcome::HostApplied;
use crate::knobs::host::places::{Place, Value};
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_place;
use crate::knobs::reonline::read::switch;
use crate::policy::Knob;

/// How often it is tried to bring a CPU back, before it is left to the next pass.
const TRIES: usize = 5;
/// Between two of these.
const PAUSE: Duration = Duration::from_millis(100);

/// What became of one CPU.
#[derive(Debug)]
pub enum Cycled {
    /// It was offline, and is online.
    Done,
    /// The kernel would not take it offline, or it was not tried: something that is to be kept cannot be read.
    Refused(io::Error),
    /// It does not come back. The journal has it: it is tried again in every pass.
    Stuck(io::Error),
}

/// What came of it.
#[derive(Debug)]
pub struct CycleReport {
    /// What became of the CPU.
    pub cycled: Cycled,
    /// Places that the kernel or a driver had changed on the way, and what became of them.
    pub put_back: Vec<HostApplied>,
}

/// Takes the CPU offline and brings it online again. `kept` are places that are to hold afterwards what
/// they hold now; none that the journal remembers already, since those are made what they should be by
/// the process that remembers them.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable, and then nothing was written; or where it
/// could not be noted that it is not needed any more, and then the CPU is online all the same.
pub fn cycle(
    host: Host<'_>,
    journal: &mut HostJournal,
    cpu: CpuId,
    kept: &[Place],
) -> Result<CycleReport, JournalError> {
    let Host { root, sched, .. } = host;
    let value = |place: &Place| match read_place(root, sched, place) {
        Ok(value) => value.map(|value| Ok((place.clone(), value))),
        Err(error) => Some(Err(io::Error::new(error.kind(), format!("{place}: {error}")))),
    };
    let before: Vec<(Place, Value)> = match kept.iter().filter_map(value).collect() {
        Ok(before) => before,
        Err(error) => {
            return Ok(CycleReport { cycled: Cycled::Refused(error), put_back: Vec::new() });
        }
    };
    let original = |(place, value): &(Place, Value)| HostRecord::Original {
        place: place.clone(),
        value: value.clone(),
    };
    journal.append(before.iter().map(original).collect())?;
    let mut carry_out = |steps| {
        // Compared on none, all CPUs would look as they should be.
        let online = online_cpus(root).unwrap_or_else(|_| present_cpus(root));
        apply_host(host, &online, journal, steps)
    };
    let place = switch(cpu);
    let [off, on] = ["0", "1"].map(|word| Value::Word(word.to_owned()));
    let knob = Knob::Reonline;
    let step = HostStep::Write { knob, place: place.clone(), from: on.clone(), to: off.clone() };
    let taken = outcome(carry_out(vec![step])?);
    let mut cycled = match taken {
        Ok(()) => Cycled::Done,
        Err(error) => Cycled::Refused(error),
    };
    // Whatever was said: if it is offline, it comes back.
    if read_place(root, sched, &place).is_ok_and(|now| now.as_ref() == Some(&on)) {
        carry_out(vec![HostStep::Settle { place }])?;
    } else {
        for left in (0..TRIES).rev() {
            let step =
                HostStep::PutBack { place: place.clone(), from: off.clone(), to: on.clone() };
            match outcome(carry_out(vec![step])?) {
                Ok(()) => break,
                Err(error) if left == 0 => cycled = Cycled::Stuck(error),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
    let steps = before.into_iter().map(|(place, to)| match read_place(root, sched, &place) {
        Ok(Some(from)) if from != to => HostStep::PutBack { place, from, to },
        Ok(_) => HostStep::Settle { place },
        Err(error) => HostStep::Later { place, before: to, reason: error.to_string() },
    });
    let mut put_back = carry_out(steps.collect())?;
    put_back.retain(|applied| {
        matches!(applied.step, HostStep::PutBack { .. } | HostStep::Later { .. })
    });
    Ok(CycleReport { cycled, put_back })
}

/// Whether the one step is done.
fn outcome(applied: Vec<HostApplied>) -> io::Result<()> {
    match applied.into_iter().next().map(|applied| applied.outcome.done()) {
        Some(Ok(true)) => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(false)) | None => Err(io::ErrorKind::NotFound.into()),
    }
}
