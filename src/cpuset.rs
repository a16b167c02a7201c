//! `CpuSet`: a set of host CPUs, and the two spellings the kernel has for it.
//!
//! Everything qmpin decides ends in one of these. The spellings are the kernel's: the *cpulist*
//! (`0-3,8`) of sysfs, cgroup and `/proc/PID/status`, and the *cpumask* (`0000010f`) of
//! `/proc/irq`. No I/O here.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::{CPUS_MAX, CpuId};

const WORDS: usize = CPUS_MAX / 64;

/// A set of host CPUs, `0..CPUS_MAX`. Copying is 128 bytes and never allocates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CpuSet {
    words: [u64; WORDS],
}

/// Why a cpulist was not understood. The text names the part that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseCpuListError {
    /// A part between commas is neither `N` nor `A-B` nor `A-B:used/group`.
    #[error("{}", not_a_number(part))]
    NotANumber {
        /// The part as it was written.
        part: String,
    },
    /// A range ends before it begins.
    #[error("the range `{part}` ends before it begins")]
    Backwards {
        /// The part as it was written.
        part: String,
    },
    /// A stride (`A-B:used/group`) has a zero, or uses more than its group.
    #[error("the stride in `{part}` must be used/group with 1 <= used <= group")]
    BadStride {
        /// The part as it was written.
        part: String,
    },
    /// A list names more CPUs than there can be, so some of them again.
    #[error("it names {cpus} CPUs, and qmpin handles {CPUS_MAX}")]
    TooLong {
        /// How many it names.
        cpus: usize,
    },
    /// A CPU number is beyond what `sched_setaffinity` can name.
    #[error("CPU {cpu} is beyond the {CPUS_MAX} CPUs that qmpin handles")]
    TooLarge {
        /// The number as it was written.
        cpu: String,
    },
}

fn not_a_number(part: &str) -> String {
    match part {
        "" => {
            "`` is not a CPU number: there is nothing between two commas, or at an end".to_owned()
        }
        part => format!("`{part}` is not a CPU number or a range such as 0-3"),
    }
}

impl CpuSet {
    /// The empty set.
    pub const EMPTY: CpuSet = CpuSet { words: [0; WORDS] };

    /// A set of one CPU.
    #[must_use]
    pub fn single(cpu: CpuId) -> CpuSet {
        let mut set = CpuSet::EMPTY;
        set.insert(cpu);
        set
    }

    /// Adds a CPU. A number past [`CPUS_MAX`] cannot be made: [`CpuId`] refuses it.
    pub fn insert(&mut self, cpu: CpuId) {
        self.words[cpu.index() / 64] |= 1 << (cpu.index() % 64);
    }

    /// Takes a CPU out.
    pub fn remove(&mut self, cpu: CpuId) {
        self.words[cpu.index() / 64] &= !(1 << (cpu.index() % 64));
    }

    /// Whether the CPU is in the set.
    #[must_use]
    pub fn contains(&self, cpu: CpuId) -> bool {
        self.words[cpu.index() / 64] & (1 << (cpu.index() % 64)) != 0
    }

    /// How many CPUs are in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        // Most words of most sets are empty, and counting bits costs more than a comparison.
        let words = self.words.iter().filter(|word| **word != 0);
        words.map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is no CPU in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether every CPU of this set is in `other`.
    #[must_use]
    pub fn is_subset(&self, other: &CpuSet) -> bool {
        self.words.iter().zip(&other.words).fold(0, |all, (a, b)| all | (a & !b)) == 0
    }

    /// Whether the two sets share a CPU.
    #[must_use]
    pub fn intersects(&self, other: &CpuSet) -> bool {
        // Without an early end this is a few vector instructions, and the planner's daily bread.
        self.words.iter().zip(&other.words).fold(0, |all, (a, b)| all | (a & b)) != 0
    }

