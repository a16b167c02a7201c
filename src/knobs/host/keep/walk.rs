//! One walk over the host under its lock: read, plan, undo durable, write. Calls of other programs are made without the
//! lock, and recorded under it.

use super::{HostError, HostKnobs, LOOKS_PER_SCAN};
use crate::cpuset::CpuSet;
use crate::discover::{OwnMask, live_leases, with_own_masks};
use crate::ids::Pid;
use crate::knobs::execute::make_durable;
use crate::knobs::ground::Host;
use crate::knobs::host::apply::{apply_host, carry_out_host};
use crate::knobs::host::diff::diff;
use crate::knobs::host::kernel_threads::KthreadScan;
use crate::knobs::host::memory::{HostMemory, HostRecord};
use crate::knobs::host::new_irqs::{created_with_exclusion_mask, like_new};
use crate::knobs::host::outcome::HostApplied;
use crate::knobs::host::pass::{HostPass, now_ms};
use crate::knobs::host::places::{HostView, Irqbalance, Place, Value};
use crate::knobs::host::power::preferences;
use crate::knobs::host::settle::settle;
use crate::knobs::host::slices::plan::relimited;
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_host_view;
use crate::knobs::host::{Wants, wishes};
use crate::leases::StateDir;
use crate::policy::Knob;

impl HostKnobs {
    /// How kernel threads are to be looked for: what is created while a VM is attached is created off its CPUs, so one
    /// that is found late has done no harm. After the last VM there is no later.
    fn next_scan(&mut self, wants: &Wants) -> KthreadScan {
        let is_due = self.looks.is_multiple_of(LOOKS_PER_SCAN);
        self.looks = self.looks.wrapping_add(1);
        if is_due || wants.is_empty() { KthreadScan::All } else { KthreadScan::Children }
    }

    /// Reads the host, and carries out the steps about systemd, or all others. `None`: there is nothing that
    /// qmpin has to do with.
    pub(super) fn pass(
        &mut self,
        site: Site<'_>,
        which: Which,
        asked: &[Irqbalance],
        untold: &mut Vec<String>,
    ) -> Result<Option<Pass>, HostError> {
        let Site { host, state, boot_id } = site;
        let mut lock = state.lock_host()?;
        let leases = live_leases(host.root, state, boot_id);
        let began_ms = now_ms();
        let wants = Wants::of(&leases);
        let mut journal = self.open(state, boot_id)?;
        if wants.is_empty() && !journal.exists() {
            return Ok(None);
        }
        let is_about_units = !wants.slices.is_empty() || journal.memory().has_units();
        if which == Which::Units && !is_about_units {
            return Ok(Some(Pass::default()));
        }
        if !wants.slices.is_empty() && !journal.memory().has_units() {
            let vms: Vec<Pid> = leases.iter().map(|lease| lease.qemu.pid).collect();
            journal.append(own_masks(host, &vms))?;
        }
        let scan = match which {
            // Limits do not depend on kernel threads.
            Which::Units => KthreadScan::Children,
            Which::Rest => self.next_scan(&wants),
        };
        let view =
            read_host_view(host, &wants, journal.memory(), scan)?.with_irqbalances(asked.to_vec());
        untold.extend(self.irqbalances.saw(&view));
        journal.append(wants.exclusion_masks.iter().copied().map(HostRecord::Off).collect())?;
        journal.append(new_kernel_threads(&view, journal.memory(), &wants))?;
        journal.append(created_with_exclusion_mask(&view, &wants, journal.memory()))?;
        journal.append(relimited(&view, journal.memory()))?;
        let wishes = wishes(&view, &wants, journal.memory());
        let mut steps = diff(&view, &wishes, journal.memory());
        // irqbalance applies a setting later, so it is set more than once.
        let of_ours = wishes.iter().filter(|wish| !matches!(wish.place, Place::Irqbalance(_)));
        self.wished = of_ours.map(|wish| (wish.place.clone(), wish.value.clone())).collect();
        steps.extend(self.irqbalances.to_tell_anew(&view, &wishes));
        steps.retain(|step| match step {
            HostStep::Write { place, to, .. } => self.refused.get(place) != Some(to),
            _ => true,
        });
        let are_of_units = which == Which::Units;
        steps.retain(|step| step.place().limited_cgroup().is_some() == are_of_units);
        let (steps, mut applied) = self.irqbalances.hold_back(steps, &view.online);
        let mut records = like_new(&view, journal.memory(), &steps);
        records.extend(preferences(&view, &steps));
        journal.append(records)?;
        let (calls, steps): (Vec<_>, Vec<_>) = steps.into_iter().partition(is_call);
        applied.extend(apply_host(host, &view.online, &mut journal, steps)?);
        if !calls.is_empty() {
            make_durable(&mut journal, None, &calls)?;
            // It may be written anew, or removed, while this process does not hold the lock.
            drop((journal, lock));
            let mut called = carry_out_host(host, &view.online, calls);
            lock = state.lock_host()?;
            journal = self.open(state, boot_id)?;
            journal.append(settle(journal.memory(), &mut called))?;
            applied.extend(called);
        }
        self.irqbalances.note(&applied);
        self.known = journal.memory().clone();
        if which == Which::Rest
            && !wants.is_empty()
            && let Err(error) = HostPass::done(began_ms, &wants, &view).note(&lock)
        {
            tracing::debug!("other supervisors check the host, too: {error}");
        }
        Ok(Some(Pass { view, applied, wants }))
    }
}

/// Which steps a pass carries out. Limits of units come first, since some kernels change the masks of all threads
/// of a unit with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    Units,
    Rest,
}

/// Whether another program is asked for it.
fn is_call(step: &HostStep) -> bool {
    matches!(step.place(), Place::AllowedCpus { .. } | Place::DropIn(_) | Place::Irqbalance(_))
}

/// What a pass works on.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) host: Host<'a>,
    pub(super) state: &'a StateDir,
    pub(super) boot_id: &'a str,
}

/// What a pass has found and done.
#[derive(Default)]
pub(super) struct Pass {
    pub(super) view: HostView,
    pub(super) applied: Vec<HostApplied>,
    pub(super) wants: Wants,
}

/// The masks that threads outside all VMs have of their own, before any unit is limited.
fn own_masks(host: Host<'_>, vms: &[Pid]) -> Vec<HostRecord> {
    let found = with_own_masks(host.root, host.sched, vms, &CpuSet::EMPTY).into_iter();
    let original = |own: OwnMask| HostRecord::Original {
        place: Place::Thread(own.key),
        value: Value::Cpus(own.cpus),
    };
    found.map(original).collect()
}

/// The masks of kernel threads that are not remembered yet, as they would be without qmpin.
pub(super) fn new_kernel_threads(
    view: &HostView,
    memory: &HostMemory,
    wants: &Wants,
) -> Vec<HostRecord> {
    let is_wanted = wants.has(Knob::Kthreads) || wants.has(Knob::Partition);
    let new = view.kthreads.iter().filter(|place| memory.original(place).is_none());
    let original = |place: &Place| {
        let found = view.values.get(place)?;
        let has_exclusion_mask = memory.has_exclusion_mask(found, &view.online, &view.online);
        if !has_exclusion_mask && !is_wanted {
            return None;
        }
        let value = if has_exclusion_mask { Value::Cpus(view.online) } else { found.clone() };
        Some(HostRecord::Original { place: place.clone(), value })
    };
    new.filter_map(original).collect()
}
