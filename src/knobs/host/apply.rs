//! Carries out steps on places of the host: writes, reads back, and chooses nothing.
//!
//! ```text
//!   steps ──▶ originals and intents made durable ──▶ for each: write, read back ──▶ what is settled
//! ```

use std::os::unix::fs::PermissionsExt as _;
use std::{fs, io};

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::{present_cpus, tasks};
use crate::journal::JournalError;
use crate::knobs::host::irqbalance::apply as irqbalance;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads;
use crate::knobs::host::memory::HostRecord;
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::{Place, Value};
use crate::knobs::host::slices::apply::Limits;
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_place;
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::systemd::Units;

/// The host, by its seams.
#[derive(Clone, Copy)]
pub struct HostBench<'a> {
    /// Files.
    pub root: &'a SysRoot,
    /// Affinity calls.
    pub sched: &'a dyn Sched,
    /// The cgroup tree.
    pub cgroups: &'a dyn Cgroups,
    /// systemd.
    pub units: &'a dyn Units,
}

/// Carries out the steps in their order.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable; then nothing was written.
pub fn apply_host(
    bench: HostBench<'_>,
    online: &CpuSet,
    journal: &mut HostJournal,
    steps: Vec<HostStep>,
) -> Result<Vec<HostApplied>, JournalError> {
    intend(journal, &steps)?;
    let mut applied = carry_out(bench, online, steps);
    record(bench.root, journal, &mut applied)?;
    Ok(applied)
}

/// Makes the undo of the steps durable.
///
/// # Errors
/// [`JournalError`]; then nothing may be written.
pub fn intend(journal: &mut HostJournal, steps: &[HostStep]) -> Result<(), JournalError> {
    let intents = steps.iter().filter_map(|step| match step {
        HostStep::Write { place, from, to, .. } => {
            Some(HostRecord::Intent { place: place.clone(), from: from.clone(), to: to.clone() })
        }
        _ => None,
    });
    journal.append(intents.collect())
}

/// Carries out steps whose undo is durable. Where they are about systemd or irqbalance it may take long: no lock
/// should be held then.
#[must_use]
pub fn carry_out(bench: HostBench<'_>, online: &CpuSet, steps: Vec<HostStep>) -> Vec<HostApplied> {
    let HostBench { root, sched, cgroups, units } = bench;
    // Units first, and all of them: some kernels change threads' masks with them.
    let (of_units, others): (Vec<HostStep>, Vec<HostStep>) =
        steps.into_iter().partition(|step| step.place().limited_cgroup().is_some());
    let mut limits = Limits::new(root, cgroups, units, present_cpus(root) | *online);
    let mut applied: Vec<HostApplied> = of_units
        .into_iter()
        .map(|step| carry_out_one(step, root, sched, online, &mut limits))
        .collect();
    limits.clean_up();
    let others = others.into_iter();
    applied.extend(others.map(|step| carry_out_one(step, root, sched, online, &mut limits)));
    limits.clean_up();
    applied
}

/// Records in the journal what has become of steps.
///
/// # Errors
/// [`JournalError`]; then what is undone is only known to be so at the next pass.
pub fn record(
    root: &SysRoot,
    journal: &mut HostJournal,
    applied: &mut [HostApplied],
) -> Result<(), JournalError> {
    for HostApplied { step, outcome, .. } in &mut *applied {
        // No program can have written it: the number is another's by now, or the kernel has chosen by itself what
        // new ones get.
        if let (HostStep::PutBack { place, .. }, HostOutcome::Refused { error }) =
            (&*step, &*outcome)
            && is_kept_irq(place, error)
            && (is_eio(error) || is_fixed(root, place))
            && journal.memory().was_changed(place)
        {
            *outcome = HostOutcome::Gone;
        }
    }
    let new_irqs = Place::of_new_irqs();
    let is_excluded_by_partitions = journal.memory().has_new_irqs()
        && !applied.iter().any(|one| *one.step.place() == new_irqs && is_settled(one));
    // One that is as before may look like a new one, so the next pass decides whether to forget it.
    let stays = |one: &HostApplied| {
        is_excluded_by_partitions
            && one.step.place().irq().is_some()
            && matches!((&one.step, &one.outcome), (HostStep::PutBack { .. }, HostOutcome::Done))
    };
    let settled = applied.iter().filter(|applied| is_settled(applied) && !stays(applied));
    let settled = settled.map(|applied| HostRecord::Settled(applied.step.place().clone()));
    let refused = applied.iter().filter_map(|applied| match (&applied.step, &applied.outcome) {
        (
            HostStep::Write { place, to, .. },
            HostOutcome::Refused { .. } | HostOutcome::Narrowed { .. },
        ) => Some(HostRecord::Refused { place: place.clone(), value: to.clone() }),
        _ => None,
    });
    journal.append(settled.chain(refused).collect())
}

/// Whether its place need not be kept in mind any longer. Kernel threads are: their masks are asked for again.
fn is_settled(HostApplied { step, outcome, .. }: &HostApplied) -> bool {
    match (step, outcome) {
        (HostStep::PutBack { place, .. }, HostOutcome::Done) => !matches!(place, Place::Thread(_)),
        (HostStep::LeaveAlone { .. }, _)
        | (HostStep::Settle { .. }, HostOutcome::Done)
        | (HostStep::PutBack { .. } | HostStep::Write { .. }, HostOutcome::Gone) => true,
        _ => false,
    }
}

