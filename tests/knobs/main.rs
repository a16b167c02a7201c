//! What is changed on the host and restored, on made-up hosts.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod attachment;
mod core_scheduling;
mod host_irqbalance;
mod host_irqs;
mod host_journal;
mod host_knobs;
mod host_kthreads;
mod host_power;
mod host_vfio;
mod neighbours;
mod promises;
mod reonline;
mod restore_properties;
mod restore_readback;
