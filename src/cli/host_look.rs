//! Looks at everybody else, for one attached VM: who may run on its CPUs, and what of the host is not as it
//! should be. QEMU is not asked.

use std::collections::BTreeMap;

use crate::cgroups::CgroupTree;
use crate::check::verify::{Check, HostFacts, Unmet, UnmetCause, VfioSeat, host_checks};
use crate::discover::cgroup::{PartitionFile, partition_file};
use crate::discover::{Occupant, live_leases, occupants};
use crate::error::Failure;
use crate::journal::Memory;
use crate::knobs::ground::Host;
use crate::knobs::host::Wants;
use crate::knobs::host::interrupts::{Interrupt, interrupts};
use crate::knobs::host::irqbalance::read::Silent;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::keep::host_steps;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{Irqbalance, Place, Value, VfioIrq};
use crate::knobs::host::step::HostStep;
use crate::leases::{Lease, StateDir};
use crate::sched::Kernel;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;

/// What there is to see.
pub(super) struct HostFindings {
    /// The group of its vCPUs; `None`: it has no partition.
    pub(super) partition: Option<PartitionFile>,
    occupants: Vec<Occupant>,
    differences: Differences,
    interrupts: BTreeMap<u32, Interrupt>,
}

impl HostFindings {
    /// Looks. `memory` is what the VM's journal remembers, `silent` the irqbalances that did not answer before.
    ///
    /// # Errors
    /// What cannot be read.
    pub(super) fn at(
        root: &SysRoot,
        state: &StateDir,
        boot_id: &str,
        lease: &Lease,
        memory: &Memory,
        silent: &mut Silent,
    ) -> Result<HostFindings, Failure> {
        let journal = HostJournal::read(&state.host_journal_path(), boot_id)?;
        let occupants = occupants(root, &Kernel, &lease.exclusive, lease.qemu.pid);
        let drop_in = memory.partition().and_then(|undo| undo.drop_in.as_deref());
        let file = |path: &String| partition_file(root, &CgroupTree::of(root), path, drop_in);
        Ok(HostFindings {
            partition: lease.partition.as_ref().map(file),
            occupants: occupants?,
            differences: differences(
                root,
                &live_leases(root, state, boot_id),
                &journal,
                lease,
                silent,
            )?,
            interrupts: interrupts(root, &lease.exclusive),
        })
    }

    /// What of it holds and what does not.
    pub(super) fn checks(&self, lease: &Lease) -> Vec<Check> {
        host_checks(&HostFacts {
            lease,
            partition: self.partition.as_ref(),
            occupants: &self.occupants,
            unmet: &self.differences.unmet,
            vfio: &self.differences.vfio,
            irqbalances: &self.differences.irqbalances,
            interrupts: &self.interrupts,
        })
    }
}

/// What there is to see of the host, for one VM.
struct Differences {
    /// What is left to be done.
    unmet: Vec<Unmet>,
    /// Where its own devices' interrupts are.
    vfio: Vec<VfioSeat>,
    /// Who balances interrupts.
    irqbalances: Vec<Irqbalance>,
}

fn differences(
    root: &SysRoot,
    leases: &[Lease],
    memory: &HostMemory,
    lease: &Lease,
    silent: &mut Silent,
) -> Result<Differences, Failure> {
    let wants = Wants::of(leases);
    let cgroups = CgroupTree::of(root);
    let host = Host { root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let (view, steps) = host_steps(host, &wants, memory, silent)?;
    let own = || view.vfio.iter().filter(|(_, irq)| irq.vm == lease.qemu);
    let concerns = |place: &Place, found: &Value| match (place, found.cpus()) {
        (Place::Irqbalance(_), Some(banned)) => !lease.exclusive.is_subset(&banned),
        // Where there is no limit, every CPU is allowed.
        (Place::AllowedCpus { .. } | Place::Cpuset(_), Some(limit)) if limit.is_empty() => true,
        (_, Some(cpus)) => cpus.intersects(&lease.exclusive) || own().any(|(own, _)| own == place),
        (_, None) => true,
    };
    let unmet = steps.into_iter().filter_map(|step| match step {
        HostStep::Write { knob, place, from, to } if concerns(&place, &from) => {
            let cause = match place {
                _ if memory.was_refused(&place, &to) => UnmetCause::Refused,
                Place::Irqbalance(_) if memory.was_tried(&place, &to) => UnmetCause::Pending,
                _ => UnmetCause::Changed,
            };
            Some(Unmet { knob, place, found: from, wanted: to, cause })
        }
        _ => None,
    });
    let seat = |(place, irq): (&Place, &VfioIrq)| {
        let on = view.values.get(place)?.cpus()?;
        Some(VfioSeat { place: place.clone(), device: irq.device.clone(), on })
    };
    let (unmet, vfio) = (unmet.collect(), own().filter_map(seat).collect());
    Ok(Differences { unmet, vfio, irqbalances: view.irqbalances })
}
