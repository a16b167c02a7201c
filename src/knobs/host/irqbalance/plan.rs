//! irqbalance, as a part of the knob *irqs*: it excludes interrupts from the VMs' CPUs itself, and where it has
//! put one that is off them, it stays.

use crate::knobs::host::Wants;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};
use crate::policy::Knob;

/// Each irqbalance that runs is to exclude interrupts from the CPUs that it did before, and from those of all
/// VMs.
pub(crate) fn wishes(view: &HostView, wants: &Wants, memory: &HostMemory) -> Vec<(Place, Value)> {
    let off = wants.cpus(Knob::Irqs);
    if off.is_empty() {
        return Vec::new();
    }
    let wish = |place: Place| {
        let before = memory.before(view, &place)?.cpus()?;
        // With no CPU left it would have nowhere to put any.
        let banned = before | off;
        (!view.online.is_subset(&banned)).then_some((place, Value::Cpus(banned)))
    };
    view.irqbalances.iter().map(|one| Place::Irqbalance(one.process)).filter_map(wish).collect()
}

/// Whether an interrupt is where irqbalance has put it and may stay there: to write it in every pass would
/// be to balance against it.
pub(crate) fn has_placed(
    view: &HostView,
    wants: &Wants,
    memory: &HostMemory,
    place: &Place,
) -> bool {
    let Some(now) = view.values.get(place) else { return false };
    !view.irqbalances.is_empty()
        && place.irq().is_some()
        && !view.vfio.contains_key(place)
        && now.cpus().is_some_and(|cpus| !cpus.intersects(&wants.cpus(Knob::Irqs)))
        && !memory.is_ours(place, now, &view.online)
}
