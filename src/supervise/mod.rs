//! *supervise*: the walk in a loop, for one VM.
//!
//! ```text
//!   events (select!) ──▶ state::handle ──▶ effects ──▶ attachment: look, ask, restore
//! ```
//!
//! `run` only makes events and carries out effects; `state` decides; `attachment` works.

mod attachment;
mod end;
mod notify;
mod run;
mod start_error;
mod state;

pub use attachment::{
    Attachment, Follow, Host, LookError, LookReport, Settings, give_back, neighbours,
};
pub use end::{Supervised, end_supervisor};
pub use run::{Ended, attach_once, follow};
pub use start_error::StartError;
