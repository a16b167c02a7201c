//! Things in a sentence.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::discover::Interrupt;
use crate::ids::Tid;
use crate::places::{Place, VfioIrq};
use crate::policy::Knob;
use crate::threads::Role;

/// `vCPU 3 (tid 533, CPU 3/KVM)`: a thread in a sentence. An empty name is left out.
#[must_use]
pub fn thread_in_words(tid: Tid, role: &Role, comm: &str) -> String {
    let who = match role {
        Role::Vcpu(index) => format!("vCPU {index}"),
        Role::Iothread(id) => format!("iothread {id}"),
        Role::Kernel => "kernel thread".to_owned(),
        Role::Emulator | Role::Worker | Role::Vhost => role.name().to_owned(),
    };
    if comm.is_empty() {
        return format!("{who} (tid {tid})");
    }
    format!("{who} (tid {tid}, {})", printable(comm))
}

/// `irqs`, and `irqs of 0000:0a:00.0` where it is of a VM's own device: they go elsewhere than all others.
#[must_use]
pub fn knob_in_words(knob: Knob, place: &Place, vfio: &BTreeMap<Place, VfioIrq>) -> String {
    match vfio.get(place) {
        Some(irq) => format!("{knob} of {}", irq.device),
        None => knob.to_string(),
    }
}

/// A thread's name as it may be shown: any process can choose its own.
#[must_use]
pub fn printable(comm: &str) -> String {
    comm.chars().flat_map(char::escape_debug).collect()
}

/// Interrupts that the kernel itself keeps where they are, those first that have fired most:
/// `2 stay where the kernel keeps them, and have fired there so far: 28 (nvme0q3): 6, 29 (nvme0q4): 0`.
#[must_use]
pub fn kept_irqs_in_words<'a>(kept: impl Iterator<Item = (&'a u32, &'a Interrupt)>) -> String {
    /// How many are named: those of a VM's CPUs, on a machine with many fast disks.
    const NAMED: usize = 64;
    let mut by_count: Vec<(&u32, &Interrupt)> = kept.collect();
    by_count.sort_by_key(|(number, irq)| (Reverse(irq.fired), **number));
    let name = |(number, irq): &(&u32, &Interrupt)| match irq.devices.as_str() {
        "" => format!("{number}: {}", irq.fired),
        devices => format!("{number} ({}): {}", printable(devices), irq.fired),
    };
    let named: Vec<String> = by_count.iter().take(NAMED).map(name).collect();
    let more = if by_count.len() > NAMED { ", …" } else { "" };
    let (stay, keeps) =
        if by_count.len() == 1 { ("stays", "keeps it") } else { ("stay", "keeps them") };
    format!(
        "{} {stay} where the kernel {keeps}, fired there so far: {}{more}",
        by_count.len(),
        named.join(", ")
    )
}

/// Kernel threads that are bound to their CPUs, by name: `the kernel binds them to their CPUs: 8 ksoftirqd`.
#[must_use]
pub fn bound_in_words<'a>(names: impl Iterator<Item = (&'a String, &'a usize)>) -> String {
    let names: Vec<String> =
        names.map(|(name, number)| format!("{number} {}", printable(name))).collect();
    format!("the kernel binds them to their CPUs: {}", names.join(", "))
}
