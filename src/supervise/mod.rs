//! *supervise*: the walk in a loop, for one VM.
//!
//! ```text
//!   events (select!) ──▶ state::handle ──▶ effects ──▶ attachment: look, ask, restore
//! ```
//!
//! `sources` has what can wake it; `run` makes events of that and carries out effects; `state` decides;
//! `attachment` works; `narrate` and `notify` tell.

mod attachment;
mod end;
mod host_knobs;
mod leasing;
mod narrate;
mod notify;
mod pace;
mod partition;
mod reports;
mod run;
mod settings;
mod sources;
mod start_error;
mod state;

pub use attachment::Attachment;
pub use end::{Supervised, end_supervisor};
pub use host_knobs::{HostError, HostKnobs, HostReport, log_host, settle_host};
pub use leasing::{give_back, neighbours};
pub use partition::partition_finding;
pub use reports::{Learnt, LookError, LookReport};
pub use run::{Ended, attach_once, follow};
pub use settings::{Follow, Host, Settings};
pub use start_error::StartError;
