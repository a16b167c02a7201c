//! Brings the rest of the host in line with all leases: what one VM wants excluded from its CPUs, and what
//! no VM wants any more.
//!
//! ```text
//!   before a partition is built   remember: kernel threads' masks, which the kernel will not restored
//!   after a lease has changed     reconcile: restore, then write
//!   every turn of the slow timer  reconcile: interrupts and kernel threads come and go
//! ```
//!
//! The process that holds the host's lock does it for all VMs; the result does not depend on which one it is.
//!
//! Other programs are asked and configured without any lock, because they may take long:
//!
//! ```text
//!   ask irqbalance ─▶ [lock: read, plan, undo durable] ─▶ set systemd ─▶ [lock: record]
//!                  ─▶ [lock: read, plan, undo durable, write] ─▶ set irqbalance ─▶ [lock: record]
//! ```
//!
//! What another process has done in between is seen by the next pass, which starts from what is there.

mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use walk::{Site, Which, new_kernel_threads};

use crate::cpuset::CpuSet;
use crate::discover::{DiscoverError, all_leases, live_leases, live_leases_and_doubts};
use crate::error::chain;
use crate::journal::{JournalError, Memory, UnknownLines};
use crate::knobs::ground::Host;
use crate::knobs::host::diff::diff;
use crate::knobs::host::interrupts::interrupts;
use crate::knobs::host::irqbalance::keep::Irqbalances;
use crate::knobs::host::irqbalance::read::{Silent, irqbalances};
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads::KthreadScan;
use crate::knobs::host::memory::{HostMemory, HostRecord};
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::pass::HostPass;
use crate::knobs::host::places::{HostView, Irqbalance, Place, Value};
use crate::knobs::host::report::HostReport;
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_host_view;
use crate::knobs::host::{Wants, kernel_threads, wishes};
use crate::leases::{StateDir, StateError};
use crate::locks::{CheckLock, HostLock};
use crate::policy::Knob;
use crate::sysroot::SysRoot;
use crate::threads::ThreadKey;
use crate::wording::{counted, cpus_in_words};

/// How often kernel threads are looked at after the last VM. A thread is created in microseconds.
const PASSES_MAX: usize = 4;
/// Of so many passes, one searches all of `/proc` for kernel threads: by default, one in a minute.
const LOOKS_PER_SCAN: u32 = 12;
/// How long one pass of another supervisor may take. On a host of hundreds of CPUs with tens of VMs it takes seconds,
/// and where several make one at the same time, each of them takes longer.
const CHECK_LIMIT: Duration = Duration::from_secs(30);
/// Between two checks whether irqbalance does again what it did before.
const IRQBALANCE_PAUSE: Duration = Duration::from_millis(250);

/// Why the rest of the host could not be dealt with.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host's journal could not be used; then nothing was written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The host could not be read.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// The host's lock could not be had; then nothing was written.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Keeps the host in line, and remembers what was refused.
#[derive(Debug, Default)]
pub struct HostKnobs {
    refused: BTreeMap<Place, Value>,
    /// What places were to hold the last time.
    wished: BTreeMap<Place, Value>,
    /// What the journal remembered the last time: another program may remove the file.
    known: HostMemory,
    /// Lines of the journal that the log has.
    unknown: Option<UnknownLines>,
    /// Why the journal could not be made shorter the last time.
    uncompacted: Option<String>,
    irqbalances: Irqbalances,
    /// How often it was looked.
    looks: u32,
    /// Since when another process has checked the host, each time that it was asked, and the last pass by then.
    busy: Option<(Instant, Option<HostPass>)>,
}

/// When the host is to be compared with the leases.
#[derive(Debug)]
pub enum Due {
    /// Now, and by this process alone while it has the lock.
    Now(Option<CheckLock>),
    /// In a moment: another process is at it.
    Soon,
    /// With the next tick of the timer: it was done just now.
    NotYet,
}

