//! Brings the rest of the host in line with all leases: what one VM wants kept off its CPUs, and what
//! nobody wants any more.
//!
//! ```text
//!   before a partition is built   remember: kernel threads' masks, which the kernel will not put back
//!   after a lease has changed     reconcile: take back, then write
//!   every turn of the slow timer  reconcile: interrupts and kernel threads come and go
//! ```
//!
//! Whoever holds the leases' lock does it for all VMs; the result is the same whoever it is.

use std::collections::{BTreeMap, BTreeSet};

use super::settings::Host;
use super::start_error::StartError;
use crate::apply::{HostApplied, HostOutcome, apply_host};
use crate::cpuset::CpuSet;
use crate::discover::{DiscoverError, Interrupt, interrupts, live_leases, read_host_view};
use crate::journal::{HostJournal, HostMemory, HostRecord, JournalError};
use crate::leases::{LeasesLock, StateDir};
use crate::places::{HostView, Place, Value};
use crate::plan::host::diff::{HostStep, diff};
use crate::plan::host::{Wants, wishes};
use crate::policy::Knob;

/// How often kernel threads are looked at after the last VM. A thread is born in microseconds.
const PASSES_MAX: usize = 4;

/// Why the rest of the host could not be dealt with.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host's journal could not be used; then nothing was written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The host could not be read.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
}

/// What has come of it.
#[derive(Debug, Default)]
pub struct HostReport {
    /// Every step and what became of it.
    pub applied: Vec<HostApplied>,
    /// Interrupts that stay on CPUs kept for VMs, because the kernel manages where they go.
    pub managed: BTreeMap<u32, Interrupt>,
    /// Kernel threads that are bound to CPUs kept for VMs, by name without numbers.
    pub bound: BTreeMap<String, usize>,
}

impl HostReport {
    /// Whether something was refused that could have been expected to go through.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        self.applied.iter().any(|applied| match &applied.outcome {
            HostOutcome::Refused { error } => !is_managed_irq(&applied.step, error),
            HostOutcome::Narrowed { .. } => true,
            HostOutcome::Done | HostOutcome::Gone => false,
        })
    }

    /// What the kernel would not do, in sentences.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        let sentence = |HostApplied { step, outcome }: &HostApplied| match (step, outcome) {
            (step, HostOutcome::Refused { error }) if is_managed_irq(step, error) => None,
            (
                HostStep::Write { place, to, .. } | HostStep::PutBack { place, to, .. },
                HostOutcome::Refused { error },
            ) => Some(format!("{place}: {to}: {error}")),
            (
                HostStep::Write { place, to, .. } | HostStep::PutBack { place, to, .. },
                HostOutcome::Narrowed { to: now },
            ) => Some(format!("{place}: wanted {to}, the kernel made it {now}")),
            _ => None,
        };
        let mut sentences: Vec<String> = self.applied.iter().filter_map(sentence).collect();
        let managed = self.managed.iter().map(|(number, irq)| {
            format!("interrupt {number} ({}): the kernel keeps it where it is", irq.devices)
        });
        sentences.extend(managed);
        sentences
    }
}

/// Interrupts whose CPUs the kernel manages answer so, since Linux 6.10 with the second
/// (`kernel/irq/proc.c: write_irq_affinity`).
fn is_managed_irq(step: &HostStep, error: &std::io::Error) -> bool {
    matches!(step, HostStep::Write { knob: Knob::Irqs, .. })
        && matches!(error.raw_os_error(), Some(nix::libc::EIO | nix::libc::EPERM))
}

/// The number of the interrupt that the kernel would not move.
fn managed_irq(applied: &HostApplied) -> Option<u32> {
    match (&applied.step, &applied.outcome) {
        (step @ HostStep::Write { place, .. }, HostOutcome::Refused { error })
            if is_managed_irq(step, error) =>
        {
            place.irq()
        }
        _ => None,
    }
}

/// Keeps the host in line, and remembers what was refused.
#[derive(Debug, Default)]
pub struct HostKnobs {
    refused: BTreeMap<Place, Value>,
}

