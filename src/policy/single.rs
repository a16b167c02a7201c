//! CPUs by hand for one thread: the tables `[vcpu.0]` and `[iothread.io0]`, how iothreads use their CPUs, and the vCPUs
//! that a key is about.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{CpuChoice, ParseCpuChoiceError};
use crate::cpuset::{CpuSet, ParseCpuListError};
use crate::ids::{CpuId, VcpuIndex};

/// How iothreads use the CPUs that they have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Spread {
    /// Each may run on any of them.
    #[default]
    Pool,
    /// Each has one of them.
    Each,
}

/// The CPUs for iothreads, and how they use them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IothreadChoice {
    /// Which CPUs.
    pub cpus: CpuChoice,
    /// How they are used.
    pub spread: Spread,
}

const POOL: &str = "pool";
const EACH: &str = "each";

impl IothreadChoice {
    /// The planner's CPUs, for all of them together.
    pub const AUTO: IothreadChoice = IothreadChoice { cpus: CpuChoice::Auto, spread: Spread::Pool };

    /// Reads `auto` or `pool`, `each`, a cpulist, or `each:` and a cpulist.
    ///
    /// # Errors
    /// As [`CpuChoice::parse_set`].
    pub fn parse(text: &str) -> Result<IothreadChoice, ParseCpuChoiceError> {
        let text = text.trim();
        let of = |cpus, spread| Ok(IothreadChoice { cpus, spread });
        match text.strip_prefix(EACH) {
            Some("") => of(CpuChoice::Auto, Spread::Each),
            Some(set) if set.starts_with(':') => of(CpuChoice::parse_set(&set[1..])?, Spread::Each),
            _ if text == POOL => of(CpuChoice::Auto, Spread::Pool),
            _ => of(CpuChoice::parse_set(text)?, Spread::Pool),
        }
    }
}

impl fmt::Display for IothreadChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.spread, &self.cpus) {
            (Spread::Pool, cpus) => cpus.fmt(f),
            (Spread::Each, CpuChoice::Auto) => f.write_str(EACH),
            (Spread::Each, cpus) => write!(f, "{EACH}:{cpus}"),
        }
    }
}

impl Serialize for IothreadChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Reads the one CPU of a vCPU.
///
/// # Errors
/// Why it is none, in words.
pub(super) fn one_cpu(text: &str) -> Result<CpuId, String> {
    let cpus = CpuSet::parse_cpulist(text).map_err(|error| error.to_string())?;
    match (cpus.first(), cpus.len()) {
        (Some(cpu), 1) => Ok(cpu),
        (None, _) => Err("it names no CPU".to_owned()),
        _ => {
            Err("a vCPU has one CPU; to have all float over a set, say vcpus = \"float:…\""
                .to_owned())
        }
    }
}

/// Some of a VM's vCPUs, by their indices, written as a cpulist is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuSet(CpuSet);

impl VcpuSet {
    /// Whether it is one of them.
    #[must_use]
    pub fn contains(&self, vcpu: VcpuIndex) -> bool {
        CpuId::from_index(vcpu.0 as usize).is_some_and(|index| self.0.contains(index))
    }
}

impl fmt::Display for VcpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VcpuSet {
    type Err = ParseCpuListError;

    fn from_str(text: &str) -> Result<VcpuSet, ParseCpuListError> {
        CpuSet::parse_cpulist(text).map(VcpuSet)
    }
}

impl Serialize for VcpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for VcpuSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<VcpuSet, D::Error> {
        CpuSet::deserialize(deserializer).map(VcpuSet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_iothreads_are_given_reads_as_it_is_shown() {
        let shown = |text: &str| IothreadChoice::parse(text).map(|choice| choice.to_string());
        for text in ["auto", "each", "2-3", "each:2-3"] {
            assert_eq!(shown(text).as_deref(), Ok(text));
        }
        assert_eq!(shown("pool").as_deref(), Ok("auto"));
        for bad in ["", "each:", "each:x", "eachother", "Each", "pool:1", "3-1"] {
            assert!(shown(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_vcpu_has_one_cpu() {
        assert_eq!(one_cpu("6").ok(), CpuId::from_index(6));
        for (bad, why) in [("", "no CPU"), ("6,18", "one CPU"), ("0-1", "float:"), ("x", "`x`")] {
            let error = one_cpu(bad).expect_err(bad);
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
