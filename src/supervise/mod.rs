//! *supervise*: the walk in a loop, for one VM.
//!
//! ```text
//!   events (select!) ──▶ state::handle ──▶ effects ──▶ attachment: pass, ask, restore
//! ```
//!
//! `sources` has what can wake it; `run` makes events of that and carries out effects; `state` decides;
//! `worker` is the thread on which `attachment` works; `line` is the way to QEMU; `telling` reports.

mod budget;
mod line;
mod narrate;
mod notify;
mod once;
mod pace;
mod reload;
mod run;
mod signals;
mod source;
mod sources;
mod starting;
pub(crate) mod state;
mod supervisor;
mod telling;
mod waiting;
mod worker;

pub use once::attach_once;
pub use reload::{Answered, request_reload};
pub use run::Ended;
pub use source::PolicySource;
pub use state::Ending;
pub use supervisor::Supervisor;
pub use waiting::{Patience, end_waiting};
