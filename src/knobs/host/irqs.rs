//! The knob *irqs*: interrupts go to CPUs that are no VM's. Those of a VM's own devices: `vfio.rs`.

use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};
use crate::knobs::host::vfio::plan as vfio;
use crate::knobs::host::{Wants, kept_off};
use crate::policy::Knob;

pub(crate) fn wishes(view: &HostView, wants: &Wants, memory: &HostMemory) -> Vec<(Place, Value)> {
    let off = wants.cpus(Knob::Irqs);
    let wish = |place: &Place| {
        let before = memory.before(view, place)?.cpus()?;
        let of_vm = view.vfio.get(place).and_then(|irq| Some((irq, wants.vfio.get(&irq.vm)?)));
        let cpus = match of_vm {
            Some((irq, want)) => vfio::target(irq, want, &before, &off, &view.online),
            None => kept_off(&before, &off, &view.online),
        };
        Some((place.clone(), Value::Cpus(cpus?)))
    };
    view.irqs.iter().filter_map(wish).collect()
}
