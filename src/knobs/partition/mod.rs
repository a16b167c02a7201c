//! The partition: the vCPUs' CPUs as an isolated cpuset partition in the VM's own unit, or the next fallback.

pub mod apply;
pub mod drop_ins;
pub mod keep;
pub mod plan;
pub mod restore;