    /// The lowest CPU, if there is one.
    #[must_use]
    pub fn first(&self) -> Option<CpuId> {
        self.iter().next()
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                CpuId::from_index(at * 64 + bit)
            })
        })
    }

    /// The set as the kernel's cpumask: hexadecimal groups of 32 bits, most significant first,
    /// as in `/proc/irq/N/smp_affinity`.
    #[must_use]
    pub fn to_cpumask(&self) -> String {
        let mut groups: Vec<String> = Vec::with_capacity(WORDS * 2);
        for word in self.words.iter().rev() {
            groups.push(format!("{:08x}", word >> 32));
            groups.push(format!("{:08x}", word & 0xffff_ffff));
        }
        let first = groups.iter().position(|group| group != "00000000").unwrap_or(groups.len() - 1);
        groups[first..].join(",")
    }

    /// Reads a cpumask as the kernel writes it; `None`: it is none, or names more CPUs than are handled.
    #[must_use]
    pub fn parse_cpumask(text: &str) -> Option<CpuSet> {
        let mut words = [0u64; WORDS];
        for (at, group) in text.trim().rsplit(',').enumerate() {
            let fits = (1..=8).contains(&group.len());
            let bits = u64::from_str_radix(group, 16).ok().filter(|_| fits)?;
            match words.get_mut(at / 2) {
                Some(word) => *word |= bits << (at % 2 * 32),
                None if bits == 0 => {}
                None => return None,
            }
        }
        Some(CpuSet { words })
    }

    /// Reads a cpulist as the kernel writes and reads it (`lib/bitmap-str.c`): comma-separated
    /// numbers and ranges, ranges with an optional `:used/group` stride. White space around the
    /// whole is ignored; an empty text is the empty set.
    ///
    /// # Errors
    /// [`ParseCpuListError`] names the part that is wrong. Unlike the kernel, a range that runs
    /// backwards is an error and not the empty set.
    pub fn parse_cpulist(text: &str) -> Result<CpuSet, ParseCpuListError> {
        let mut set = CpuSet::EMPTY;
        each_cpu(text, |cpu| set.insert(cpu))?;
        Ok(set)
    }

    /// Reads the same as a list: the CPUs in the order in which they are written, also those that are written again.
    ///
    /// # Errors
    /// As [`parse_cpulist`](CpuSet::parse_cpulist), and for a list of more than [`CPUS_MAX`] CPUs.
    pub fn parse_in_order(text: &str) -> Result<Vec<CpuId>, ParseCpuListError> {
        let (mut order, mut all) = (Vec::new(), 0);
        each_cpu(text, |cpu| {
            all += 1;
            if all <= CPUS_MAX {
                order.push(cpu);
            }
        })?;
        if all > CPUS_MAX { Err(ParseCpuListError::TooLong { cpus: all }) } else { Ok(order) }
    }
}

/// Calls `each` with the CPUs of a cpulist in the order in which they are written.
fn each_cpu(text: &str, mut each: impl FnMut(CpuId)) -> Result<(), ParseCpuListError> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(());
    }
    for part in text.split(',') {
        let part = part.trim();
        let (range, stride) = match part.split_once(':') {
            Some((range, stride)) => (range, Some(stride)),
            None => (part, None),
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first, part)?, number(last, part)?),
            None if stride.is_some() => {
                return Err(ParseCpuListError::NotANumber { part: part.to_owned() });
            }
            None => {
                let cpu = number(range, part)?;
                (cpu, cpu)
            }
        };
        if last < first {
            return Err(ParseCpuListError::Backwards { part: part.to_owned() });
        }
        let (used, group) = match stride {
            None => (1, 1),
            Some(stride) => parse_stride(stride, part)?,
        };
        let range = (first.index()..=last.index()).enumerate();
        let used = range.filter(|(offset, _)| offset % group < used);
        used.filter_map(|(_, cpu)| CpuId::from_index(cpu)).for_each(&mut each);
    }
    Ok(())
}

fn number(text: &str, part: &str) -> Result<CpuId, ParseCpuListError> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ParseCpuListError::NotANumber { part: part.to_owned() });
    }
    text.parse::<usize>()
        .ok()
        .and_then(CpuId::from_index)
        .ok_or_else(|| ParseCpuListError::TooLarge { cpu: text.to_owned() })
}

fn parse_stride(stride: &str, part: &str) -> Result<(usize, usize), ParseCpuListError> {
    let bad = || ParseCpuListError::BadStride { part: part.to_owned() };
    let (used, group) = stride.split_once('/').ok_or_else(bad)?;
    let used: usize = used.parse().map_err(|_| bad())?;
    let group: usize = group.parse().map_err(|_| bad())?;
    if used == 0 || group == 0 || used > group {
        return Err(bad());
    }
    Ok((used, group))
}

