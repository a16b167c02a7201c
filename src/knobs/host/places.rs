//! Places of the host that hold a value qmpin may change: files of the kernel, and masks of its
//! threads. A word: no I/O.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::knobs::partition::drop_ins;
use crate::policy::Knob;
use crate::threads::{ProcessKey, ThreadKey};

/// Where a value is. Paths are relative to the root of the file system.
///
/// Only places that qmpin writes can be read from a journal: a line with another is not acted on.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A file that holds a cpulist, such as `proc/irq/24/smp_affinity_list`.
    CpuList(#[serde(deserialize_with = "kernel_file")] String),
    /// A file that holds a cpumask, such as `proc/irq/default_smp_affinity`.
    CpuMask(#[serde(deserialize_with = "kernel_file")] String),
    /// A file that holds a word or number.
    Word(#[serde(deserialize_with = "kernel_file")] String),
    /// What systemd limits a unit to (`AllowedCPUs=`); no CPU at all means that it does not. Before the
    /// threads, whose masks some kernels change with it.
    AllowedCpus {
        /// The unit, as `system.slice`.
        #[serde(deserialize_with = "name")]
        unit: String,
        /// Its cgroup below the root.
        #[serde(deserialize_with = "below")]
        cgroup: String,
    },
    /// `cpuset.cpus` of a cgroup that is no unit of systemd's, such as `lxc` of Proxmox's containers; no CPU at all
    /// means that it does not limit. Before the threads, like the units.
    Cpuset(#[serde(deserialize_with = "below")] String),
    /// The drop-in of a VM that qmpin looks after and that is not attached: a word that says whether it is there.
    /// It goes with the last VM.
    DropIn(#[serde(deserialize_with = "drop_in")] String),
    /// The affinity of a thread: one of the kernel's, or one outside all VMs that has a mask of its own.
    Thread(ThreadKey),
    /// The CPUs from which an irqbalance excludes interrupts. It applies a setting later, so what it says at
    /// the moment may be about to change.
    Irqbalance(ProcessKey),
}

/// The files of the kernel's that qmpin writes; `#` is a number.
const KERNEL_FILES: [&str; 13] = [
    "proc/irq/#/smp_affinity_list",
    "proc/irq/default_smp_affinity",
    "proc/sys/kernel/numa_balancing",
    "proc/sys/kernel/watchdog_cpumask",
    "proc/sys/vm/stat_interval",
    "sys/devices/system/cpu/cpu#/cpufreq/energy_performance_preference",
    "sys/devices/system/cpu/cpu#/cpufreq/scaling_governor",
    "sys/devices/system/cpu/cpu#/cpufreq/scaling_max_freq",
    "sys/devices/system/cpu/cpu#/cpufreq/scaling_min_freq",
    "sys/devices/system/cpu/cpu#/cpuidle/state#/disable",
    "sys/devices/system/cpu/cpu#/online",
    "sys/devices/system/cpu/cpu#/power/pm_qos_resume_latency_us",
    "sys/devices/virtual/workqueue/cpumask",
];

/// Whether the path is of this pattern.
fn is_like(path: &str, pattern: &str) -> bool {
    let Some((before, after)) = pattern.split_once('#') else { return path == pattern };
    let Some(rest) = path.strip_prefix(before) else { return false };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    digits > 0 && rest.get(digits..).is_some_and(|rest| is_like(rest, after))
}

fn checked<'de, D: Deserializer<'de>>(
    from: D,
    is: impl Fn(&str) -> bool,
) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if is(&text) { Ok(text) } else { Err(D::Error::custom(format!("qmpin does not write {text}"))) }
}

fn kernel_file<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    checked(from, |path| KERNEL_FILES.iter().any(|pattern| is_like(path, pattern)))
}

fn drop_in<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    checked(from, |path| drop_ins::unit_of(path).is_some_and(is_name))
}

fn name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    checked(from, is_name)
}

/// A path below the root of the cgroup tree.
fn below<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    checked(from, |path| path.split('/').all(is_name))
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains('/')
}

impl Place {
    /// The CPUs of an interrupt (`Documentation/core-api/irq/irq-affinity.rst`).
    #[must_use]
    pub fn of_irq(number: i32) -> Place {
        Place::CpuList(format!("proc/irq/{number}/smp_affinity_list"))
    }

