//! Interrupts of devices that a VM has by VFIO: they go to CPUs of that VM.

pub mod plan;
pub mod read;
