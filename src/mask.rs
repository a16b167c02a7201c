//! `Mask`: a set of CPUs as it is kept for each of many threads. A QEMU may have tens of thousands of threads with a
//! handful of different masks, so equal masks share one [`CpuSet`].

use std::borrow::Borrow;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::cpuset::CpuSet;

/// A set of CPUs in 8 bytes, equal to the [`CpuSet`] that it stands for. In messages the empty one is `none`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Mask(Arc<CpuSet>);

/// Gives equal masks the same memory. It remembers a few of the last ones only, so that endless different masks take no
/// more memory here.
#[derive(Debug, Default)]
pub struct Masks {
    recent: VecDeque<Mask>,
}

/// How many different masks are remembered.
const RECENT_MAX: usize = 32;

impl Masks {
    /// Returns the mask for these CPUs.
    pub fn of(&mut self, cpus: CpuSet) -> Mask {
        if let Some(known) = self.recent.iter().find(|known| **known == cpus) {
            return known.clone();
        }
        let mask = Mask::from(cpus);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(mask.clone());
        mask
    }
}

impl From<CpuSet> for Mask {
    fn from(cpus: CpuSet) -> Mask {
        Mask(Arc::new(cpus))
    }
}

impl Borrow<CpuSet> for Mask {
    fn borrow(&self) -> &CpuSet {
        &self.0
    }
}

impl Deref for Mask {
    type Target = CpuSet;

    fn deref(&self) -> &CpuSet {
        &self.0
    }
}

impl PartialEq<CpuSet> for Mask {
    fn eq(&self, cpus: &CpuSet) -> bool {
        *self.0 == *cpus
    }
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("none") } else { fmt::Display::fmt(&*self.0, f) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().expect("a cpulist")
    }

    #[test]
    fn equal_masks_share_their_memory_and_others_are_freed() {
        let mut masks = Masks::default();
        let first = masks.of(set("0-3"));
        assert!(Arc::ptr_eq(&first.0, &masks.of(set("0-3")).0));
        assert_eq!(
            (first.to_string(), format!("{first:?}")),
            ("0-3".to_owned(), format!("{:?}", set("0-3")))
        );
        for cpu in 0..1000 {
            assert_eq!(masks.of(set(&cpu.to_string())), set(&cpu.to_string()));
        }
        assert_eq!(masks.recent.len(), RECENT_MAX);
        assert_eq!(masks.of(set("0-3")), first);
    }
}
