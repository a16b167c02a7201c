//! What is done about one place of the host.

use crate::knobs::host::places::{Place, Value};
use crate::policy::Knob;

/// One thing to do about one place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HostStep {
    /// It is to hold something else.
    Write {
        /// Whose it is.
        knob: Knob,
        /// Where.
        place: Place,
        /// What is there.
        from: Value,
        /// What is to be there.
        to: Value,
    },
    /// It is to hold what it held before qmpin.
    PutBack {
        /// Where.
        place: Place,
        /// What is there.
        from: Value,
        /// What was there.
        to: Value,
    },
    /// It is as before, or there is no such place any more: it can be forgotten.
    Settle {
        /// Where.
        place: Place,
    },
    /// Another program has changed it since: it is kept, named, and forgotten.
    LeaveAlone {
        /// Where.
        place: Place,
        /// What is there.
        found: Value,
        /// What was there.
        before: Value,
    },
    /// It cannot be read now: it is left, and restore when it can.
    Later {
        /// Where.
        place: Place,
        /// What was there.
        before: Value,
        /// What the kernel said.
        reason: String,
    },
}

impl HostStep {
    /// Where.
    #[must_use]
    pub fn place(&self) -> &Place {
        match self {
            HostStep::Write { place, .. }
            | HostStep::PutBack { place, .. }
            | HostStep::Settle { place }
            | HostStep::LeaveAlone { place, .. }
            | HostStep::Later { place, .. } => place,
        }
    }
}
