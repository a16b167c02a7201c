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

    /// Takes the first step as the error, where there was something to move and the kernel denied us every thread.
    pub(crate) fn not_permitted(&mut self, vm: &VmName) -> Option<StartError> {
        let applied = &mut self.knobs.affinity.applied;
        let denied = |applied: &Applied<MaskStep>| {
            matches!(&applied.outcome, Outcome::Refused { error }
                if error.kind() == std::io::ErrorKind::PermissionDenied)
        };
        if !applied.iter().all(denied) {
            return None;
        }
        match std::mem::take(applied).into_iter().next()? {
            Applied { step, outcome: Outcome::Refused { error: source } } => {
                Some(StartError::NotPermitted { vm: vm.clone(), who: step.who(), source })
            }
            _ => None,
        }
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
