//! What a pass or an answer of QEMU has brought.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::attachment::error::{PassError, StartError};
use crate::ids::VmName;
use crate::knobs::affinity::diff::MaskStep;
use crate::knobs::execute::Applied;
use crate::knobs::outcome::Outcome;
use crate::knobs::reonline::cycle::ReonlineReport;
use crate::knobs::vm::VmReport;
use crate::threads::{Role, ThreadKey};

/// What a pass has changed.
#[derive(Debug, Default)]
pub struct PassReport {
    /// What the loop has to know.
    pub noticed: Noticed,
    /// What the knobs have changed.
    pub knobs: VmReport,
    /// Why there is no new plan, where there should be one: the one in force was kept to.
    pub plan_failed: Option<PassError>,
    /// What was done before the first pin about its CPUs.
    pub reonline: ReonlineReport,
}

/// How QEMU's answer differs from the one before.
#[derive(Debug, Default)]
pub struct Learnt {
    /// vCPUs and iothreads that are new, or have a new thread.
    pub joined: Vec<(ThreadKey, Role)>,
    /// vCPUs and iothreads that are gone, or whose thread is.
    pub left: Vec<(ThreadKey, Role)>,
}

impl PassReport {
    /// Adds the steps of a later pass. A thread that had one before counts once, with what became of it last.
    pub(crate) fn then_applied(&mut self, later: Vec<Applied<MaskStep>>) {
        let threads = self.knobs.affinity.applied.iter().map(|earlier| earlier.step.thread);
        let mut places: BTreeMap<ThreadKey, usize> = threads.zip(0..).collect();
        for applied in later {
            match places.entry(applied.step.thread) {
                Entry::Occupied(place) => self.knobs.affinity.applied[*place.get()] = applied,
                Entry::Vacant(place) => {
                    place.insert(self.knobs.affinity.applied.len());
                    self.knobs.affinity.applied.push(applied);
                }
            }
        }
    }

    /// Whether there was something to move, and the kernel denied us every thread.
    pub(crate) fn nothing_is_permitted(&self) -> bool {
        let denied = |applied: &Applied<MaskStep>| {
            matches!(&applied.outcome, Outcome::Refused { error }
                if error.kind() == std::io::ErrorKind::PermissionDenied)
        };
        !self.knobs.affinity.applied.is_empty() && self.knobs.affinity.applied.iter().all(denied)
    }

    pub(crate) fn not_permitted(self, vm: VmName) -> StartError {
        let first = self.knobs.affinity.applied.into_iter().next();
        let (who, source) = match first {
            Some(Applied { step, outcome: Outcome::Refused { error } }) => (step.who(), error),
            _ => (String::new(), std::io::ErrorKind::PermissionDenied.into()),
        };
        StartError::NotPermitted { vm, who, source }
    }
}

/// What a pass has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Noticed {
    /// Threads that only QMP can name, and that may be vCPUs or iothreads.
    pub unnamed: bool,
    /// A vCPU or iothread is gone.
    pub named_gone: bool,
}
