//! Core scheduling: no task but the VM's own on the sibling of a CPU that runs one of its vCPUs.

pub mod apply;
pub mod journal;
pub mod keep;
pub mod plan;
pub mod read;
pub mod restore;