    /// The CPUs of interrupts that are yet to come.
    #[must_use]
    pub fn of_new_irqs() -> Place {
        Place::CpuMask("proc/irq/default_smp_affinity".to_owned())
    }

    /// The number of the interrupt whose CPUs these are.
    #[must_use]
    pub fn irq(&self) -> Option<u32> {
        match self {
            Place::CpuList(path) => {
                path.strip_prefix("proc/irq/")?.strip_suffix("/smp_affinity_list")?.parse().ok()
            }
            _ => None,
        }
    }

    /// The cgroup that the place limits; `None`: it is no limit of a cgroup.
    #[must_use]
    pub fn limited_cgroup(&self) -> Option<&str> {
        match self {
            Place::AllowedCpus { cgroup, .. } | Place::Cpuset(cgroup) => Some(cgroup),
            _ => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::CpuList(path)
            | Place::CpuMask(path)
            | Place::Word(path)
            | Place::DropIn(path) => {
                write!(f, "/{path}")
            }
            Place::AllowedCpus { unit, .. } => write!(f, "AllowedCPUs of {unit}"),
            Place::Cpuset(cgroup) => write!(f, "/sys/fs/cgroup/{cgroup}/cpuset.cpus"),
            Place::Thread(key) => write!(f, "thread {}", key.tid),
            Place::Irqbalance(process) => {
                write!(f, "irqbalance's ban list (process {})", process.pid)
            }
        }
    }
}

/// The word of a drop-in that is there.
pub const DROP_IN_THERE: &str = "Delegate=cpuset";

/// What a place holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// CPUs, however they are written there.
    Cpus(CpuSet),
    /// A word or number, without white space around it.
    Word(String),
}

impl Value {
    /// Whether both mean the same while these CPUs are online: the kernel leaves offline ones out of
    /// some masks and not of others.
    #[must_use]
    pub fn same(&self, other: &Value, online: &CpuSet) -> bool {
        match (self, other) {
            (Value::Cpus(a), Value::Cpus(b)) => *a & *online == *b & *online,
            (a, b) => a == b,
        }
    }

    /// As it is written into a file of the kernel's that holds a cpulist, a word or a number.
    #[must_use]
    pub fn as_written(&self) -> String {
        match self {
            Value::Cpus(cpus) => cpus.to_string(),
            Value::Word(word) => word.clone(),
        }
    }

    /// The CPUs, where it is CPUs.
    #[must_use]
    pub fn cpus(&self) -> Option<CpuSet> {
        match self {
            Value::Cpus(cpus) => Some(*cpus),
            Value::Word(_) => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Cpus(cpus) if cpus.is_empty() => f.write_str("none"),
            Value::Cpus(cpus) => cpus.fmt(f),
            Value::Word(word) => f.write_str(word),
        }
    }
}

/// What of a CPU's power management there is to set.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuPower {
    /// `scaling_governor`, where `performance` is among the governors to be had.
    pub governor: Option<Place>,
    /// `energy_performance_preference`, which the kernel changes with the governor.
    pub preference: Option<Place>,
    /// `pm_qos_resume_latency_us`, where the CPU has idle states.
    pub resume_latency: Option<Place>,
    /// How it can idle.
    pub idle_states: Vec<IdleState>,
}

/// An idle state of a CPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IdleState {
    /// As its driver names it: `POLL`, `C1`, `WFI`.
    pub name: String,
    /// How long it takes to leave it, in µs.
    pub latency_us: u32,
    /// Whether the administrator has forbidden it.
    pub is_disabled: bool,
}

/// An interrupt of a device that is passed through to a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VfioIrq {
    /// The QEMU process that has the device.
    pub vm: ProcessKey,
    /// The device's PCI address, such as `0000:0a:00.0`.
    pub device: String,
    /// The CPUs of the device's NUMA node; all where it has none.
    pub local: CpuSet,
}

/// An irqbalance that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Irqbalance {
    /// Its process.
    pub process: ProcessKey,
    /// The CPUs from which it excludes interrupts, or why that is not to be learnt; then it cannot be set, either.
    pub banned: Result<CpuSet, String>,
}

