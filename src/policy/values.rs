//! The values a policy key can take. Enums, so that a call site reads as a sentence.

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;

/// CPUs by hand, or the planner's choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuChoice {
    /// The planner chooses.
    Auto,
    /// These CPUs, by hand.
    Cpus(CpuSet),
}

/// Whether a VM may have more vCPUs than CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// No: such a VM is refused.
    Refuse,
    /// Yes: the pins wrap around the set, and the report says degraded.
    Wrap,
}

/// What becomes of a hot-added vCPU that no longer fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Overflow {
    /// It goes to the housekeeping CPUs; reported as degraded.
    Shared,
    /// It is left alone; reported.
    Refuse,
}

/// Where the interrupts of a VM's own passed-through devices go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VfioIrqs {
    /// With the iothreads, on the device's NUMA node where they have CPUs there.
    #[default]
    Iothreads,
    /// With the vCPUs.
    Vcpus,
    /// Where they are, but for the CPUs of other VMs.
    Leave,
}

impl VfioIrqs {
    /// As it is written in a policy file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            VfioIrqs::Iothreads => "iothreads",
            VfioIrqs::Vcpus => "vcpus",
            VfioIrqs::Leave => "leave",
        }
    }
}

/// How QEMU is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ChannelChoice {
    /// The VM's own socket, else a runtime monitor, else leases.
    Auto,
    /// Short visits of the socket only.
    Lease,
    /// Hold the socket that `--qmp` names for good; it must be nobody else's.
    Persistent,
}