impl HostKnobs {
    /// Takes down what the kernel is about to change by itself, as partitions are built.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn remember(
        host: Host<'_>,
        state: &StateDir,
        boot_id: &str,
        _lock: &LeasesLock,
    ) -> Result<(), HostError> {
        let wants = Wants::of(&live_leases(state, boot_id));
        if !wants.has(Knob::Kthreads) && !wants.has(Knob::Workqueues) {
            return Ok(());
        }
        let mut journal = HostJournal::open(&state.host_journal_path(), boot_id)?;
        let view = read_host_view(host.root, host.sched, &wants, journal.memory())?;
        let mut records = new_kernel_threads(&view, journal.memory(), &wants);
        records.extend(view.workqueues.iter().filter_map(|place| {
            let value = view.values.get(place)?.clone();
            Some(HostRecord::Original { place: place.clone(), value })
        }));
        records.extend(off(&wants));
        Ok(journal.append(records)?)
    }

    /// Does what is to be done.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn reconcile(
        &mut self,
        host: Host<'_>,
        state: &StateDir,
        boot_id: &str,
        _lock: &LeasesLock,
    ) -> Result<HostReport, HostError> {
        let wants = Wants::of(&live_leases(state, boot_id));
        let mut journal = HostJournal::open(&state.host_journal_path(), boot_id)?;
        if wants.is_empty() && !journal.exists() {
            return Ok(HostReport::default());
        }
        let (view, mut applied) = self.pass(host, &wants, &mut journal)?;
        // Whatever was born meanwhile was born as its parent was.
        for _ in 1..PASSES_MAX {
            if !wants.is_empty() || !journal.memory().has_fenced() {
                break;
            }
            let (_, more) = self.pass(host, &wants, &mut journal)?;
            let is_done =
                !more.iter().any(|applied| matches!(applied.step, HostStep::PutBack { .. }));
            applied.extend(more);
            if is_done {
                break;
            }
        }
        for applied in &applied {
            if let HostStep::Write { place, to, .. } = &applied.step
                && matches!(
                    applied.outcome,
                    HostOutcome::Refused { .. } | HostOutcome::Narrowed { .. }
                )
            {
                self.refused.insert(place.clone(), to.clone());
            }
        }
        let numbers: BTreeSet<u32> = applied.iter().filter_map(managed_irq).collect();
        let mut managed = BTreeMap::new();
        if !numbers.is_empty() {
            managed = interrupts(host.root, &wants.cpus(Knob::Irqs));
            managed.retain(|number, _| numbers.contains(number));
        }
        let report = HostReport { applied, managed, bound: bound(&view, &wants.all_cpus()) };
        if wants.is_empty() && !report.applied.iter().any(HostApplied::is_left_changed) {
            journal.remove()?;
        }
        Ok(report)
    }
}

impl HostKnobs {
    fn pass(
        &self,
        host: Host<'_>,
        wants: &Wants,
        journal: &mut HostJournal,
    ) -> Result<(HostView, Vec<HostApplied>), HostError> {
        let view = read_host_view(host.root, host.sched, wants, journal.memory())?;
        journal.append(off(wants).into_iter().collect())?;
        journal.append(new_kernel_threads(&view, journal.memory(), wants))?;
        let wishes = wishes(&view, wants, |place| journal.memory().original(place).cloned());
        let mut steps = diff(&view, &wishes, journal.memory());
        steps.retain(|step| match step {
            HostStep::Write { place, to, .. } => self.refused.get(place) != Some(to),
            _ => true,
        });
        let applied = apply_host(host.root, host.sched, &view.online, journal, steps)?;
        Ok((view, applied))
    }
}

/// What is kept from kernel threads, and from what the kernel puts them on by itself.
fn off(wants: &Wants) -> Option<HostRecord> {
    let off = wants.cpus(Knob::Kthreads) | wants.cpus(Knob::Partition);
    (!off.is_empty()).then_some(HostRecord::Off(off))
}

