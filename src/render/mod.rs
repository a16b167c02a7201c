//! *render*: turns facts into texts. Pure: no file, no terminal, no clock.
//!
//! Called by the commands, which decide the width and whether there is colour (`NO_COLOR`, a
//! terminal or not). Each document has a face for people and one for programs, made from the same
//! values.

pub mod owners;
pub mod paint;
pub mod topology;

pub use owners::Owners;
pub use paint::Color;
pub use topology::{Picture, TopologyDocument};