impl HostKnobs {
    /// Takes down what the kernel is about to change by itself, as partitions are built.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn remember(
        &mut self,
        host: Host<'_>,
        state: &StateDir,
        boot_id: &str,
        _lock: &HostLock,
    ) -> Result<(), HostError> {
        let wants = Wants::of(&live_leases(host.root, state, boot_id));
        let concerned = [Knob::Partition, Knob::Kthreads, Knob::Workqueues];
        if !concerned.iter().any(|knob| wants.has(*knob)) {
            return Ok(());
        }
        let mut journal = self.open(state, boot_id)?;
        // One that is left out now has no mask of its own any more when it is found.
        let view = read_host_view(host, &wants, journal.memory(), KthreadScan::All)?;
        let mut records = new_kernel_threads(&view, journal.memory(), &wants);
        records.extend(view.workqueues.iter().filter_map(|place| {
            let value = view.values.get(place)?.clone();
            Some(HostRecord::Original { place: place.clone(), value })
        }));
        records.extend(wants.exclusion_masks.iter().copied().map(HostRecord::Off));
        Ok(journal.append(records)?)
    }

    /// Takes over the masks that kernel threads of a VM had before it was attached. It is not any more, so
    /// they are the host's; where nothing is kept from the host's, they have them already.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn take_over(
        &mut self,
        root: &SysRoot,
        state: &StateDir,
        boot_id: &str,
        vm: &Memory,
        _lock: &HostLock,
    ) -> Result<(), HostError> {
        let mut journal = self.open(state, boot_id)?;
        if !journal.memory().has_excluded() {
            return Ok(());
        }
        let original = |key: ThreadKey| {
            let is_there = kernel_threads::is_kernel_thread(root, key).unwrap_or(false);
            let value = Value::Cpus(vm.before(key).filter(|_| is_there)?);
            Some(HostRecord::Original { place: Place::Thread(key), value })
        };
        Ok(journal.append(vm.threads().filter_map(original).collect())?)
    }

    /// What the journal remembers, or did before another program removed it.
    #[must_use]
    pub fn memory(&self, state: &StateDir, boot_id: &str) -> HostMemory {
        match HostJournal::read(&state.host_journal_path(), boot_id) {
            Ok(memory) if !memory.is_empty() => memory,
            _ => self.known.clone(),
        }
    }

    /// Whether the host is to be compared with the leases now: not where a supervisor, this or another, has done so
    /// less than `within` ago, nor while one is at it. With many VMs, most only ask. `now` is when it is asked.
    pub fn is_due(
        &mut self,
        root: &SysRoot,
        state: &StateDir,
        boot_id: &str,
        within: Duration,
        now: Instant,
    ) -> Due {
        if self.irqbalances.is_any_waited_for() {
            return Due::Now(None);
        }
        let is_kept = |pass: &Option<HostPass>| {
            pass.as_ref().is_some_and(|pass| {
                pass.is_recent(within) && pass.went_by(&live_leases(root, state, boot_id))
            })
        };
        let last = HostPass::last(state);
        if is_kept(&last) {
            self.busy = None;
            return Due::NotYet;
        }
        let lock = state.try_lock_check().unwrap_or_default();
        if lock.is_none() {
            let (since, then) = self.busy.get_or_insert_with(|| (now, last.clone()));
            if *then != last {
                (*since, *then) = (now, last);
            }
            // One that has not come to the end of a pass for so long hangs.
            if now.duration_since(*since) < CHECK_LIMIT {
                return Due::Soon;
            }
        }
        self.busy = None;
        // The check that was under way may have ended in between.
        if is_kept(&HostPass::last(state)) { Due::NotYet } else { Due::Now(lock) }
    }

    /// Brings the host in line with all leases. It takes the host's lock itself, more than once.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn reconcile(
        &mut self,
        host: Host<'_>,
        state: &StateDir,
        boot_id: &str,
    ) -> Result<HostReport, HostError> {
        // What a VM wants whose lease cannot be read is not known, so that nothing may be taken from it.
        let (_, doubts) = live_leases_and_doubts(host.root, host.sched, state, boot_id);
        if !doubts.is_empty() {
            let is_changed = !self.memory(state, boot_id).is_empty();
            let wants = !Wants::of(&live_leases(host.root, state, boot_id)).is_empty();
            let left =
                doubts.iter().map(|doubt| format!("the rest of the host stays as it is: {doubt}"));
            let held_back = if is_changed || wants { left.collect() } else { Vec::new() };
            return Ok(HostReport { held_back, ..HostReport::default() });
        }
        let site = Site { host, state, boot_id };
        let mut asked = self.ask_irqbalances(site);
        let mut untold = Vec::new();
        let wished = std::mem::take(&mut self.wished);
        let Some(first) = self.pass(site, Which::Units, &asked, &mut untold)? else {
            return Ok(HostReport::default());
        };
        let mut applied = first.applied;
        let mut last = None;
        for number in 0..PASSES_MAX {
            if number > 0 {
                asked = self.ask_irqbalances(site);
            }
            let Some(pass) = self.pass(site, Which::Rest, &asked, &mut untold)? else { break };
            // Tried again: what has come of it now counts.
            let again = |one: &HostApplied| {
                pass.applied.iter().any(|other| other.step.place() == one.step.place())
            };
            applied.retain(|one| !one.is_left_changed() || !again(one));
            let is_done =
                !pass.applied.iter().any(|one| matches!(one.step, HostStep::PutBack { .. }));
            // A thread that was created meanwhile has the mask of its parent.
            let is_last = pass.wants.is_empty() && self.known.has_excluded();
            applied.extend(pass.applied);
            last = Some((pass.view, pass.wants));
            if !is_last || (number > 0 && is_done) {
                break;
            }
        }
        let Some((view, wants)) = last else { return Ok(HostReport::default()) };
        // It may have been set by one pass, and have taken it by the next.
        applied.retain(|one| {
            !matches!(one.outcome, HostOutcome::Pending { .. })
                || self.irqbalances.is_waited_for(one.step.place())
        });
        let refused = applied.iter().filter_map(HostApplied::unwritten);
        self.refused.extend(refused.map(|(place, to)| (place.clone(), to.clone())));
        // An attached VM's supervisor tries again; the last one has to report what it leaves.
        if !wants.is_empty() {
            applied.retain(|one| !matches!(one.step, HostStep::Later { .. }));
        }
        let others = if wants.is_empty() { partitions(state, boot_id) } else { CpuSet::EMPTY };
        let (waits, applied): (Vec<HostApplied>, Vec<HostApplied>) =
            applied.into_iter().partition(|one| one.lacks_only(&others));
        let numbers: BTreeSet<u32> = applied.iter().filter_map(HostApplied::managed_irq).collect();
        let mut managed = BTreeMap::new();
        if !numbers.is_empty() {
            let mut known = interrupts(host.root, &wants.cpus(Knob::Irqs));
            let of = |number| (number, known.remove(&number).unwrap_or_default());
            managed = numbers.into_iter().map(of).collect();
        }
        let off = wants.all_cpus();
        let bound = view.bound.iter().filter(|(_, cpus)| cpus.intersects(&off));
        let bound = kernel_threads::by_name(bound.map(|(comm, _)| comm.as_str()));
        // By the leases it is to be as it was to be before, and no qmpin has made it what it was found to be.
        let is_drift = |one: &&HostApplied| match &one.step {
            HostStep::Write { place, from, to, .. } => {
                wished.get(place) == Some(to) && !self.known.was_tried(place, from)
            }
            _ => false,
        };
        let drifted = applied.iter().filter(is_drift).map(|one| one.step.place().clone()).collect();
        // While there is a VM, these may be for a newer qmpin that works for one.
        let unknown = self.known.unknown().filter(|_| wants.is_empty()).cloned();
        let report = HostReport {
            applied,
            drifted,
            managed,
            bound,
            vfio: view.vfio,
            untold,
            unknown,
            held_back: Vec::new(),
        };
        let is_left = report.applied.iter().any(HostApplied::is_left_changed);
        if !waits.is_empty() {
            // The last of them to go finds in the journal what is left.
            let threads = counted(waits.len(), "kernel thread");
            tracing::info!(
                "{threads} may not run on {} yet: VMs that end at the same time have partitions there, and restore that",
                cpus_in_words(&others)
            );
            self.known = HostMemory::default();
            return Ok(report);
        }
        if wants.is_empty() && !is_left && report.unknown.is_none() {
            self.settle(site)?;
        }
        Ok(report)
    }

    /// Removes the host's journal after the last VM, where nothing is left to restore.
    fn settle(&mut self, Site { host, state, boot_id }: Site<'_>) -> Result<(), HostError> {
        let _lock = state.lock_host()?;
        // A VM may have come meanwhile.
        if !Wants::of(&live_leases(host.root, state, boot_id)).is_empty() {
            return Ok(());
        }
        let mut journal = self.open(state, boot_id)?;
        if !journal.memory().has_irqbalance() {
            journal.remove()?;
        }
        self.known = journal.memory().clone();
        Ok(())
    }

    /// Asks every irqbalance, where qmpin has to do with it. It may take long.
    fn ask_irqbalances(&self, Site { host, state, boot_id }: Site<'_>) -> Vec<Irqbalance> {
        let is_wanted = Wants::of(&live_leases(host.root, state, boot_id)).has(Knob::Irqs);
        if !is_wanted && !self.memory(state, boot_id).has_irqs() {
            return Vec::new();
        }
        irqbalances(host.root, &self.irqbalances.silent())
    }

    /// Takes what the kernel changes by itself, as a partition comes or goes, for no other program's doing.
    pub fn expect_changes(&mut self) {
        self.wished.clear();
    }

    /// Whether there is something to restore, as far as is known without the journal.
    #[must_use]
    pub fn knows_something(&self) -> bool {
        !self.known.is_empty()
    }

    /// The journal as it is, or as it was before another program removed it.
    fn open(&mut self, state: &StateDir, boot_id: &str) -> Result<HostJournal, JournalError> {
        let path = state.host_journal_path();
        let mut journal = HostJournal::open(&path, boot_id)?;
        if !journal.exists() && !self.known.is_empty() {
            tracing::warn!("{} is gone: written again from memory", path.display());
            journal.rewrite(&self.known)?;
        }
        let unknown = journal.memory().unknown();
        if unknown != self.unknown.as_ref() {
            if let Some(unknown) = unknown {
                tracing::warn!("{unknown}");
            }
            self.unknown = unknown.cloned();
        }
        // Nothing depends on it: the long one is as right.
        let uncompacted = journal.compact().err().map(|error| chain(&error));
        if let Some(reason) = &uncompacted
            && self.uncompacted.is_none()
        {
            tracing::warn!("the host's journal is long and stays so for now: {reason}");
        }
        self.uncompacted = uncompacted;
        Ok(journal)
    }

    /// Waits until irqbalance does again what it did before, where it was set to: it applies that at the end
    /// of its interval. To be called when nothing else is left to do, and without any lock.
    pub fn await_irqbalance(
        &mut self,
        host: Host<'_>,
        state: &StateDir,
        boot_id: &str,
        applied: &mut Vec<HostApplied>,
    ) {
        let Some(until) = self.irqbalances.putting_back_until() else { return };
        tracing::info!("waiting for irqbalance to do again what it did before");
        loop {
            thread::sleep(IRQBALANCE_PAUSE);
            let report = match self.reconcile(host, state, boot_id) {
                Ok(report) => report,
                Err(error) => {
                    tracing::warn!("the rest of the host: {}", chain(&error));
                    return;
                }
            };
            // Or another VM has come, and wants another setting.
            let is_done = self.irqbalances.putting_back_until().is_none();
            if is_done || Instant::now() > until {
                let is_of_irqbalance = |one: &HostApplied| {
                    matches!(one.step, HostStep::PutBack { place: Place::Irqbalance(_), .. })
                };
                applied.retain(|one| !is_of_irqbalance(one));
                applied.extend(report.applied.into_iter().filter(is_of_irqbalance));
                return;
            }
        }
    }
}