/// The masks of kernel threads that are not remembered yet, as they would be without qmpin.
fn new_kernel_threads(view: &HostView, memory: &HostMemory, wants: &Wants) -> Vec<HostRecord> {
    let is_wanted = wants.has(Knob::Kthreads) || wants.has(Knob::Partition);
    let new = view.kthreads.iter().filter(|place| memory.original(place).is_none());
    let original = |place: &Place| {
        let found = view.values.get(place)?;
        let is_fenced = memory.is_fenced(found, &view.online);
        if !is_fenced && !is_wanted {
            return None;
        }
        let value = if is_fenced { Value::Cpus(view.online) } else { found.clone() };
        Some(HostRecord::Original { place: place.clone(), value })
    };
    new.filter_map(original).collect()
}

/// Puts back what nobody needs changed any more, where there is no VM to do it for.
///
/// # Errors
/// [`StartError`].
pub fn settle_host(
    host: Host<'_>,
    state: &StateDir,
    boot_id: &str,
) -> Result<Vec<HostApplied>, StartError> {
    let leases = state.lock_leases()?;
    Ok(HostKnobs::default().reconcile(host, state, boot_id, &leases)?.applied)
}

fn bound(view: &HostView, off: &CpuSet) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for (comm, _) in view.bound.iter().filter(|(_, cpus)| cpus.intersects(off)) {
        // `ksoftirqd/12` is one of the ksoftirqd.
        let name = comm.split(['/', ':']).next().unwrap_or(comm);
        *names.entry(name.to_owned()).or_default() += 1;
    }
    names
}

/// One line for each knob that was turned, and one for each thing that was refused.
pub fn log_host(report: &HostReport) {
    let mut written: BTreeMap<Knob, (usize, String)> = BTreeMap::new();
    let mut put_back = 0;
    for HostApplied { step, outcome } in &report.applied {
        match (step, outcome) {
            (_, HostOutcome::Gone) | (HostStep::Settle { .. }, _) => {}
            (HostStep::Write { knob, place, from, to }, HostOutcome::Done) => {
                let first = || (0, format!("{place}: {from} → {to}"));
                written.entry(*knob).or_insert_with(first).0 += 1;
            }
            (HostStep::PutBack { .. }, HostOutcome::Done) => put_back += 1,
            (HostStep::LeaveAlone { place, found, before }, _) => tracing::warn!(
                "{place}: somebody else has made it {found}; left so (before qmpin: {before})"
            ),
            (step, HostOutcome::Refused { error }) if is_managed_irq(step, error) => {}
            (
                HostStep::Write { place, from, to, .. } | HostStep::PutBack { place, from, to },
                HostOutcome::Refused { error },
            ) => tracing::warn!("{place}: {from} → {to} was refused: {error}"),
            (
                HostStep::Write { place, to, .. } | HostStep::PutBack { place, to, .. },
                HostOutcome::Narrowed { to: now },
            ) => tracing::warn!("{place}: wanted {to}, the kernel made it {now}"),
        }
    }
    if !report.managed.is_empty() {
        tracing::info!("{}", managed_in_words(&report.managed));
    }
    for (knob, (number, first)) in written {
        match number {
            1 => tracing::info!("{knob}: {first}"),
            number => tracing::info!("{knob}: {number} changed, such as {first}"),
        }
    }
    if put_back > 0 {
        tracing::info!("{put_back} settings of the host put back");
    }
}

/// The interrupts that stay, those first that have fired most.
fn managed_in_words(managed: &BTreeMap<u32, Interrupt>) -> String {
    /// How many are named.
    const NAMED: usize = 4;
    let mut by_count: Vec<(&u32, &Interrupt)> = managed.iter().collect();
    by_count.sort_by_key(|(number, irq)| (std::cmp::Reverse(irq.fired), **number));
    let name = |(number, irq): &(&u32, &Interrupt)| match irq.devices.as_str() {
        "" => format!("{number}: {}", irq.fired),
        devices => format!("{number} ({devices}): {}", irq.fired),
    };
    let named: Vec<String> = by_count.iter().take(NAMED).map(name).collect();
    let more = if by_count.len() > NAMED { ", …" } else { "" };
    format!(
        "irqs: {} stay on CPUs of VMs, where the kernel itself keeps them; fired there so far: {}{more}",
        by_count.len(),
        named.join(", ")
    )
}
