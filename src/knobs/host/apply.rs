//! Writes one place of the host and reads it back, and carries out all steps about them.

use std::os::unix::fs::PermissionsExt as _;
use std::{fs, io};

use crate::cpuset::CpuSet;
use crate::discover::{present_cpus, tasks};
use crate::journal::JournalError;
use crate::knobs::execute::{Applied, Step, carry_out, make_durable};
use crate::knobs::ground::Host;
use crate::knobs::host::irqbalance::apply as irqbalance;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads;
use crate::knobs::host::memory::HostRecord;
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::{Place, Value};
use crate::knobs::host::settle::settle;
use crate::knobs::host::slices::apply::Limits;
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_place;
use crate::sysroot::SysRoot;

/// Carries out the steps in their order.
///
/// # Errors
/// [`JournalError`] where the undo could not be made durable; then nothing was written.
pub fn apply_host(
    host: Host<'_>,
    online: &CpuSet,
    journal: &mut HostJournal,
    steps: Vec<HostStep>,
) -> Result<Vec<HostApplied>, JournalError> {
    make_durable(journal, None, &steps)?;
    let mut applied = carry_out_host(host, online, steps);
    journal.append(settle(journal.memory(), &mut applied))?;
    Ok(applied)
}

/// Carries out steps whose undo is durable. Where they are about systemd or irqbalance it may take long: no lock
/// should be held then.
#[must_use]
pub fn carry_out_host(host: Host<'_>, online: &CpuSet, steps: Vec<HostStep>) -> Vec<HostApplied> {
    // Units first, and all of them: some kernels change threads' masks with them.
    let (of_units, others): (Vec<HostStep>, Vec<HostStep>) =
        steps.into_iter().partition(|step| step.place().limited_cgroup().is_some());
    let Host { root, cgroups, units, .. } = host;
    let limits = Limits::new(root, cgroups, units, present_cpus(root) | *online);
    let mut writer = HostWriter { host, online: *online, limits };
    let mut applied = Vec::new();
    for some in [of_units, others] {
        // Before systemd reloads, which takes long: a thread may have ended by then.
        let some = carry_out(&mut writer, some).into_iter();
        applied.extend(some.map(|one| with_facts(root, one)));
        writer.limits.clean_up();
    }
    applied
}

/// What one step is carried out with.
pub struct HostWriter<'a> {
    host: Host<'a>,
    online: CpuSet,
    limits: Limits<'a>,
}

impl Step for HostStep {
    type Bench<'a> = HostWriter<'a>;
    type Record = HostRecord;
    type Outcome = HostOutcome;

    fn undo(&self) -> Option<HostRecord> {
        let HostStep::Write { place, from, to, .. } = self else { return None };
        Some(HostRecord::Intent { place: place.clone(), from: from.clone(), to: to.clone() })
    }

    fn carry_out(&self, writer: &mut HostWriter<'_>) -> HostOutcome {
        match self {
            HostStep::Write { place, to, .. } | HostStep::PutBack { place, to, .. } => {
                writer.write(place, to)
            }
            HostStep::Settle { place: Place::AllowedCpus { unit, cgroup } } => {
                match writer.limits.tidy(unit, cgroup) {
                    Ok(()) => HostOutcome::Done,
                    Err(error) => HostOutcome::Refused { error },
                }
            }
            HostStep::Settle { .. } | HostStep::LeaveAlone { .. } | HostStep::Later { .. } => {
                HostOutcome::Done
            }
        }
    }
}

/// With what there is to know of the place, where it did not go as usual.
fn with_facts(root: &SysRoot, Applied { step, outcome }: Applied<HostStep>) -> HostApplied {
    let is_told = matches!(step, HostStep::LeaveAlone { .. } | HostStep::Later { .. });
    if !is_told && !outcome.fell_short() {
        return HostApplied::usual(step, outcome);
    }
    let comm = match step.place() {
        Place::Thread(key) => tasks::name(root, *key).unwrap_or_default(),
        _ => String::new(),
    };
    let is_fixed = is_fixed(root, step.place());
    HostApplied { step, outcome, comm, is_fixed }
}

impl HostWriter<'_> {
    fn write(&mut self, place: &Place, to: &Value) -> HostOutcome {
        let Host { root, sched, .. } = self.host;
        let HostWriter { online, limits, .. } = self;
        if let (Place::Irqbalance(process), Value::Cpus(banned)) = (place, to) {
            return irqbalance::write(root, online, *process, banned);
        }
        // The number of a thread that has ended may be another's by now, and a file may have gone.
        match read_place(root, sched, place) {
            Ok(Some(_)) => {}
            Ok(None) => return HostOutcome::Gone,
            Err(error) => return HostOutcome::Refused { error },
        }
        let write =
            |path: &str, text: String| root.write_value(path, &text).map_err(|error| error.source);
        let written = match (place, to.cpus()) {
            (Place::CpuList(path) | Place::Word(path), _) => write(path, to.as_written()),
            (Place::CpuMask(path), Some(cpus)) => write(path, cpus.to_cpumask()),
            (Place::AllowedCpus { unit, cgroup }, Some(cpus)) => limits.set(unit, cgroup, &cpus),
            (Place::Cpuset(cgroup), Some(cpus)) => limits.set_cpuset(cgroup, &cpus),
            (Place::DropIn(path), None) => limits.remove_drop_in(path),
            (Place::Thread(key), Some(cpus)) => sched.set_affinity(key.tid, &cpus),
            (_, None) | (Place::DropIn(_) | Place::Irqbalance(_), Some(_)) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "a word where CPUs belong"))
            }
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
}

/// Whether it is a thread that the kernel has bound since: a worker is made like any other kernel thread, and is its
/// pool's a moment later (`kernel/workqueue.c: create_worker`).
fn is_bound(root: &SysRoot, place: &Place) -> bool {
    matches!(place, Place::Thread(key) if kernel_threads::is_bound_kernel_thread(root, *key))
}

/// Whether it is a file that cannot be written. The answer alone is not enough to give an undo up: a process with too
/// few rights gets the same.
fn is_fixed(root: &SysRoot, place: &Place) -> bool {
    let (Place::CpuList(path) | Place::CpuMask(path) | Place::Word(path)) = place else {
        return false;
    };
    let mode = root.path(path).ok().and_then(|path| fs::metadata(path).ok());
    mode.is_some_and(|metadata| metadata.permissions().mode() & 0o222 == 0)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ESRCH | nix::libc::ENOENT))
}