/// The places of a host, and what they hold now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostView {
    /// The CPUs that are online.
    pub online: CpuSet,
    /// All that could be read.
    pub values: BTreeMap<Place, Value>,
    /// What is there and could not be read, with what the kernel said.
    pub unreadable: BTreeMap<Place, String>,
    /// Where interrupts that are yet to come will go; then those that there are.
    pub irqs: Vec<Place>,
    /// The CPUs of their devices' NUMA nodes, where that is not all.
    pub irq_nodes: BTreeMap<Place, CpuSet>,
    /// Those among them that are of a VM's own devices.
    pub vfio: BTreeMap<Place, VfioIrq>,
    /// Every irqbalance that runs.
    pub irqbalances: Vec<Irqbalance>,
    /// Kernel threads that can be moved.
    pub kthreads: Vec<Place>,
    /// Kernel threads that cannot (`PF_NO_SETAFFINITY`): name and CPUs.
    pub bound: Vec<(String, CpuSet)>,
    /// Units of systemd's, and other cgroups, beside a VM that has no partition.
    pub units: Vec<Place>,
    /// Threads of processes outside all VMs that had a mask of their own.
    pub users: Vec<Place>,
    /// The CPUs of unbound workqueues.
    pub workqueues: Option<Place>,
    /// Power management by CPU.
    pub power: BTreeMap<CpuId, CpuPower>,
    /// Settings of the kernel's, in `/proc/sys`.
    pub sysctls: Vec<Place>,
}

impl HostView {
    /// With every irqbalance that runs, and the places of those that can be set.
    #[must_use]
    pub fn with_irqbalances(mut self, irqbalances: Vec<Irqbalance>) -> HostView {
        let place = |one: &Irqbalance| {
            let banned = one.banned.as_ref().ok()?;
            Some((Place::Irqbalance(one.process), Value::Cpus(*banned)))
        };
        self.values.extend(irqbalances.iter().filter_map(place));
        self.irqbalances = irqbalances;
        self
    }
}

/// `irqs`, and `irqs of 0000:0a:00.0` where it is of a VM's own device: they go elsewhere than all others.
#[must_use]
pub fn knob_in_words(knob: Knob, place: &Place, vfio: &BTreeMap<Place, VfioIrq>) -> String {
    match vfio.get(place) {
        Some(irq) => format!("{knob} of {}", irq.device),
        None => knob.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_qmpin_does_not_write_is_not_read() {
        let read = |text: &str| serde_json::from_str::<Place>(text).is_ok();
        for ours in [
            r#"{"cpu_list": "proc/irq/24/smp_affinity_list"}"#,
            r#"{"cpu_mask": "proc/irq/default_smp_affinity"}"#,
            r#"{"word": "sys/devices/system/cpu/cpu11/cpuidle/state2/disable"}"#,
            r#"{"word": "sys/devices/system/cpu/cpu0/online"}"#,
            r#"{"allowed_cpus": {"unit": "system.slice", "cgroup": "system.slice"}}"#,
            r#"{"allowed_cpus": {"unit": "a.service", "cgroup": "system.slice/a.service"}}"#,
            r#"{"cpuset": "lxc/101"}"#,
            r#"{"drop_in": "run/systemd/system/105.scope.d/50-qmpin.conf"}"#,
        ] {
            assert!(read(ours), "{ours}");
        }
        for foreign in [
            r#"{"word": "etc/shadow"}"#,
            r#"{"word": "proc/sys/kernel/core_pattern"}"#,
            r#"{"word": "proc/sysrq-trigger"}"#,
            r#"{"word": "sys/devices/system/cpu/cpu/online"}"#,
            r#"{"word": "sys/devices/system/cpu/cpu1/../../../../../etc/shadow/online"}"#,
            r#"{"word": "sys/devices/system/cpu/cpu1/online/"}"#,
            r#"{"cpu_list": "/proc/irq/24/smp_affinity_list"}"#,
            r#"{"cpu_list": "proc/irq/x/smp_affinity_list"}"#,
            r#"{"allowed_cpus": {"unit": "system.slice", "cgroup": "../system.slice"}}"#,
            r#"{"allowed_cpus": {"unit": "a/b", "cgroup": "a"}}"#,
            r#"{"cpuset": "/lxc"}"#,
            r#"{"cpuset": ""}"#,
            r#"{"drop_in": "etc/systemd/system/105.scope.d/50-qmpin.conf"}"#,
            r#"{"drop_in": "run/systemd/system/../x.d/50-qmpin.conf"}"#,
        ] {
            assert!(!read(foreign), "{foreign}");
        }
    }
}
