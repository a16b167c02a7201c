//! What has become of the rest of the host, and what the log says of it.

use std::collections::{BTreeMap, BTreeSet};

use crate::journal::UnknownLines;
use crate::knobs::host::interrupts::{Interrupt, kept_in_words};
use crate::knobs::host::kernel_threads;
use crate::knobs::host::outcome::{HostApplied, HostOutcome};
use crate::knobs::host::places::{Place, VfioIrq, knob_in_words};
use crate::knobs::host::refusal::{host_refusal, left_alone};
use crate::knobs::host::step::HostStep;
use crate::policy::Knob;

/// What has come of it.
#[derive(Debug, Default)]
pub struct HostReport {
    /// Every step and what became of it.
    pub applied: Vec<HostApplied>,
    /// Places that were as they are to be, and that another program had changed.
    pub drifted: BTreeSet<Place>,
    /// Interrupts that stay on CPUs kept for VMs, because the kernel manages where they go.
    pub managed: BTreeMap<u32, Interrupt>,
    /// Kernel threads that are bound to CPUs kept for VMs, by name without numbers.
    pub bound: BTreeMap<String, usize>,
    /// Interrupts of VMs' own devices.
    pub vfio: BTreeMap<Place, VfioIrq>,
    /// Which irqbalance cannot be configured, and why; once for each.
    pub untold: Vec<String>,
    /// Lines of the host's journal that this qmpin does not know how to undo, where no VM is left.
    pub unknown: Option<UnknownLines>,
    /// Why nothing was done, in sentences: a lease cannot be read.
    pub held_back: Vec<String>,
}

impl HostReport {
    /// With results of an earlier pass that were not reported.
    #[must_use]
    pub fn after(mut self, earlier: HostReport) -> HostReport {
        self.applied.splice(0..0, earlier.applied);
        self.managed.extend(earlier.managed);
        self
    }

    /// Whether something was refused that could have been expected to go through.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        let is_short = |one: &HostApplied| one.outcome.fell_short() && one.managed_irq().is_none();
        self.applied.iter().any(is_short) || !self.untold.is_empty() || !self.held_back.is_empty()
    }

    /// What the kernel would not do, in sentences.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        let unexpected = self.applied.iter().filter(|one| one.managed_irq().is_none());
        let mut sentences: Vec<String> = unexpected.filter_map(host_refusal).collect();
        sentences.extend(self.untold.iter().chain(&self.held_back).cloned());
        sentences
    }

    /// What the kernel itself keeps on CPUs of VMs, and no program can move: interrupts with how often they have
    /// fired there, and threads. In sentences.
    #[must_use]
    pub fn kept_by_the_kernel(&self) -> Vec<String> {
        let irqs = (!self.managed.is_empty())
            .then(|| format!("irqs: {}", kept_in_words(self.managed.iter())));
        let threads = (!self.bound.is_empty())
            .then(|| format!("kthreads: {}", kernel_threads::bound_in_words(self.bound.iter())));
        irqs.into_iter().chain(threads).collect()
    }
}

/// What the log has of the host already: each is said once.
#[derive(Debug, Default)]
pub struct HostLines {
    drifted: BTreeSet<Place>,
    bound: BTreeSet<String>,
}

/// One line for each knob that was turned, and one for each thing that was refused.
pub fn log_host(report: &HostReport, lines: &mut HostLines) {
    let mut written: BTreeMap<(Knob, String), (usize, String)> = BTreeMap::new();
    let mut put_back = 0;
    for one in &report.applied {
        match (&one.step, &one.outcome) {
            (_, HostOutcome::Gone) | (HostStep::Settle { .. }, _) => {}
            (HostStep::Write { place, from, to, .. }, HostOutcome::Done)
                if report.drifted.contains(place) =>
            {
                if lines.drifted.insert(place.clone()) {
                    tracing::warn!(
                        "{place}: changed externally to {from}; restored to {to} (further changes are counted, not logged)"
                    );
                }
            }
            (HostStep::Write { knob, place, from, to }, HostOutcome::Done) => {
                let first = || (0, format!("{place}: {from} → {to}"));
                let what = knob_in_words(*knob, place, &report.vfio);
                written.entry((*knob, what)).or_insert_with(first).0 += 1;
            }
            (HostStep::Write { knob, place, from, to }, HostOutcome::Pending { within_s }) => {
                tracing::info!("{knob}: {place}: {from} → {to}, within {within_s} s");
            }
            (HostStep::PutBack { .. }, HostOutcome::Done) => put_back += 1,
            (HostStep::PutBack { place, to, .. }, HostOutcome::Pending { within_s }) => {
                tracing::info!("{place}: back to {to} within {within_s} s");
            }
            _ if one.managed_irq().is_some() => {}
            _ => {
                if let Some(sentence) = host_refusal(one).or_else(|| left_alone(one)) {
                    tracing::warn!("{sentence}");
                }
            }
        }
    }
    for sentence in &report.untold {
        tracing::warn!("{sentence}");
    }
    if !report.managed.is_empty() {
        tracing::info!("irqs: {}", kept_in_words(report.managed.iter()));
    }
    // How many workers there are changes all the time.
    let is_new = |(name, _): &(&String, &usize)| !lines.bound.contains(*name);
    if report.bound.iter().any(|one| is_new(&one)) {
        tracing::info!("kthreads: {}", kernel_threads::bound_in_words(report.bound.iter()));
        lines.bound.extend(report.bound.keys().cloned());
    }
    for ((_, what), (number, first)) in written {
        match number {
            1 => tracing::info!("{what}: {first}"),
            number => tracing::info!("{what}: {number} changed, such as {first}"),
        }
    }
    if put_back > 0 {
        tracing::info!("{put_back} settings of the host restored");
    }
}
