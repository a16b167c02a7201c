//! irqbalance: it is asked not to move interrupts to the VMs' CPUs.

pub mod apply;
pub mod keep;
pub mod plan;
pub mod read;
pub mod socket;
