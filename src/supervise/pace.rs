//! How often QEMU is asked. A question that taught something may be followed by another at once, as when
//! vCPUs are plugged one by one; questions in vain, as when nameless workers come and go, grow rare; after
//! a failure QEMU is given time.

use std::time::Duration;

/// Between two questions that both taught something.
const GAP: Duration = Duration::from_millis(20);
/// Doubled for each question in vain, this many times at most: to 2.6 s.
const VAIN_DOUBLINGS_MAX: u32 = 7;
/// After a failure, doubled for each further one.
const FAILED_GAP: Duration = Duration::from_millis(250);
/// The most it is doubled to.
const FAILED_GAP_MAX: Duration = Duration::from_secs(10);

/// What the last questions have come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Pace {
    in_vain: u32,
    failed: u32,
}

impl Pace {
    /// The answer told of a vCPU or iothread that came or went.
    pub(super) fn taught(&mut self) {
        *self = Pace::default();
    }

    /// The answer was the one before.
    pub(super) fn in_vain(&mut self) {
        *self = Pace { in_vain: self.in_vain.saturating_add(1), failed: 0 };
    }

    /// There was no answer, or none of use. How many in a row by now.
    pub(super) fn failed(&mut self) -> u32 {
        self.failed = self.failed.saturating_add(1);
        self.failed
    }

    /// How long after the last question the next may come.
    pub(super) fn gap(self) -> Duration {
        if self.failed > 0 {
            FAILED_GAP.saturating_mul(1 << (self.failed - 1).min(10)).min(FAILED_GAP_MAX)
        } else {
            GAP.saturating_mul(1 << self.in_vain.min(VAIN_DOUBLINGS_MAX))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_in_vain_grow_rare_until_one_teaches() {
        let mut pace = Pace::default();
        assert_eq!(pace.gap(), GAP);
        let mut last = pace.gap();
        for _ in 0..VAIN_DOUBLINGS_MAX {
            pace.in_vain();
            assert_eq!(pace.gap(), last * 2);
            last = pace.gap();
        }
        pace.in_vain();
        assert_eq!(pace.gap(), last);
        pace.taught();
        assert_eq!(pace.gap(), GAP);
    }

    #[test]
    fn after_failures_qemu_is_given_time_but_not_for_ever() {
        let mut pace = Pace::default();
        assert_eq!(pace.failed(), 1);
        assert_eq!(pace.gap(), FAILED_GAP);
        for _ in 0..100 {
            pace.failed();
        }
        assert_eq!(pace.gap(), FAILED_GAP_MAX);
        pace.in_vain();
        assert!(pace.gap() < FAILED_GAP);
    }
}
