//! What the host should be like, as a pure function of the leases and of what was there before.
//!
//! ```text
//!   leases ─▶ Wants: for each knob, the CPUs of the VMs that want it
//!   Wants × HostView × originals ─▶ wishes      slices.rs irqbalance.rs irqs.rs vfio.rs kthreads.rs
//!                                                workqueues.rs power.rs noise.rs
//!   wishes × what is there × what the journal remembers ─▶ steps                            diff.rs
//! ```
//!
//! Every wish is made from the *original* value, never from the present one: so the host is the same
//! whichever VM came first, and grows back when one goes.

pub mod apply;
pub mod diff;
pub mod interrupts;
pub mod irqbalance;
pub mod irqs;
pub mod journal;
pub mod keep;
pub mod kernel_threads;
pub mod kthreads;
pub mod memory;
pub mod new_irqs;
pub mod noise;
pub mod outcome;
pub mod pass;
pub mod places;
pub mod power;
pub mod refusal;
pub mod report;
pub mod settle;
pub mod slices;
pub mod step;
pub mod vfio;
pub mod view;
pub mod workqueues;

use std::collections::{BTreeMap, BTreeSet};

use crate::cpuset::CpuSet;
use crate::ids::Pid;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};
pub use crate::knobs::host::vfio::plan::VfioWant;
use crate::leases::Lease;
use crate::policy::Knob;
use crate::threads::ProcessKey;

/// For each knob, the CPUs of all VMs that want it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wants {
    cpus: BTreeMap<Knob, CpuSet>,
    /// The CPUs of each VM that are to be kept from kernel threads, or from what the kernel puts them on by
    /// itself.
    pub exclusion_masks: Vec<CpuSet>,
    /// The cgroups of VMs that can have no partition, and their CPUs: systemd excludes others.
    pub slices: BTreeMap<String, CpuSet>,
    /// The cgroups that have a partition in them.
    pub partitions: BTreeSet<String>,
    /// The processes of VMs that are attached.
    pub processes: BTreeSet<Pid>,
    /// What VMs want of the interrupts of their own devices, by their QEMU processes.
    pub vfio: BTreeMap<ProcessKey, VfioWant>,
}

impl Wants {
    /// What these VMs want of the host together.
    #[must_use]
    pub fn of<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> Wants {
        let mut wants = Wants::default();
        for lease in leases {
            let exclusive = lease.exclusive;
            wants.partitions.extend(lease.partition.clone());
            wants.processes.insert(lease.qemu.pid);
            if let Some(cgroup) = &lease.slices {
                *wants.slices.entry(cgroup.clone()).or_default() |= exclusive;
            }
            if lease.knobs.contains(&Knob::Irqs) {
                wants.vfio.insert(lease.qemu, VfioWant::of(lease));
            }
            // For no CPU, nothing is wanted.
            if exclusive.is_empty() {
                continue;
            }
            for knob in &lease.knobs {
                let is_exclusion_mask = matches!(knob, Knob::Kthreads | Knob::Partition);
                if is_exclusion_mask && !wants.exclusion_masks.contains(&exclusive) {
                    wants.exclusion_masks.push(exclusive);
                }
                *wants.cpus.entry(*knob).or_default() |= exclusive;
            }
        }
        wants
    }

    /// Whether no VM wants anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cpus.is_empty()
    }

    /// The CPUs for which a knob is wanted; none where it is not.
    #[must_use]
    pub fn cpus(&self, knob: Knob) -> CpuSet {
        self.cpus.get(&knob).copied().unwrap_or_default()
    }

    /// Whether a VM wants the knob.
    #[must_use]
    pub fn has(&self, knob: Knob) -> bool {
        self.cpus.contains_key(&knob)
    }

    /// All CPUs that anything is wanted for.
    #[must_use]
    pub fn all_cpus(&self) -> CpuSet {
        self.cpus.values().fold(CpuSet::EMPTY, |all, cpus| all | *cpus)
    }
}

/// One place, whose it is, and what it should hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Whose it is.
    pub knob: Knob,
    /// Where.
    pub place: Place,
    /// What.
    pub value: Value,
}

/// All wishes, in the order in which they are to be carried out. They are made from what a place held
/// before qmpin, where that is remembered; else from what it holds now.
#[must_use]
pub fn wishes(view: &HostView, wants: &Wants, memory: &HostMemory) -> Vec<Wish> {
    let mut wishes = Vec::new();
    let mut wish = |knob, list: Vec<(Place, Value)>| {
        wishes.extend(list.into_iter().map(|(place, value)| Wish { knob, place, value }));
    };
    let in_slices = wants.slices.values().fold(CpuSet::EMPTY, |all, cpus| all | *cpus);
    wish(Knob::Partition, slices::plan::units(view, memory, &wants.slices));
    wish(Knob::Partition, kthreads::wishes(view, memory, &view.users, &in_slices));
    wish(Knob::Partition, slices::plan::drop_ins(view, wants, memory));
    // It is configured before interrupts are moved, or it moves them back.
    wish(Knob::Irqs, irqbalance::plan::wishes(view, wants, memory));
    let mut irqs = irqs::wishes(view, wants, memory);
    irqs.retain(|(place, _)| !irqbalance::plan::has_placed(view, wants, memory, place));
    wish(Knob::Irqs, irqs);
    // A partition makes the kernel change masks on its own, more than it has to, and not back to what they were.
    let off = wants.cpus(Knob::Kthreads) | (wants.cpus(Knob::Partition) - in_slices);
    wish(Knob::Kthreads, kthreads::wishes(view, memory, &view.kthreads, &off));
    wish(Knob::Workqueues, workqueues::wishes(view, memory, &wants.cpus(Knob::Workqueues)));
    wish(Knob::Power, power::wishes(view, &wants.cpus(Knob::Power)));
    wish(Knob::Noise, noise::wishes(view, memory, &wants.cpus(Knob::Noise)));
    wishes
}

/// The CPUs that remain of `original` when `off` are taken away: where none would, all others that are
/// online. `None`: it has nothing to do with them.
fn kept_off(original: &CpuSet, off: &CpuSet, online: &CpuSet) -> Option<CpuSet> {
    if !original.intersects(off) {
        return None;
    }
    let rest = *original - *off;
    // A mask without a CPU that is online is refused.
    let rest = if rest.intersects(online) { rest } else { *online - *off };
    (!rest.is_empty()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    #[test]
    fn what_touches_the_vm_keeps_the_rest_of_its_cpus() {
        let kept = |original, off| kept_off(&cpus(original), &cpus(off), &cpus("0-7"));
        assert_eq!(kept("0-7", "4-5"), Some(cpus("0-3,6-7")));
        assert_eq!(kept("0-3", "4-5"), None, "not concerned");
        assert_eq!(kept("4", "4-5"), Some(cpus("0-3,6-7")), "nothing left: anywhere else");
        assert_eq!(kept("4,9", "4-5"), Some(cpus("0-3,6-7")), "what is left is offline");
        assert_eq!(kept("0-7", "0-7"), None, "nowhere to go");
    }
}
