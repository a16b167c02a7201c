//! What an attached VM has. No I/O.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::policy::{Knob, VcpuPriority, VcpuSched, VcpuSet, VfioIrqs};
use crate::promises::Displaced;
use crate::threads::ProcessKey;

/// The schema of a lease.
pub const SCHEMA: &str = "qmpin.lease/1";

/// What an attached VM has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Lease {
    /// [`SCHEMA`].
    pub schema: String,
    /// Which VM.
    pub vm: VmName,
    /// The boot it is valid in.
    pub boot_id: String,
    /// The QEMU process.
    pub qemu: ProcessKey,
    /// Who follows it; none after `attach --once`.
    pub supervisor: Option<ProcessKey>,
    /// Since when, in seconds of the Unix epoch.
    pub since_unix_s: u64,
    /// The CPUs that are its alone.
    pub exclusive: CpuSet,
    /// Where its emulator threads may run.
    pub emulator: CpuSet,
    /// Where its iothreads may run.
    pub iothreads: CpuSet,
    /// Where each vCPU is.
    pub vcpus: Vec<(VcpuIndex, CpuId)>,
    /// The CPUs that its vCPUs share, where each may run on any of them.
    #[serde(skip_serializing_if = "CpuSet::is_empty")]
    pub floats: CpuSet,
    /// What else is to be done about its CPUs.
    pub knobs: BTreeSet<Knob>,
    /// The cgroup in which it has, or is about to have, an isolated partition.
    pub partition: Option<String>,
    /// The cgroup of its process, where there can be no partition and systemd is to keep the units beside
    /// it off its CPUs.
    pub slices: Option<String>,
    /// Where the interrupts of its own devices go, where `knobs` has interrupts.
    pub vfio_irqs: VfioIrqs,
    /// How its vCPU threads are to be scheduled.
    pub sched: VcpuSched,
    /// Which of them that is about; `None`: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sched_vcpus: Option<VcpuSet>,
    /// How many vCPUs it may have, where that is bounded. QEMU's other vCPUs are placed as helpers are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Who loses CPUs to it: threads that run elsewhere by now do not show it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub displaced: Vec<Displaced>,
    /// The version of the qmpin that wrote it; 0.1.0 does not say, and uses another lock over all
    /// (module [`locks`](crate::locks)).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer: Option<String>,
    /// What a newer qmpin wrote that this version does not know.
    #[serde(skip)]
    pub kept: Kept,
}

impl Lease {
    /// The priority of its vCPUs, and which of them.
    #[must_use]
    pub fn priority(&self) -> VcpuPriority {
        VcpuPriority { sched: self.sched, vcpus: self.sched_vcpus }
    }

    /// Where its vCPUs are.
    #[must_use]
    pub fn vcpu_cpus(&self) -> CpuSet {
        self.floats | self.vcpus.iter().map(|(_, cpu)| *cpu).collect()
    }

    /// A lease of this version with no CPUs and no knobs yet, and no supervisor.
    #[must_use]
    pub fn new(vm: VmName, boot_id: String, qemu: ProcessKey) -> Lease {
        Lease {
            schema: SCHEMA.to_owned(),
            vm,
            boot_id,
            qemu,
            supervisor: None,
            since_unix_s: 0,
            exclusive: CpuSet::EMPTY,
            emulator: CpuSet::EMPTY,
            iothreads: CpuSet::EMPTY,
            vcpus: Vec::new(),
            floats: CpuSet::EMPTY,
            knobs: BTreeSet::new(),
            partition: None,
            slices: None,
            vfio_irqs: VfioIrqs::default(),
            sched: VcpuSched::default(),
            sched_vcpus: None,
            max_vcpus: None,
            displaced: Vec::new(),
            writer: Some(env!("CARGO_PKG_VERSION").to_owned()),
            kept: Kept::default(),
        }
    }
}

/// What this version does not know of a lease.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// Knobs, by their names.
    pub knobs: BTreeSet<String>,
    /// Members.
    pub members: Map<String, Value>,
}