/// The canonical cpulist: ascending, runs of two or more as `A-B`, the empty set as an empty text.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().map(|cpu| cpu.index()).peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while cpus.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            if first == last {
                write!(f, "{separator}{first}")?;
            } else {
                write!(f, "{separator}{first}-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

impl FromStr for CpuSet {
    type Err = ParseCpuListError;

    fn from_str(text: &str) -> Result<CpuSet, ParseCpuListError> {
        CpuSet::parse_cpulist(text)
    }
}

impl FromIterator<CpuId> for CpuSet {
    fn from_iter<I: IntoIterator<Item = CpuId>>(cpus: I) -> CpuSet {
        let mut set = CpuSet::EMPTY;
        cpus.into_iter().for_each(|cpu| set.insert(cpu));
        set
    }
}

impl BitOr for CpuSet {
    type Output = CpuSet;

    fn bitor(mut self, other: CpuSet) -> CpuSet {
        self |= other;
        self
    }
}

impl BitOrAssign for CpuSet {
    fn bitor_assign(&mut self, other: CpuSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }
}

impl BitAnd for CpuSet {
    type Output = CpuSet;

    fn bitand(mut self, other: CpuSet) -> CpuSet {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= b;
        }
        self
    }
}

impl Sub for CpuSet {
    type Output = CpuSet;

    fn sub(mut self, other: CpuSet) -> CpuSet {
        self -= other;
        self
    }
}

impl SubAssign for CpuSet {
    fn sub_assign(&mut self, other: CpuSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<CpuSet, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        CpuSet::parse_cpulist(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> CpuSet {
        CpuSet::parse_cpulist(text).expect("a good cpulist")
    }

    fn from_model(model: &BTreeSet<usize>) -> CpuSet {
        model.iter().filter_map(|cpu| CpuId::from_index(*cpu)).collect()
    }

    fn to_model(set: &CpuSet) -> BTreeSet<usize> {
        set.iter().map(|cpu| cpu.index()).collect()
    }

    #[test]
    fn a_cpulist_is_read_as_the_kernel_reads_it() {
        assert_eq!(to_model(&set("0-3,8\n")), BTreeSet::from([0, 1, 2, 3, 8]));
        assert_eq!(to_model(&set("0-7:2/4")), BTreeSet::from([0, 1, 4, 5]));
        assert_eq!(set(""), CpuSet::EMPTY);
        assert_eq!(set("1023").len(), 1);
    }

    #[test]
    fn a_bad_cpulist_is_refused_and_the_part_named() {
        for (text, part) in [
            ("3-0", "3-0"),
            ("1,,2", "``"),
            ("a", "`a`"),
            ("-1", "`-1`"),
            ("+1", "`+1`"),
            ("1-2-3", "1-2-3"),
            ("0-7:0/4", "0-7:0/4"),
            ("0-7:5/4", "0-7:5/4"),
            ("4:1/2", "4:1/2"),
            ("1024", "1024"),
            ("99999999999999999999", "99999999999999999999"),
        ] {
            let error = CpuSet::parse_cpulist(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_cpumask_is_written_as_the_kernel_writes_it() {
        assert_eq!(set("0-3,8").to_cpumask(), "0000010f");
        assert_eq!(set("32").to_cpumask(), "00000001,00000000");
        assert_eq!(CpuSet::EMPTY.to_cpumask(), "00000000");
    }

    proptest! {
        #[test]
        fn printing_and_reading_give_the_set_back(model in prop::collection::btree_set(0..CPUS_MAX, 0..80)) {
            let set = from_model(&model);
            prop_assert_eq!(to_model(&set), model);
            prop_assert_eq!(CpuSet::parse_cpulist(&set.to_string()), Ok(set));
        }

        #[test]
        fn the_operators_agree_with_a_set_model(
            a in prop::collection::btree_set(0..CPUS_MAX, 0..80),
            b in prop::collection::btree_set(0..CPUS_MAX, 0..80),
        ) {
            let (x, y) = (from_model(&a), from_model(&b));
            prop_assert_eq!(to_model(&(x | y)), &a | &b);
            prop_assert_eq!(to_model(&(x & y)), &a & &b);
            prop_assert_eq!(to_model(&(x - y)), &a - &b);
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert_eq!(x.intersects(&y), !a.is_disjoint(&b));
            prop_assert_eq!(x.len(), a.len());
            prop_assert_eq!(x.first().map(CpuId::index), a.first().copied());
        }

        #[test]
        fn any_text_is_read_or_refused_but_never_panics(text in "[-0-9,:/ a]{0,24}") {
            if let Ok(set) = CpuSet::parse_cpulist(&text) {
                prop_assert_eq!(CpuSet::parse_cpulist(&set.to_string()), Ok(set));
            }
        }
    }
}