fn carry_out_one(
    step: HostStep,
    root: &SysRoot,
    sched: &dyn Sched,
    online: &CpuSet,
    limits: &mut Limits<'_>,
) -> HostApplied {
    let outcome = match &step {
        HostStep::Write { place, to, .. } | HostStep::PutBack { place, to, .. } => {
            write(root, sched, online, limits, place, to)
        }
        HostStep::Settle { place: Place::AllowedCpus { unit, cgroup } } => {
            match limits.tidy(unit, cgroup) {
                Ok(()) => HostOutcome::Done,
                Err(error) => HostOutcome::Refused { error },
            }
        }
        HostStep::Settle { .. } | HostStep::LeaveAlone { .. } | HostStep::Later { .. } => {
            HostOutcome::Done
        }
    };
    let comm = match step.place() {
        Place::Thread(key) if is_told(&step, &outcome) => tasks::name(root, *key),
        _ => None,
    };
    HostApplied { step, outcome, comm: comm.unwrap_or_default() }
}

/// Whether it did not go as usual.
fn is_told(step: &HostStep, outcome: &HostOutcome) -> bool {
    matches!(step, HostStep::LeaveAlone { .. } | HostStep::Later { .. })
        || matches!(outcome, HostOutcome::Refused { .. } | HostOutcome::Narrowed { .. })
}

fn write(
    root: &SysRoot,
    sched: &dyn Sched,
    online: &CpuSet,
    limits: &mut Limits<'_>,
    place: &Place,
    to: &Value,
) -> HostOutcome {
    if let (Place::Irqbalance(process), Value::Cpus(banned)) = (place, to) {
        return irqbalance::write(root, online, *process, banned);
    }
    // The number of a thread that has ended may be another's by now, and a file may have gone.
    match read_place(root, sched, place) {
        Ok(Some(_)) => {}
        Ok(None) => return HostOutcome::Gone,
        Err(error) => return HostOutcome::Refused { error },
    }
    let written = match (place, to) {
        (Place::CpuList(path), Value::Cpus(cpus)) => {
            root.write_value(path, &cpus.to_string()).map_err(|error| error.source)
        }
        (Place::CpuList(path) | Place::Word(path), value) => {
            root.write_value(path, &value.as_written()).map_err(|error| error.source)
        }
        (Place::CpuMask(path), Value::Cpus(cpus)) => {
            root.write_value(path, &cpus.to_cpumask()).map_err(|error| error.source)
        }
        (Place::AllowedCpus { unit, cgroup }, Value::Cpus(cpus)) => limits.set(unit, cgroup, cpus),
        (Place::Cpuset(cgroup), Value::Cpus(cpus)) => limits.set_cpuset(cgroup, cpus),
        (Place::DropIn(path), Value::Word(_)) => limits.remove_drop_in(path),
        (Place::Thread(key), Value::Cpus(cpus)) => sched.set_affinity(key.tid, cpus),
        (
            Place::CpuMask(_)
            | Place::AllowedCpus { .. }
            | Place::Cpuset(_)
            | Place::DropIn(_)
            | Place::Thread(_)
            | Place::Irqbalance(_),
            _,
        ) => Err(io::Error::new(io::ErrorKind::InvalidInput, "a word where CPUs belong")),
    };
    match written {
        Err(error) if is_gone(&error) || is_bound(root, place) => HostOutcome::Gone,
        Err(error) => HostOutcome::Refused { error },
        Ok(()) => match read_place(root, sched, place) {
            Ok(None) => HostOutcome::Gone,
            Ok(Some(now)) if now.same(to, online) => HostOutcome::Done,
            Ok(Some(now)) => HostOutcome::Narrowed { to: now },
            Err(error) => HostOutcome::Refused { error },
        },
    }
}

/// Whether it is a thread that the kernel has bound since: a worker is made like any other kernel thread, and is its
/// pool's a moment later (`kernel/workqueue.c: create_worker`).
fn is_bound(root: &SysRoot, place: &Place) -> bool {
    matches!(place, Place::Thread(key) if kernel_threads::is_bound_kernel_thread(root, *key).is_ok_and(|is| is))
}

fn is_eio(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EIO)
}

/// Whether it is a file that cannot be written. The answer alone is not enough to give an undo up: a process with too few
/// rights gets the same.
fn is_fixed(root: &SysRoot, place: &Place) -> bool {
    let (Place::CpuList(path) | Place::CpuMask(path) | Place::Word(path)) = place else {
        return false;
    };
    let mode = root.path(path).ok().and_then(|path| fs::metadata(path).ok());
    mode.is_some_and(|metadata| metadata.permissions().mode() & 0o222 == 0)
}

/// Whether it is an interrupt whose CPUs the kernel manages: they answer so, since Linux 6.10 with the second
/// (`kernel/irq/proc.c: write_irq_affinity`); with the third a process that may not write files that cannot be written
/// (`register_irq_proc`, since Linux 6.12), as a unit without `CAP_DAC_OVERRIDE`. Before that nothing but the answer
/// distinguishes them.
#[must_use]
pub fn is_kept_irq(place: &Place, error: &io::Error) -> bool {
    use nix::libc::{EACCES, EIO, EPERM};
    place.irq().is_some() && matches!(error.raw_os_error(), Some(EIO | EPERM | EACCES))
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ESRCH | nix::libc::ENOENT))
}
