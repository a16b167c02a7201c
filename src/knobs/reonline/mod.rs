//! Reonline: the VM's CPUs go offline and online once before the attach, so that what is bound to them moves away.

pub mod apply;
pub mod cycle;
pub mod plan;
pub mod read;
