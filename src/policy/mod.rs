//! What the administrator wants. The later wins, key by key, and each value knows where it is from. A
//! word: no I/O here, `discover::policy` reads the files.
//!
//! ```text
//!   defaults                     ─┐
//!   /etc/qmpin/qmpin.toml        ─┤
//!   /etc/pve/qmpin/<vmid>.toml   ─┼─ laid one over the other ── Policy ── listing.rs: what it says, and where
//!   /etc/qmpin/<vmid>.toml       ─┤
//!   flags                        ─┘
//! ```

mod cpus;
mod file;
mod isolation;
mod listing;
mod mistakes;
mod single;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use cpus::{CpuChoice, CpuOrder, ParseCpuChoiceError};
pub use file::{FileKind, PolicyError};
pub use isolation::{Knob, Level};
pub use listing::{Entry, Table};
pub use single::{IothreadChoice, Spread, VcpuSet};
pub use values::{
    CacheNeed, ChannelChoice, CoreNeed, Displace, Overflow, RtPriority, Sharing, Smt, VcpuPriority,
    VcpuSched, VfioIrqs,
};

use crate::cpuset::CpuSet;
use crate::ids::{CpuId, IothreadId, VcpuIndex};

/// The slow timer's default: how long an external change can go unnoticed, in seconds.
pub const CHECK_INTERVAL_S_DEFAULT: u64 = 5;

/// Where a value is from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Built in.
    Default,
    /// A line of a policy file.
    File {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
    },
    /// A flag of this command.
    Flag {
        /// The flag as it is written, such as `--vcpus`.
        flag: &'static str,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Flag { flag } => f.write_str(flag),
        }
    }
}

/// A value and where it is from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// Where it is from.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// A built-in value.
    pub fn default(value: T) -> Sourced<T> {
        Sourced { value, origin: Origin::Default }
    }

    /// Takes the value of a stronger source, where that is not silent.
    pub fn lay(&mut self, stronger: Option<Sourced<T>>) {
        if let Some(stronger) = stronger {
            *self = stronger;
        }
    }

    /// The same in other terms.
    pub fn map<U>(self, terms: impl FnOnce(T) -> U) -> Sourced<U> {
        Sourced { value: terms(self.value), origin: self.origin }
    }
}

/// What holds for the host, whichever VM is attached (`[host]`, in `qmpin.toml` alone).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostPolicy {
    /// CPUs that never go to a VM's vCPUs. `auto` is the first core of the machine.
    pub reserved: Sourced<CpuChoice>,
    /// Where emulator threads and iothreads of all VMs may meet; never given to vCPUs.
    pub shared: Sourced<Option<CpuSet>>,
}

/// What one VM asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmPolicy {
    /// The CPUs for vCPUs; where they are in an order, vCPU by vCPU.
    pub vcpus: Sourced<CpuChoice>,
    /// The CPUs of single vCPUs, which stand beside what `vcpus` says.
    pub vcpu_cpus: BTreeMap<VcpuIndex, Sourced<CpuId>>,
    /// The CPUs for iothreads.
    pub iothreads: Sourced<IothreadChoice>,
    /// The CPUs of single iothreads.
    pub iothread_cpus: BTreeMap<IothreadId, Sourced<CpuSet>>,
    /// The CPUs for emulator threads: the main loop and all that is neither vCPU nor iothread.
    pub emulator: Sourced<CpuChoice>,
    /// Which kind of cores its vCPUs are to have.
    pub cores: Sourced<CoreNeed>,
    /// Which cache its vCPUs are to be behind.
    pub cache: Sourced<CacheNeed>,
    /// How its vCPUs use the threads of a core.
    pub smt: Sourced<Smt>,
    /// Whether more vCPUs than CPUs are taken.
    pub share: Sourced<Sharing>,
    /// When its vCPUs take CPUs that other programs count on.
    pub displace: Sourced<Displace>,
    /// What becomes of a hot-added vCPU that no longer fits.
    pub overflow: Sourced<Overflow>,
    /// How many vCPUs get CPUs of their own at most; `None`: as many as QEMU reports.
    pub max_vcpus: Sourced<Option<u32>>,
    /// How QEMU is asked.
    pub channel: Sourced<ChannelChoice>,
    /// How often the masks are compared with the plan when nothing else gives cause.
    pub check_interval: Sourced<Duration>,
    /// How alone it is to be on its CPUs.
    pub isolation: Sourced<Level>,
    /// How the scheduler treats its vCPU threads.
    pub sched: Sourced<VcpuSched>,
    /// Which of them that is about; `None`: all.
    pub sched_vcpus: Sourced<Option<VcpuSet>>,
    /// Knobs that are set on their own, whatever the level says.
    pub knobs: BTreeMap<Knob, Sourced<bool>>,
    /// Where the interrupts of its own devices go, where interrupts are moved at all.
    pub vfio_irqs: Sourced<VfioIrqs>,
}

impl VmPolicy {
    /// The priority that vCPUs are to have, and which of them.
    #[must_use]
    pub fn priority(&self) -> VcpuPriority {
        VcpuPriority { sched: self.sched.value, vcpus: self.sched_vcpus.value }
    }

    /// The knobs that are wanted: the level's, but for those that are set on their own.
    #[must_use]
    pub fn wanted_knobs(&self) -> BTreeSet<Knob> {
        let of_level = self.isolation.value.knobs();
        let is_wanted = |knob: &Knob| {
            self.knobs.get(knob).map_or_else(|| of_level.contains(knob), |own| own.value)
        };
        Knob::ALL.into_iter().filter(is_wanted).collect()
    }
}

/// The merged policy for one VM on this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// What holds for the host.
    pub host: HostPolicy,
    /// What this VM asks for.
    pub vm: VmPolicy,
    /// Why it is an earlier one, where the files of now cannot be used.
    pub instead_of: Option<String>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            instead_of: None,
            host: HostPolicy {
                reserved: Sourced::default(CpuChoice::Auto),
                shared: Sourced::default(None),
            },
            vm: VmPolicy {
                vcpus: Sourced::default(CpuChoice::Auto),
                vcpu_cpus: BTreeMap::new(),
                iothreads: Sourced::default(IothreadChoice::AUTO),
                iothread_cpus: BTreeMap::new(),
                emulator: Sourced::default(CpuChoice::Auto),
                cores: Sourced::default(CoreNeed::Any),
                cache: Sourced::default(CacheNeed::Any),
                smt: Sourced::default(Smt::Prefer),
                share: Sourced::default(Sharing::Refuse),
                displace: Sourced::default(Displace::WhereNeeded),
                overflow: Sourced::default(Overflow::Shared),
                max_vcpus: Sourced::default(None),
                channel: Sourced::default(ChannelChoice::Auto),
                isolation: Sourced::default(Level::Exclusive),
                sched: Sourced::default(VcpuSched::Other),
                sched_vcpus: Sourced::default(None),
                knobs: BTreeMap::new(),
                vfio_irqs: Sourced::default(VfioIrqs::default()),
                check_interval: Sourced::default(Duration::from_secs(CHECK_INTERVAL_S_DEFAULT)),
            },
        }
    }
}
