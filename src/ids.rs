//! Newtypes for the numbers and names that must not be mixed up. No I/O.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many CPUs a set can name: glibc's `CPU_SETSIZE`, which is what `sched_setaffinity(2)` takes.
pub const CPUS_MAX: usize = 1024;

/// A host CPU (a hardware thread), as the kernel numbers it. Always below [`CPUS_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct CpuId(u16);

impl CpuId {
    /// The CPU of that number, or `None` where it is beyond [`CPUS_MAX`].
    #[must_use]
    pub fn from_index(index: usize) -> Option<CpuId> {
        if index < CPUS_MAX { u16::try_from(index).ok().map(CpuId) } else { None }
    }

    /// The number, for indexing.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl<'de> Deserialize<'de> for CpuId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<CpuId, D::Error> {
        let index = usize::deserialize(deserializer)?;
        CpuId::from_index(index)
            .ok_or_else(|| serde::de::Error::custom(format!("CPU {index} is out of range")))
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! number_newtype {
    ($(#[$doc:meta])* $name:ident($number:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $number);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_newtype!(
    /// A core of the host, dense, in the order of the cores' first CPUs.
    CoreId(u32)
);
number_newtype!(
    /// A last-level-cache group of the host, dense, in the order of the groups' first CPUs.
    LlcId(u32)
);
number_newtype!(
    /// A NUMA node of the host, as the kernel numbers it.
    NodeId(u32)
);
number_newtype!(
    /// A vCPU, by QEMU's `cpu-index`.
    VcpuIndex(u32)
);

number_newtype!(
    /// A process (thread group) of the host.
    Pid(i32)
);
number_newtype!(
    /// A thread of the host. A process's main thread has the process's number.
    Tid(i32)
);

/// The parent of all kernel threads (`kernel/kthread.c`). New ones have its mask.
pub const KTHREADD: Tid = Tid(2);

impl Pid {
    /// The process's main thread.
    #[must_use]
    pub fn main_thread(self) -> Tid {
        Tid(self.0)
    }
}

/// When a thread or process started, in clock ticks since boot (`/proc/PID/stat`, field 22).
/// Together with its number it names one thread for good: numbers are used again, this pair is not.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct StartTicks(pub u64);

/// An iothread, by the id of its QEMU object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IothreadId(pub String);

impl fmt::Display for IothreadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name of a VM: a Proxmox vmid, or any short name with `--qmp`. It becomes part of file names,
/// so it holds only letters, digits, `.`, `_` and `-`, and begins with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct VmName(String);

/// The longest VM name taken, in bytes. A file name has room for it and its suffix.
pub const VM_NAME_BYTES_MAX: usize = 64;

/// Why a text is not a VM name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a VM name: 1 to {VM_NAME_BYTES_MAX} letters, digits, `.`, `_` or `-`, the first a letter or digit"
)]
pub struct ParseVmNameError {
    text: String,
}

impl VmName {
    /// The name as a text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the name is a Proxmox vmid: digits alone, with no leading zero.
    #[must_use]
    pub fn is_vmid(&self) -> bool {
        self.0.bytes().all(|byte| byte.is_ascii_digit()) && !self.0.starts_with('0')
    }
}

impl std::str::FromStr for VmName {
    type Err = ParseVmNameError;

    fn from_str(text: &str) -> Result<VmName, ParseVmNameError> {
        let good = text.len() <= VM_NAME_BYTES_MAX
            && text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if good {
            Ok(VmName(text.to_owned()))
        } else {
            let shown = text.chars().take(VM_NAME_BYTES_MAX).collect();
            Err(ParseVmNameError { text: shown })
        }
    }
}

impl<'de> Deserialize<'de> for VmName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<VmName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_name_cannot_leave_its_folder() {
        for bad in ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
        for good in ["100", "win11", "a.b_c-d", &"x".repeat(64)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
    }

    #[test]
    fn only_digits_are_a_vmid() {
        assert!("100".parse::<VmName>().is_ok_and(|name| name.is_vmid()));
        assert!("0100".parse::<VmName>().is_ok_and(|name| !name.is_vmid()));
        assert!("win".parse::<VmName>().is_ok_and(|name| !name.is_vmid()));
    }
}
