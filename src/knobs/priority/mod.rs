//! Priority: `sched = "fifo:1"` for vCPU threads, where the policy asks for it.

pub mod apply;
pub mod journal;
pub mod keep;
pub mod plan;
pub mod restore;
