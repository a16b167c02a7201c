//! The values a policy key can take. Enums, so that a call site reads as a sentence.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::VcpuSet;
use crate::ids::VcpuIndex;
use crate::scheduling::{Class, OnFork, Scheduling};

/// Whether a VM may have more vCPUs than CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// No: such a VM is refused.
    Refuse,
    /// Yes: the pins wrap around the set, and the report says degraded.
    Wrap,
}

/// When vCPUs take CPUs that other programs count on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Displace {
    /// Where the VM does not fit without them.
    WhereNeeded,
    /// As any others.
    Freely,
}

/// What becomes of a hot-added vCPU that no longer fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Overflow {
    /// It goes to the housekeeping CPUs; reported as degraded.
    Shared,
    /// It is left alone; reported.
    Refuse,
}

/// Which kind of cores its vCPUs are to have, on a machine that has more than one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreNeed {
    /// The fast ones first.
    #[default]
    Any,
    /// Fast ones alone.
    Performance,
    /// Slow ones alone: the fast are left to other VMs.
    Efficiency,
}

/// Which last-level cache its vCPUs are to be behind, on a machine whose caches differ much in size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheNeed {
    /// The large one first.
    #[default]
    Any,
    /// The large one alone.
    Large,
    /// The ordinary one alone: the large is left to other VMs.
    Ordinary,
}

/// How its vCPUs use the threads of a core.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Smt {
    /// A core for each guest core while there are any, then the second threads.
    #[default]
    Prefer,
    /// Cores are filled thread by thread: the fewest cores, and siblings of the same VM.
    Siblings,
    /// A core for each vCPU, of which the other threads are idle.
    Isolate,
}

/// As it is written in a policy file.
impl fmt::Display for Smt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// As it is written in a policy file.
impl fmt::Display for CoreNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// As it is written in a policy file.
impl fmt::Display for CacheNeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Where the interrupts of a VM's own passed-through devices go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Deserialize, Serialize)]
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

/// As it is written in a policy file.
impl fmt::Display for VfioIrqs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// How QEMU is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChannelChoice {
    /// The VM's own socket, else a runtime monitor, else leases.
    Auto,
    /// Short visits of the socket only.
    Lease,
    /// Hold the socket that `--qmp` names for good; no other program may need it.
    Persistent,
}

/// How the scheduler treats vCPU threads (`sched`): `other`, or `fifo:1` to `fifo:99`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum VcpuSched {
    /// As QEMU was started: nothing is changed.
    #[default]
    Other,
    /// `SCHED_FIFO` with this priority.
    Fifo(RtPriority),
}

/// The priority that vCPU threads are to have, and which of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VcpuPriority {
    /// Which priority.
    pub sched: VcpuSched,
    /// Which vCPUs; `None`: all of them.
    pub vcpus: Option<VcpuSet>,
}

impl VcpuPriority {
    /// Whether it is about this vCPU.
    #[must_use]
    pub fn is_about(&self, vcpu: VcpuIndex) -> bool {
        self.vcpus.is_none_or(|vcpus| vcpus.contains(vcpu))
    }
}

/// A real-time priority: 1 to 99 (`man 7 sched`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RtPriority(u8);

impl VcpuSched {
    /// What a vCPU's thread is to have; `None`: what it has.
    ///
    /// Threads that it makes are to have nothing of it. They are KVM's and QEMU's helpers, and run where
    /// the host's own work does.
    #[must_use]
    pub fn wanted(self) -> Option<Scheduling> {
        match self {
            VcpuSched::Other => None,
            VcpuSched::Fifo(RtPriority(priority)) => {
                Some(Scheduling { class: Class::Fifo, priority, on_fork: OnFork::Reset })
            }
        }
    }
}

impl TryFrom<String> for VcpuSched {
    type Error = String;

    fn try_from(text: String) -> Result<VcpuSched, String> {
        if text == "other" {
            return Ok(VcpuSched::Other);
        }
        match text.strip_prefix("fifo:").and_then(|priority| priority.parse().ok()) {
            Some(priority @ 1..=99) => Ok(VcpuSched::Fifo(RtPriority(priority))),
            _ => Err(format!("sched = \"{text}\": must be other, or fifo:1 to fifo:99")),
        }
    }
}

impl fmt::Display for VcpuSched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VcpuSched::Other => f.write_str("other"),
            VcpuSched::Fifo(RtPriority(priority)) => write!(f, "fifo:{priority}"),
        }
    }
}

impl From<VcpuSched> for String {
    fn from(sched: VcpuSched) -> String {
        sched.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_1_to_99_or_none() {
        let parse = |text: &str| VcpuSched::try_from(text.to_owned());
        for good in ["other", "fifo:1", "fifo:99"] {
            assert_eq!(parse(good).map(String::from), Ok(good.to_owned()));
        }
        for bad in
            ["", "fifo", "fifo:", "fifo:0", "fifo:100", "fifo:-1", "rr:1", "Other", "fifo: 1"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let fifo = parse("fifo:2").ok().and_then(VcpuSched::wanted);
        assert_eq!(fifo.map(|wanted| wanted.to_string()), Some("fifo:2".to_owned()));
        assert_eq!(VcpuSched::default().wanted(), None);
    }
}
