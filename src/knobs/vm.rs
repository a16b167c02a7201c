//! The knobs of one VM: the order in which they have their turn in a pass, and what comes of it.
//!
//! ```text
//!   Snapshot ─▶ partition ─▶ affinity ─▶ priority ─▶ core_scheduling ─▶ VmReport
//! ```
//!
//! Groups come first, because a mask holds only for CPUs that the thread's group allows. Priority and cookie come last:
//! they wait until other threads are off the VM's CPUs.

use crate::journal::{Journal, JournalError, Record};
use crate::knobs::affinity::keep::{Affinity, AffinityReport};
use crate::knobs::core_scheduling::keep::{CookieKeeper, CookieReport};
use crate::knobs::partition::apply::Refused;
use crate::knobs::partition::keep::Partition;
use crate::knobs::priority::keep::{Priority, PriorityReport};
use crate::knobs::turn::Turn;

/// What the knobs remember of a VM between passes.
#[derive(Debug, Default)]
pub(crate) struct VmKnobs {
    pub(crate) partition: Partition,
    pub(crate) affinity: Affinity,
    pub(crate) priority: Priority,
    pub(crate) cookie: CookieKeeper,
}

/// What the knobs have changed in a pass.
#[derive(Debug, Default)]
pub struct VmReport {
    /// What of the VM's partition was refused.
    pub partition: Vec<Refused>,
    /// How many times the partition was found changed externally.
    pub partition_drifted: u64,
    /// What was changed about masks.
    pub affinity: AffinityReport,
    /// What was changed about vCPUs' priority.
    pub priority: PriorityReport,
    /// What was changed about the core-scheduling cookie.
    pub cookie: CookieReport,
}

impl VmKnobs {
    /// Gives each knob its turn. `baseline` is journalled before the first mask is written.
    ///
    /// # Errors
    /// [`JournalError`] where an undo could not be made durable; then that knob and those after it have written nothing.
    pub(crate) fn converge(
        &mut self,
        turn: &Turn<'_>,
        journal: &mut Journal,
        baseline: Option<Record>,
    ) -> Result<VmReport, JournalError> {
        let partition = self.partition.converge(turn, journal)?;
        let affinity = self.affinity.converge(turn, journal, baseline)?;
        let priority = self.priority.converge(turn, journal)?;
        let cookie = self.cookie.converge(turn, journal)?;
        let partition_drifted = self.partition.take_drifted();
        Ok(VmReport { partition, partition_drifted, affinity, priority, cookie })
    }
}

impl VmReport {
    /// How many changes of other programs were found, and corrected.
    #[must_use]
    pub fn drifted(&self) -> u64 {
        let threads = self.affinity.drifted.len() + self.priority.drifted.len();
        self.partition_drifted + threads as u64 + u64::from(self.cookie.drifted)
    }
}
