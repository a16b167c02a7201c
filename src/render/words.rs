//! Things in a sentence.

use std::collections::BTreeMap;

use crate::ids::Tid;
use crate::places::{Place, VfioIrq};
use crate::policy::Knob;
use crate::shown;
use crate::threads::Role;

/// `vCPU 3 (tid 533, CPU 3/KVM)`: a thread in a sentence. An empty name is left out.
#[must_use]
pub fn thread_in_words(tid: Tid, role: &Role, comm: &str) -> String {
    let who = match role {
        Role::Vcpu(index) => format!("vCPU {index}"),
        Role::Iothread(id) => format!("iothread {}", shown::line(&id.0)),
        Role::Kernel => "kernel thread".to_owned(),
        Role::Emulator | Role::Worker | Role::Vhost => role.name().to_owned(),
    };
    if comm.is_empty() {
        return format!("{who} (tid {tid})");
    }
    format!("{who} (tid {tid}, {})", shown::line(comm))
}

/// `irqs`, and `irqs of 0000:0a:00.0` where it is of a VM's own device: they go elsewhere than all others.
#[must_use]
pub fn knob_in_words(knob: Knob, place: &Place, vfio: &BTreeMap<Place, VfioIrq>) -> String {
    match vfio.get(place) {
        Some(irq) => format!("{knob} of {}", irq.device),
        None => knob.to_string(),
    }
}
