//! CPUs in a policy: chosen by the planner, a set, or a list whose order counts.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::cpuset::{CpuSet, ParseCpuListError};
use crate::ids::CpuId;
use crate::wording::cpus_in_words;

/// CPUs by hand, or the planner's choice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CpuChoice {
    /// The planner chooses.
    Auto,
    /// These CPUs, by hand.
    Cpus(CpuSet),
    /// These CPUs by hand, each for the vCPU of its place in the list.
    InOrder(CpuOrder),
    /// Any of these CPUs, by hand: the scheduler chooses.
    Float(CpuSet),
}

/// What a set begins with over which vCPUs float.
const FLOAT: &str = "float:";

/// CPUs in an order of the administrator's, each once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuOrder(Vec<CpuId>);

/// Why a value is no choice of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseCpuChoiceError {
    /// Not a cpulist.
    #[error(transparent)]
    List(#[from] ParseCpuListError),
    /// `auto` in other letters.
    #[error("did you mean auto? It is written in small letters")]
    Auto,
    /// Nothing at all.
    #[error("it names no CPU; write a list such as 6-11,18-23, or auto")]
    Empty,
    /// A CPU that is named again.
    #[error("it names {again} more than once; name each CPU once")]
    Twice {
        /// Which: `CPU 3`, `CPUs 3,5`.
        again: String,
    },
}

impl CpuChoice {
    /// Reads `auto` or a cpulist of which only the set counts.
    ///
    /// # Errors
    /// [`ParseCpuChoiceError`] names the part that is wrong.
    pub fn parse_set(text: &str) -> Result<CpuChoice, ParseCpuChoiceError> {
        if text.trim() == "auto" {
            return Ok(CpuChoice::Auto);
        }
        if text.trim().eq_ignore_ascii_case("auto") {
            return Err(ParseCpuChoiceError::Auto);
        }
        let cpus = CpuSet::parse_cpulist(text)?;
        if cpus.is_empty() { Err(ParseCpuChoiceError::Empty) } else { Ok(CpuChoice::Cpus(cpus)) }
    }

    /// Reads `auto`, a cpulist for vCPUs, or `float:` and a set. A list that ascends is a set, as everywhere else; any
    /// other is kept in its order.
    ///
    /// # Errors
    /// As [`parse_set`](CpuChoice::parse_set), and for a CPU that is named twice.
    pub fn parse_vcpus(text: &str) -> Result<CpuChoice, ParseCpuChoiceError> {
        if text.trim() == "auto" {
            return Ok(CpuChoice::Auto);
        }
        if text.trim().eq_ignore_ascii_case("auto") {
            return Err(ParseCpuChoiceError::Auto);
        }
        if let Some(set) = text.trim().strip_prefix(FLOAT) {
            let cpus = CpuSet::parse_cpulist(set)?;
            let is_empty = cpus.is_empty();
            return if is_empty {
                Err(ParseCpuChoiceError::Empty)
            } else {
                Ok(CpuChoice::Float(cpus))
            };
        }
        let order = CpuSet::parse_in_order(text)?;
        let (mut set, mut again) = (CpuSet::EMPTY, CpuSet::EMPTY);
        for cpu in &order {
            if set.contains(*cpu) {
                again.insert(*cpu);
            }
            set.insert(*cpu);
        }
        match order {
            order if order.is_empty() => Err(ParseCpuChoiceError::Empty),
            _ if !again.is_empty() => {
                Err(ParseCpuChoiceError::Twice { again: cpus_in_words(&again) })
            }
            order if order.is_sorted() => Ok(CpuChoice::Cpus(set)),
            order => Ok(CpuChoice::InOrder(CpuOrder(order))),
        }
    }

    /// Returns the CPUs that are named; `None`: the planner chooses.
    #[must_use]
    pub fn cpus(&self) -> Option<CpuSet> {
        match self {
            CpuChoice::Auto => None,
            CpuChoice::Cpus(cpus) | CpuChoice::Float(cpus) => Some(*cpus),
            CpuChoice::InOrder(order) => Some(order.0.iter().copied().collect()),
        }
    }
}

impl CpuOrder {
    /// Returns the CPUs as they were written.
    #[must_use]
    pub fn as_slice(&self) -> &[CpuId] {
        &self.0
    }
}

impl Serialize for CpuChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for CpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuChoice::Auto => f.write_str("auto"),
            CpuChoice::Cpus(cpus) => cpus.fmt(f),
            CpuChoice::InOrder(order) => order.fmt(f),
            CpuChoice::Float(cpus) => write!(f, "{FLOAT}{cpus}"),
        }
    }
}

/// A cpulist with the same order: ascending runs as `A-B`.
impl fmt::Display for CpuOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|a, b| a.index() + 1 == b.index());
        for (at, run) in runs.enumerate() {
            let comma = if at == 0 { "" } else { "," };
            match run {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [one] => write!(f, "{comma}{one}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vcpus(text: &str) -> Result<CpuChoice, String> {
        CpuChoice::parse_vcpus(text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_ascending_list_is_a_set_and_any_other_keeps_its_order() {
        for text in ["1", "1-3", "1,3,5", "6-11,18-23", " 2 ", "auto"] {
            assert_eq!(vcpus(text).ok(), CpuChoice::parse_set(text).ok(), "{text}");
        }
        for (text, order) in [
            ("5,3,1", vec![5, 3, 1]),
            ("6,18,7,19", vec![6, 18, 7, 19]),
            ("18-20,6-8", vec![18, 19, 20, 6, 7, 8]),
            ("9, 2-6:2/3", vec![9, 2, 3, 5, 6]),
        ] {
            let Ok(CpuChoice::InOrder(found)) = vcpus(text) else { panic!("{text}") };
            let indices: Vec<usize> = found.as_slice().iter().map(|cpu| cpu.index()).collect();
            assert_eq!(indices, order, "{text}");
        }
        let shown = vcpus("18-20,6,7,8,2").map(|choice| choice.to_string());
        assert_eq!(shown.as_deref(), Ok("18-20,6-8,2"));
    }

    #[test]
    fn a_set_to_float_over_is_kept_apart_from_one_for_pins() {
        let floats = vcpus("float:6-11,18-23").expect("good");
        assert_eq!(floats, CpuChoice::Float("6-11,18-23".parse().expect("a cpulist")));
        assert_eq!(floats.to_string(), "float:6-11,18-23");
        for bad in ["float:", "float: ", "float:x", "float:auto", "Float:1", "float:3-1"] {
            assert!(vcpus(bad).is_err(), "{bad}");
        }
        assert!(CpuChoice::parse_set("float:1").is_err(), "for vCPUs alone");
    }

    #[test]
    fn a_cpu_that_is_named_twice_is_named_in_the_error() {
        for (text, named) in [
            ("1,1", "CPU 1 more"),
            ("5,3,5", "CPU 5 more"),
            ("0-3,2-5", "CPUs 2-3 more"),
            ("", "names no CPU"),
        ] {
            let error = vcpus(text).expect_err(text);
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_the_same(cpus in prop::collection::hash_set(0usize..40, 1..12)) {
            let text: Vec<String> = cpus.iter().map(usize::to_string).collect();
            let choice = vcpus(&text.join(",")).expect("each once");
            prop_assert_eq!(vcpus(&choice.to_string()), Ok(choice));
        }
    }
}
