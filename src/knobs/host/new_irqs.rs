//! Interrupts that are new while VMs are kept free of them (the knob *irqs*). The kernel gives each the mask
//! that new ones have, or its part on the device's node (`kernel/irq/manage.c: irq_setup_affinity`), so no
//! CPU of a VM's, and would leave it there for good.
//!
//! ```text
//!   where new ones go is about to change   one that is there already: a choice of another program ─▶ recorded as it is
//!   one that is not known yet              it was created so ─▶ recorded as it would be without qmpin
//! ```

use crate::cpuset::CpuSet;
use crate::knobs::host::Wants;
use crate::knobs::host::memory::{HostMemory, HostRecord};
use crate::knobs::host::places::{HostView, Place, Value};
use crate::knobs::host::step::HostStep;
use crate::policy::VfioIrqs;

/// Where new interrupts go.
pub(crate) struct NewIrqs {
    /// Without qmpin.
    before: CpuSet,
    /// By qmpin.
    now: CpuSet,
}

impl NewIrqs {
    pub(crate) fn of(memory: &HostMemory, before: &Value, now: &Value) -> Option<NewIrqs> {
        let before = memory.original(&Place::of_new_irqs()).unwrap_or(before).cpus()?;
        Some(NewIrqs { before, now: now.cpus()? })
    }

    /// What an interrupt would have without qmpin that was created with what it has; `None`: the same, or it
    /// was not created so.
    pub(crate) fn let_out(&self, view: &HostView, place: &Place) -> Option<CpuSet> {
        let found = view.values.get(place)?.cpus()?;
        let local = view.vfio.get(place).map(|irq| irq.local);
        let local = local.or_else(|| view.irq_nodes.get(place).copied()).unwrap_or_default();
        let_out(&found, &local, self, &view.online)
    }
}

/// `local` are the CPUs of the device's node; none where it has none.
fn let_out(found: &CpuSet, local: &CpuSet, new: &NewIrqs, online: &CpuSet) -> Option<CpuSet> {
    let same = |a: &CpuSet, b: &CpuSet| *a & *online == *b & *online;
    let created = [new.before, new.before & *local];
    let created = created.into_iter().zip([new.now, new.now & *local]);
    let mut created = created.filter(|(_, now)| now.intersects(online) && same(found, now));
    created.next().map(|(before, _)| before).filter(|before| !same(before, found))
}

/// What new interrupts would be without qmpin; what they are is taken for written by it.
#[must_use]
pub fn created_with_exclusion_mask(
    view: &HostView,
    wants: &Wants,
    memory: &HostMemory,
) -> Vec<HostRecord> {
    let default = Place::of_new_irqs();
    let now = view.values.get(&default).filter(|now| memory.is_ours(&default, now, &view.online));
    let Some(new) = now.and_then(|now| NewIrqs::of(memory, now, now)) else { return Vec::new() };
    let is_irqbalances = |place: &Place| {
        let want = view.vfio.get(place).and_then(|irq| wants.vfio.get(&irq.vm));
        !view.irqbalances.is_empty() && want.is_none_or(|want| want.to == VfioIrqs::Leave)
    };
    let unknown = unknown(view, memory).filter(|place| !is_irqbalances(place));
    let records = |place: &Place| {
        let value = Value::Cpus(new.let_out(view, place)?);
        let intent = HostRecord::Intent {
            place: place.clone(),
            from: value.clone(),
            to: view.values.get(place)?.clone(),
        };
        Some([HostRecord::Original { place: place.clone(), value }, intent])
    };
    unknown.filter_map(records).flatten().collect()
}

/// Interrupts that would be taken for new ones after these steps, and are none: as they are.
#[must_use]
pub fn like_new(view: &HostView, memory: &HostMemory, steps: &[HostStep]) -> Vec<HostRecord> {
    let default = Place::of_new_irqs();
    let new = steps.iter().find_map(|step| match step {
        HostStep::Write { place, from, to, .. } if *place == default => {
            NewIrqs::of(memory, from, to)
        }
        _ => None,
    });
    let Some(new) = new else { return Vec::new() };
    let record = |place: &Place| {
        new.let_out(view, place)?;
        let value = view.values.get(place)?.clone();
        Some(HostRecord::Original { place: place.clone(), value })
    };
    unknown(view, memory).filter_map(record).collect()
}

/// The numbered interrupts that are not remembered.
fn unknown<'a>(view: &'a HostView, memory: &HostMemory) -> impl Iterator<Item = &'a Place> {
    view.irqs.iter().filter(|place| place.irq().is_some() && memory.original(place).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    #[test]
    fn created_with_the_exclusion_mask_it_is_restored() {
        let of = |found, local, now| {
            let new = NewIrqs { before: cpus("0-11"), now: cpus(now) };
            let_out(&cpus(found), &cpus(local), &new, &cpus("0-9"))
        };
        assert_eq!(of("0-3,6-9", "0-5", "0-3,6-11"), Some(cpus("0-11")), "two are offline");
        assert_eq!(of("0-3", "0-5", "0-3,6-11"), Some(cpus("0-5")), "on its node");
        assert_eq!(of("0-3", "0-3", "0-3,6-11"), None, "there it would be anyway");
        assert_eq!(of("0-3", "", "0-3,6-11"), None, "it has no node");
        assert_eq!(of("", "4-5", "0-3,6-11"), None, "nothing of its node is left");
        assert_eq!(of("2", "0-5", "0-3,6-11"), None, "another program moved it");
        assert_eq!(of("0-9", "0-5", "0-11"), None, "nothing is excluded");
    }
}
