//! What is excluded from a VM's CPUs: levels, and the knobs that a level turns.
//!
//! ```text
//!   none       nothing is moved, not even the VM
//!   pinned     the VM's threads are on their CPUs; others may be there, too
//!   exclusive  pinned, partition irqs kthreads workqueues
//!   strict     exclusive, power noise core_scheduling reonline
//! ```

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// How alone a VM is to be on its CPUs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Its CPUs are leased and its threads are watched; none is moved.
    None,
    /// Its threads are pinned.
    Pinned,
    /// And nothing else runs there that can be moved.
    Exclusive,
    /// And what is left there makes as little noise as it can.
    Strict,
}

/// One thing about the host that qmpin changes for a VM beside its threads' masks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Knob {
    /// An isolated cpuset partition in the VM's own scope.
    Partition,
    /// Interrupts.
    Irqs,
    /// Kernel threads' masks.
    Kthreads,
    /// The CPUs of unbound workqueues.
    Workqueues,
    /// The frequency governor, and how deep CPUs may sleep.
    Power,
    /// Kernel housekeeping: statistics, watchdogs, NUMA balancing.
    Noise,
    /// A core-scheduling cookie, where a core has to be shared.
    CoreScheduling,
    /// CPUs taken offline and online again before the first pin.
    Reonline,
}

impl Knob {
    /// All of them, in the order in which they are turned.
    pub const ALL: [Knob; 8] = [
        Knob::Partition,
        Knob::Irqs,
        Knob::Kthreads,
        Knob::Workqueues,
        Knob::Power,
        Knob::Noise,
        Knob::CoreScheduling,
        Knob::Reonline,
    ];

    /// Its key in a policy file.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Knob::Partition => "partition",
            Knob::Irqs => "irqs",
            Knob::Kthreads => "kthreads",
            Knob::Workqueues => "workqueues",
            Knob::Power => "power",
            Knob::Noise => "noise",
            Knob::CoreScheduling => "core_scheduling",
            Knob::Reonline => "reonline",
        }
    }

    fn least_level(self) -> Level {
        match self {
            Knob::Partition | Knob::Irqs | Knob::Kthreads | Knob::Workqueues => Level::Exclusive,
            Knob::Power | Knob::Noise | Knob::CoreScheduling | Knob::Reonline => Level::Strict,
        }
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

impl Level {
    /// The knobs that this level turns.
    #[must_use]
    pub fn knobs(self) -> BTreeSet<Knob> {
        Knob::ALL.into_iter().filter(|knob| self >= knob.least_level()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_level_turns_all_that_a_lower_one_turns() {
        let of = |level: Level| level.knobs();
        assert!(of(Level::None).is_empty() && of(Level::Pinned).is_empty());
        assert_eq!(of(Level::Exclusive).len(), 4);
        assert_eq!(of(Level::Strict).len(), Knob::ALL.len());
        assert!(of(Level::Exclusive).is_subset(&of(Level::Strict)));
    }

    #[test]
    fn a_knob_is_written_in_a_lease_as_in_a_policy() {
        for knob in Knob::ALL {
            assert_eq!(serde_json::to_string(&knob).expect("text"), format!("\"{knob}\""));
        }
    }
}
