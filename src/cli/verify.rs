//! `qmpin verify`: does all hold? By the kernel's own files and QEMU's own answer.

use super::args::{Global, VerifyArgs};
use super::look::Look;
use super::{Answer, output};
use crate::cgroups::CgroupTree;
use crate::discover::kernel_threads;
use crate::discover::{boot_id, cgroup, interrupts, live_leases, occupants, read_topology, tasks};
use crate::error::{Failure, Kind};
use crate::journal::{self, HostJournal, HostMemory, Memory};
use crate::leases::Lease;
use crate::places::{Irqbalance, Place, Value, VfioIrq};
use crate::plan::core_scheduling::beside;
use crate::plan::host::Wants;
use crate::plan::host::diff::HostStep;
use crate::render::VerifyDocument;
use crate::sched::{Kernel, Sched as _};
use crate::supervise::{Host, cookies, host_steps};
use crate::sysroot::SysRoot;
use crate::threads::Thread;
use crate::watch::verify::{Facts, Unmet, UnmetCause, VfioSeat, verify};

pub(super) fn run(global: &Global, args: &VerifyArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let (vm, ask, state) = (&args.vm.vm, &args.vm.ask, global.state(&root));
    let (location, limits) = (ask.location(global), ask.limits());
    let look = Look { vm, location: &location, limits: &limits, state: &state };
    let (view, topology) = look.at_it(|| Ok(read_topology(&root)?))?;
    let boot_id = boot_id(&root).map_err(|error| Failure::from_error(Kind::No, error))?;
    let lease = state.lease(vm).map_err(Failure::from)?;
    let Some(lease) = lease.filter(|lease| lease.qemu == view.process && lease.boot_id == boot_id)
    else {
        let failure = Failure::new(Kind::No, format!("VM {vm} is not attached"));
        return Err(failure.hint(format!("`qmpin attach {vm}` attaches it")));
    };
    let pid = view.process.pid;
    let mut threads = tasks::observe(view.process, view.scan, &view.identified).threads;
    let cookies = cookies(&Kernel, &threads).unwrap_or_default();
    threads.extend(kernel_threads::kernel_threads(&root, &Kernel, pid));
    let others = occupants(&root, &Kernel, &lease.exclusive, pid)
        .map_err(|error| Failure::from_error(Kind::No, error))?;
    let leases = live_leases(&state, &boot_id);
    let journal = HostJournal::read(&state.host_journal_path(), &boot_id)?;
    let outlook = outlook(&root, &leases, &journal, &lease)?;
    let interrupts = interrupts(&root, &lease.exclusive);
    let partition =
        lease.partition.as_ref().map(|path| cgroup::partition_file(&CgroupTree::of(&root), path));
    let scheduled = |thread: &Thread| Some((thread.key, Kernel.scheduling(thread.key.tid).ok()?));
    let scheduling = threads.iter().filter_map(scheduled).collect();
    // Without a journal nothing was changed.
    let memory = journal::read(&state.journal_path(vm));
    let memory = memory.map(|content| Memory::of(&content.records)).unwrap_or_default();
    let checks = verify(&Facts {
        lease: &lease,
        threads: &threads,
        scheduling: &scheduling,
        cookies: &cookies,
        beside: beside(&topology, &lease.exclusive),
        memory: &memory,
        partition: partition.as_ref(),
        occupants: &others,
        unmet: &outlook.unmet,
        vfio: &outlook.vfio,
        irqbalances: &outlook.irqbalances,
        interrupts: &interrupts,
    });
    let document = VerifyDocument::new(vm, checks);
    if args.json {
        output::json(&document)?;
    } else {
        output::text(&document.to_text())?;
    }
    Ok(if document.holds() { Answer::Done } else { Answer::No })
}

/// What there is to see of the host, for one VM.
struct Outlook {
    /// What is left to be done.
    unmet: Vec<Unmet>,
    /// Where its own devices' interrupts are.
    vfio: Vec<VfioSeat>,
    /// Who balances interrupts.
    irqbalances: Vec<Irqbalance>,
}

fn outlook(
    root: &SysRoot,
    leases: &[Lease],
    memory: &HostMemory,
    lease: &Lease,
) -> Result<Outlook, Failure> {
    let wants = Wants::of(leases);
    let (view, steps) = host_steps(Host { root, sched: &Kernel }, &wants, memory)?;
    let own = || view.vfio.iter().filter(|(_, irq)| irq.vm == lease.qemu);
    let concerns = |place: &Place, found: &Value| match (place, found.cpus()) {
        (Place::Irqbalance(_), Some(banned)) => !lease.exclusive.is_subset(&banned),
        (_, Some(cpus)) => cpus.intersects(&lease.exclusive) || own().any(|(own, _)| own == place),
        (_, None) => true,
    };
    let unmet = steps.into_iter().filter_map(|step| match step {
        HostStep::Write { knob, place, from, to } if concerns(&place, &from) => {
            let cause = match place {
                _ if memory.was_refused(&place, &to) => UnmetCause::Refused,
                Place::Irqbalance(_) if memory.was_tried(&place, &to) => UnmetCause::Told,
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
    Ok(Outlook { unmet, vfio, irqbalances: view.irqbalances })
}
