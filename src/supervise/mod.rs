//! *supervise*: the walk in a loop, for one VM.
//!
//! ```text
//!   events (select!) ──▶ state::handle ──▶ effects ──▶ attachment: look, ask, restore
//! ```
//!
//! `sources` has what can wake it; `run` makes events of that and carries out effects; `state` decides;
//! `worker` is the thread on which `attachment` works; `line` is the way to QEMU; `telling` tells.

mod aside;
mod attachment;
mod budget;
mod cookie;
mod end;
mod host_knobs;
mod host_report;
mod irqbalance;
mod leasing;
mod limit;
mod line;
mod narrate;
mod notify;
mod once;
mod originals;
mod pace;
mod partition;
mod priority;
mod reload;
mod reonline;
mod reports;
mod run;
mod settings;
mod signalling;
mod signals;
mod sources;
mod start_error;
mod starting;
mod state;
mod supervisor;
mod telling;
mod thread_cpus;
mod waiting;
mod worker;

pub use attachment::Attachment;
pub use cookie::{CookieReport, cookies, core_scheduling_finding};
pub use end::{Supervised, end_supervisor};
pub use host_knobs::{HostError, HostKnobs, host_steps, settle_host};
pub use host_report::{HostLines, HostReport, log_host};
pub use leasing::{give_back, lock_forsaken, neighbours};
pub use limit::vm_limit;
pub use once::attach_once;
pub use partition::partition_finding;
pub use priority::{PriorityReport, priority_finding};
pub use reload::{Answered, request_reload};
pub use reonline::{ReonlineReport, reonline_finding};
pub use reports::{Learnt, LookError, LookReport};
pub use run::Ended;
pub use settings::{Follow, Host, Settings};
pub use start_error::StartError;
pub use state::Ending;
pub use supervisor::{PolicySource, Supervisor};
pub use thread_cpus::ThreadCpus;
pub use waiting::{Patience, Woken, end_waiting};
