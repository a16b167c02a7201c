//! Affinity: each vCPU thread on its CPU, all other threads of QEMU on the helpers' CPUs.

pub mod apply;
pub mod decide;
pub mod diff;
pub mod keep;
pub mod limit;
pub mod restore;
pub mod thread_cpus;
