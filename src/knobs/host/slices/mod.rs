//! Slices: `AllowedCPUs=` on the units beside the VM's, where no partition is possible.

pub mod apply;
pub mod beside;
pub mod plan;
