//! What qmpin changes on the host, a folder for each. A folder has everything about its knob: the plan, the write, the
//! undo, and what is done about it while the VM runs.
//!
//! ```text
//!   attach   reonline ─▶ affinity ─▶ core_scheduling ─▶ partition ─▶ host ─▶ priority
//!   each     plan: what should be, pure │ apply: undo durable, write, read back │ keep: again, while the VM runs
//!   detach   core_scheduling ─▶ partition ─▶ priority ─▶ affinity ─▶ host     restore: from the journal alone
//! ```
//!
//! Affinity comes before the partition because it takes a millisecond, and a partition may take seconds.

pub mod abilities;
pub mod affinity;
pub mod bench;
pub mod core_scheduling;
pub mod execute;
pub mod findings;
pub mod ground;
pub mod host;
pub mod outcome;
pub mod partition;
pub mod priority;
pub mod reonline;
pub mod step;
pub mod turn;
pub mod vm;
