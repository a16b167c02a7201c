//! The fallback of the knob *partition*: where a VM can have none, systemd keeps the units beside it
//! off its CPUs (`AllowedCPUs=`, `man 5 systemd.resource-control`).
//!
//! ```text
//!   the root ─ init.scope system.slice user.slice         each without the VM's CPUs
//!            ├ lxc                                        no unit: its own cpuset.cpus, for all containers
//!            └ qemu.slice                                 as it is: the VM is in it
//!              ├ 101.scope                                without the VM's CPUs
//!              └ 100.scope                                the VM
//! ```
//!
//! Kernels before 6.2 give each thread of a unit all CPUs of its cpuset when that changes, those with a
//! mask of their own as well (`kernel/cgroup/cpuset.c: update_tasks_cpumask`). So these are put on what
//! they had, without the VM's CPUs; later kernels do that by themselves.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::knobs::host::memory::{HostMemory, HostRecord};
use crate::knobs::host::places::{HostView, Place, Value};
use crate::knobs::host::{Wants, kept_off};
use crate::policy::Knob;

/// The units. `slices` are the VMs' cgroups and CPUs.
pub(crate) fn units(
    view: &HostView,
    memory: &HostMemory,
    slices: &BTreeMap<String, CpuSet>,
) -> Vec<(Place, Value)> {
    let wish = |place: &Place| {
        let cgroup = place.limited_cgroup()?;
        let beside = slices.iter().filter(|(vm, _)| is_beside(cgroup, vm));
        let off = beside.fold(CpuSet::EMPTY, |all, (_, cpus)| all | *cpus);
        let limit = memory.before(view, place)?.cpus()?;
        let limit = if limit.is_empty() { view.online } else { limit };
        Some((place.clone(), Value::Cpus(kept_off(&limit, &off, &view.online)?)))
    };
    view.units.iter().filter_map(wish).collect()
}

/// The limits of units that another program has changed since qmpin did: what they were changed to is what they go
/// back to, and what the wishes are made from.
#[must_use]
pub fn relimited(view: &HostView, memory: &HostMemory) -> Vec<HostRecord> {
    let changed = memory.originals().filter_map(|(place, original)| {
        let now = view.values.get(place)?;
        let is_changed = place.limited_cgroup().is_some()
            && memory.was_changed(place)
            && !now.same(original, &view.online)
            && !memory.is_ours(place, now, &view.online);
        is_changed.then(|| {
            let original = HostRecord::Original { place: place.clone(), value: now.clone() };
            [HostRecord::Settled(place.clone()), original]
        })
    });
    changed.flatten().collect()
}

/// Drop-ins of VMs that are not attached: they stay as they are while any VM has a partition.
pub(crate) fn drop_ins(view: &HostView, wants: &Wants, memory: &HostMemory) -> Vec<(Place, Value)> {
    if !wants.has(Knob::Partition) {
        return Vec::new();
    }
    let places = memory.originals().map(|(place, _)| place);
    let drop_ins = places.filter(|place| matches!(place, Place::DropIn(_)));
    drop_ins.filter_map(|place| Some((place.clone(), view.values.get(place)?.clone()))).collect()
}

/// Whether a unit is not above the VM, and the one above it is.
fn is_beside(unit: &str, vm: &str) -> bool {
    let is_within = |path: &str, above: &str| {
        above.is_empty()
            || path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let above = unit.rsplit_once('/').map_or("", |(above, _)| above);
    is_within(vm, above) && !is_within(vm, unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Pid, StartTicks};
    use crate::knobs::host::diff::diff;
    use crate::knobs::host::step::HostStep;
    use crate::knobs::host::wishes;
    use crate::leases::Lease;
    use crate::threads::ProcessKey;

    #[test]
    fn a_unit_is_beside_a_vm_when_it_is_beside_its_path() {
        let vm = "qemu.slice/100.scope";
        for unit in ["init.scope", "system.slice", "qemu.slice/101.scope", "qemu.slice/10.scope"] {
            assert!(is_beside(unit, vm), "{unit}");
        }
        for unit in ["qemu.slice", vm, "system.slice/cron.service", "qemu.slice/101.scope/x"] {
            assert!(!is_beside(unit, vm), "{unit}");
        }
    }

    #[test]
    fn a_drop_in_stays_as_long_as_any_vm_has_a_partition() {
        let word = |word: &str| Value::Word(word.to_owned());
        let place = Place::DropIn("run/systemd/system/105.scope.d/50-qmpin.conf".to_owned());
        let (from, to) = (word(""), word(crate::knobs::host::places::DROP_IN_THERE));
        let intent =
            HostRecord::Intent { place: place.clone(), from: from.clone(), to: to.clone() };
        let memory = HostMemory::of(&[intent]);
        let view = HostView {
            values: BTreeMap::from([(place.clone(), to.clone())]),
            ..HostView::default()
        };
        let steps = |wants: &Wants| diff(&view, &wishes(&view, wants, &memory), &memory);
        let process = ProcessKey { pid: Pid(7), start: StartTicks(1) };
        let lease = Lease {
            exclusive: "2-3".parse().expect("a cpulist"),
            knobs: [Knob::Partition].into(),
            ..Lease::new("105".parse().expect("a name"), "this-boot".to_owned(), process)
        };
        let some = Wants::of([&lease]);
        assert_eq!(steps(&some), []);
        let back = HostStep::PutBack { place, from: to, to: from };
        assert_eq!(steps(&Wants::default()), [back]);
    }

    #[test]
    fn a_limit_that_an_administrator_changes_is_the_one_that_counts() {
        let cpus = |list: &str| Value::Cpus(list.parse().expect("a cpulist"));
        let place =
            Place::AllowedCpus { unit: "rt.slice".to_owned(), cgroup: "rt.slice".to_owned() };
        let intent =
            HostRecord::Intent { place: place.clone(), from: cpus("2-3"), to: cpus("0-1") };
        let memory = HostMemory::of(&[intent]);
        let found = |now: &str| {
            let values = BTreeMap::from([(place.clone(), cpus(now))]);
            let online = "0-7".parse().expect("a cpulist");
            relimited(&HostView { online, values, ..HostView::default() }, &memory)
        };
        assert_eq!(found("2-3"), [], "as it was");
        assert_eq!(found("0-1"), [], "as qmpin made it");
        let original = HostRecord::Original { place: place.clone(), value: cpus("0-5") };
        assert_eq!(found("0-5"), [HostRecord::Settled(place.clone()), original]);
    }

    #[test]
    fn what_is_beside_keeps_its_own_limit_without_the_vms_cpus() {
        let cpus = |list: &str| -> CpuSet { list.parse().expect("a cpulist") };
        let unit =
            |name: &str| Place::AllowedCpus { unit: name.to_owned(), cgroup: name.to_owned() };
        let places = ["system.slice", "user.slice", "qemu.slice"].map(unit);
        let limits = ["", "0-3", ""].map(|list| Value::Cpus(cpus(list)));
        let view = HostView {
            online: cpus("0-7"),
            values: places.iter().cloned().zip(limits).collect(),
            units: places.to_vec(),
            ..HostView::default()
        };
        let slices = BTreeMap::from([
            ("qemu.slice/100.scope".to_owned(), cpus("2-3")),
            ("qemu.slice/101.scope".to_owned(), cpus("6")),
        ]);
        let found = units(&view, &HostMemory::default(), &slices);
        let wanted = [("system.slice", "0-1,4-5,7"), ("user.slice", "0-1")];
        assert_eq!(found, wanted.map(|(name, list)| (unit(name), Value::Cpus(cpus(list)))));
    }
}
