//! Looks at everybody else, for one attached VM: who may run on its CPUs, and what of the host is not as it
//! should be. QEMU is not asked.

use crate::cgroups::CgroupTree;
use crate::check::verify::{HostFacts, Unmet, UnmetCause, VfioSeat};
use crate::discover::cgroup::partition_file;
use crate::discover::{live_leases, occupants};
use crate::error::Failure;
use crate::journal::Memory;
use crate::knobs::ground::Host;
use crate::knobs::host::Wants;
use crate::knobs::host::interrupts::interrupts;
use crate::knobs::host::irqbalance::read::Silent;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::keep::host_steps;
use crate::knobs::host::places::{Place, Value, VfioIrq};
use crate::knobs::host::step::HostStep;
use crate::leases::{Lease, StateDir};
use crate::sched::Kernel;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;

/// Looks. `memory` is what the VM's journal remembers, `silent` the irqbalances that did not answer before.
///
/// # Errors
/// What cannot be read.
pub(super) fn host_facts<'a>(
    root: &SysRoot,
    state: &StateDir,
    boot_id: &str,
    lease: &'a Lease,
    memory: &Memory,
    silent: &mut Silent,
) -> Result<HostFacts<'a>, Failure> {
    let journal = HostJournal::read(&state.host_journal_path(), boot_id)?;
    let occupants = occupants(root, &Kernel, &lease.exclusive, lease.qemu.pid)?;
    let cgroups = CgroupTree::of(root);
    let drop_in = memory.partition().and_then(|undo| undo.drop_in.as_deref());
    let file = |path: &String| partition_file(root, &cgroups, path, drop_in);
    let partition = lease.partition.as_ref().map(file);
    let wants = Wants::of(&live_leases(root, state, boot_id));
    let host = Host { root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let (view, steps) = host_steps(host, &wants, &journal, silent)?;
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
                _ if journal.was_refused(&place, &to) => UnmetCause::Refused,
                Place::Irqbalance(_) if journal.was_tried(&place, &to) => UnmetCause::Pending,
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
    Ok(HostFacts {
        lease,
        partition,
        occupants,
        unmet: unmet.collect(),
        vfio: own().filter_map(seat).collect(),
        irqbalances: view.irqbalances,
        interrupts: interrupts(root, &lease.exclusive),
    })
}
