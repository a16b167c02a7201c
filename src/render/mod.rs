//! *render*: turns facts into texts. Pure: no file, no terminal, no clock.
//!
//! Called by the commands, which decide the width and whether there is colour (`NO_COLOR`, a
//! terminal or not). Each document has a face for people and one for programs, made from the same
//! values.

mod config;
mod doctor;
mod owners;
mod paint;
mod plan;
mod plan_all;
mod status;
mod table;
mod threads;
mod topology;
mod verify;

pub use config::{ConfigCheckDocument, ConfigDocument, config_text};
pub use doctor::DoctorDocument;
pub use owners::Owners;
pub use paint::Color;
pub use plan::{Explain, PlanDocument, declared_text, host_text, plan_text};
pub use plan_all::{PlanAllDocument, VmOfAll, VmPlace};
pub use status::{StatusDocument, VmState, VmStatus};
pub use threads::ThreadsDocument;
pub use topology::{Picture, TopologyDocument};
pub use verify::VerifyDocument;
