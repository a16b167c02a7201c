//! What a pass or an answer of QEMU has brought.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use crate::attachment::error::{PassError, StartError};
use crate::attachment::thread_cpus::ThreadCpus;
use crate::ids::VmName;
use crate::knobs::core_scheduling::keep::CookieReport;
use crate::knobs::outcome::{Applied, Outcome};
use crate::knobs::partition::apply::Refused;
use crate::knobs::priority::keep::PriorityReport;
use crate::knobs::reonline::cycle::ReonlineReport;
use crate::mask::Mask;
use crate::threads::{Role, ThreadKey};

/// What a pass has changed.
#[derive(Debug, Default)]
pub struct PassReport {
    /// What the loop has to know.
    pub noticed: Noticed,
    /// Every step and what became of it.
    pub applied: Vec<Applied<Mask>>,
    /// Where the VM's threads are now.
    pub placed: ThreadCpus,
    /// Steps for threads that had been where they belong: another program moved them.
    pub drifted: BTreeSet<ThreadKey>,
    /// Why there is no new plan, where there should be one: the one in force was kept to.
    pub plan_failed: Option<PassError>,
    /// Which threads cannot be pinned where they belong, because the VM's cgroup does not allow it.
    pub barred: Vec<String>,
    /// What of the VM's partition was refused.
    pub partition: Vec<Refused>,
    /// What was changed about vCPUs' priority.
    pub priority: PriorityReport,
    /// What was changed about its core-scheduling cookie.
    pub cookie: CookieReport,
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
    pub(crate) fn then_applied(&mut self, later: Vec<Applied<Mask>>) {
        let threads = self.applied.iter().map(|earlier| earlier.step.thread);
        let mut places: BTreeMap<ThreadKey, usize> = threads.zip(0..).collect();
        for applied in later {
            match places.entry(applied.step.thread) {
                Entry::Occupied(place) => self.applied[*place.get()] = applied,
                Entry::Vacant(place) => {
                    place.insert(self.applied.len());
                    self.applied.push(applied);
                }
            }
        }
    }

    /// Whether there was something to move, and the kernel denied us every thread.
    pub(crate) fn nothing_is_permitted(&self) -> bool {
        let denied = |applied: &Applied<Mask>| {
            matches!(&applied.outcome, Outcome::Refused { error }
                if error.kind() == std::io::ErrorKind::PermissionDenied)
        };
        !self.applied.is_empty() && self.applied.iter().all(denied)
    }

    pub(crate) fn not_permitted(self, vm: VmName) -> StartError {
        let first = self.applied.into_iter().next();
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
