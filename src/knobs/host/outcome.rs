//! What became of a step about a place of the host.

use crate::cpuset::CpuSet;
use crate::knobs::host::places::{Place, Value};
use crate::knobs::host::step::HostStep;
use crate::knobs::outcome::Outcome;
use crate::policy::Knob;

/// What became of a step.
pub type HostOutcome = Outcome<Value>;

/// A step and what became of it.
#[derive(Debug)]
pub struct HostApplied {
    /// The step.
    pub step: HostStep,
    /// What became of it.
    pub outcome: HostOutcome,
    /// The thread's name where it is a thread's and there is something to say, for display only; else empty.
    pub comm: String,
    /// Whether it is a file without a write permission for anybody, where the step fell short: what the kernel answered
    /// is then no matter of this process's rights.
    pub is_fixed: bool,
}

impl HostApplied {
    /// A step that went as usual.
    pub(crate) fn usual(step: HostStep, outcome: HostOutcome) -> HostApplied {
        HostApplied { step, outcome, comm: String::new(), is_fixed: false }
    }

    /// The number of the interrupt whose CPUs the kernel manages: it answers a write with `EIO`, since Linux 6.10 with
    /// `EPERM` (`kernel/irq/proc.c: write_irq_affinity`); with `EACCES` a process that may not write files that cannot
    /// be written (`register_irq_proc`, since Linux 6.12), as a unit without `CAP_DAC_OVERRIDE`. Before that nothing
    /// but the answer distinguishes them.
    pub(crate) fn kept_irq(&self) -> Option<u32> {
        use nix::libc::{EACCES, EIO, EPERM};
        match &self.outcome {
            HostOutcome::Refused { error }
                if matches!(error.raw_os_error(), Some(EIO | EPERM | EACCES)) =>
            {
                self.step.place().irq()
            }
            _ => None,
        }
    }

    /// The number of the interrupt that the kernel would not move, as was to be expected.
    pub(crate) fn managed_irq(&self) -> Option<u32> {
        match &self.step {
            HostStep::Write { knob: Knob::Irqs, .. } => self.kept_irq(),
            _ => None,
        }
    }

    /// The place that was to be written and holds something else, and what it was to hold.
    pub(crate) fn unwritten(&self) -> Option<(&Place, &Value)> {
        match &self.step {
            HostStep::Write { place, to, .. } if self.outcome.fell_short() => Some((place, to)),
            _ => None,
        }
    }

    /// Whether it was to be restored and was not.
    #[must_use]
    pub fn is_left_changed(&self) -> bool {
        match self.step {
            HostStep::PutBack { .. } => {
                !matches!(self.outcome, HostOutcome::Done | HostOutcome::Gone)
            }
            HostStep::Later { .. } => true,
            HostStep::Settle { .. } => matches!(self.outcome, HostOutcome::Refused { .. }),
            HostStep::Write { .. } | HostStep::LeaveAlone { .. } => false,
        }
    }

    /// Whether it is a thread whose mask was restored but for some of these CPUs.
    #[must_use]
    pub fn lacks_only(&self, cpus: &CpuSet) -> bool {
        match (&self.step, &self.outcome) {
            (
                HostStep::PutBack { place: Place::Thread(_), to: Value::Cpus(to), .. },
                HostOutcome::Narrowed { to: Value::Cpus(now) },
            ) => (*to - *now).is_subset(cpus),
            _ => false,
        }
    }

    /// Whether what systemd limits a unit to was changed: before Linux 6.2 all threads that are in it, and
    /// all where it is the first one, lose their masks.
    #[must_use]
    pub fn has_limited_unit(&self) -> bool {
        let is_write = matches!(self.step, HostStep::Write { .. } | HostStep::PutBack { .. });
        is_write
            && self.step.place().limited_cgroup().is_some()
            && matches!(self.outcome, HostOutcome::Done | HostOutcome::Narrowed { .. })
    }
}