/// The CPUs for which VMs that have not forgotten their leases yet have, or had, partitions.
fn partitions(state: &StateDir, boot_id: &str) -> CpuSet {
    let leases = all_leases(state).into_iter();
    let partitions = leases.filter(|lease| lease.boot_id == boot_id && lease.partition.is_some());
    partitions.fold(CpuSet::EMPTY, |all, lease| all | lease.exclusive)
}

/// The host as it is, and what is to be done about it for all who want something of it. An irqbalance in `silent` is
/// not asked; one that does not answer is added.
///
/// # Errors
/// [`DiscoverError`] where the host cannot be read.
pub fn host_steps(
    host: Host<'_>,
    wants: &Wants,
    memory: &HostMemory,
    silent: &mut Silent,
) -> Result<(HostView, Vec<HostStep>), DiscoverError> {
    let mut view = read_host_view(host, wants, memory, KthreadScan::All)?;
    if wants.has(Knob::Irqs) || memory.has_irqs() {
        view = view.with_irqbalances(irqbalances(host.root, silent));
    }
    let deaf =
        view.irqbalances.iter().filter_map(|one| Some((one.process, one.banned.clone().err()?)));
    silent.extend(deaf);
    let steps = diff(&view, &wishes(&view, wants, memory), memory);
    Ok((view, steps))
}

/// Restores what no VM needs changed any more, where there is no VM to do it for.
///
/// # Errors
/// [`HostError`].
pub fn settle_host(
    host: Host<'_>,
    state: &StateDir,
    boot_id: &str,
) -> Result<HostReport, HostError> {
    let mut knobs = HostKnobs::default();
    let mut report = knobs.reconcile(host, state, boot_id)?;
    knobs.await_irqbalance(host, state, boot_id, &mut report.applied);
    state.tidy();
    Ok(report)
}
