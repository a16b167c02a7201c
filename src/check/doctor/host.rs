//! Whether the host lets a VM have its CPUs alone: `partition`, `irqbalance`, `rt-throttling`.

use super::advice::{Advice, costs, fine};
use super::facts::HostFacts;
use crate::scheduling::Throttling;

/// Judges whether an isolated partition is possible.
pub(super) fn partition(host: &HostFacts<'_>) -> Advice {
    match &host.partition {
        Ok(()) => {
            fine("partition", "an isolated partition excludes everything else from a VM's CPUs")
        }
        Err(why) => costs("partition", format!("not available: {why}"), None),
    }
}

/// Judges whether every irqbalance can be configured.
pub(super) fn irqbalance(host: &HostFacts<'_>) -> Advice {
    let deaf = host.irqbalances.iter().filter_map(|one| {
        let why = one.banned.as_ref().err()?;
        Some(format!("process {} cannot be configured: {why}", one.process.pid))
    });
    let deaf: Vec<String> = deaf.collect();
    if !deaf.is_empty() {
        let reason = format!("it may put interrupts on VMs' CPUs: {}", deaf.join("; "));
        return costs("irqbalance", reason, Some("systemctl restart irqbalance".to_owned()));
    }
    match host.irqbalances.len() {
        0 => fine("irqbalance", "none runs"),
        _ => fine("irqbalance", "it can be configured to exclude the VMs' CPUs"),
    }
}

/// Judges whether the kernel's own threads get time beside real-time threads.
pub(super) fn rt_throttling(host: &HostFacts<'_>) -> Advice {
    match host.throttling {
        Throttling::On => fine("rt-throttling", "the kernel's own threads get their share"),
        Throttling::Off => costs(
            "rt-throttling",
            "kernel.sched_rt_runtime_us = -1: with sched = \"fifo:N\" a guest that computes starves the \
             kernel's own threads on its CPUs",
            Some("sysctl kernel.sched_rt_runtime_us=950000".to_owned()),
        ),
    }
}
