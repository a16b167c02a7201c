//! How often QEMU is asked, and the host looked at for another VM's sake. A question that taught something may
//! be followed by another at once, as when vCPUs are plugged one by one; questions in vain, as when nameless
//! workers come and go, grow rare; after a failure QEMU is given time. vCPUs that come and go cost a plan, a
//! lease, and all other VMs a pass, and no honest VM's do so all day: QEMU is asked ever less often then.

use std::time::Duration;

use tokio::time::Instant;

/// Between two questions that both taught something.
const GAP: Duration = Duration::from_millis(20);
/// Doubled for each question in vain, this many times at most: to 2.6 s.
const VAIN_DOUBLINGS_MAX: u32 = 7;
/// After a failure, doubled for each further one.
const FAILED_GAP: Duration = Duration::from_millis(250);
/// The most it is doubled to.
const FAILED_GAP_MAX: Duration = Duration::from_secs(10);

/// An answer that takes a vCPU away counts for so long, one after the other.
const LOSS: Duration = Duration::from_secs(6);
/// With more of them than this, which is 10 a minute, the gap is doubled for each further one.
const LOSSES_FREE: u32 = 10;
/// More than this count for no more: it must end some day.
const LOSSES_MAX: u32 = 20;
/// The most the gap is doubled to.
const LOSSES_GAP_MAX: Duration = Duration::from_secs(5);

/// Between two checks of the host because other VMs have changed.
const NEIGHBOURS_GAP: Duration = Duration::from_secs(1);

/// What the last questions have come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Pace {
    in_vain: u32,
    failed: u32,
    /// When the last of the vCPUs that were taken away will count no more.
    losses_until: Option<Instant>,
}

impl Pace {
    /// The answer reported a vCPU or iothread that came or went.
    pub(super) fn taught(&mut self) {
        *self = Pace { in_vain: 0, failed: 0, ..*self };
    }

    /// The answer took a vCPU away.
    pub(super) fn lost_a_vcpu(&mut self, now: Instant) {
        let until = self.losses_until.map_or(now, |until| until.max(now)) + LOSS;
        self.losses_until = Some(until.min(now + LOSS * LOSSES_MAX));
    }

    /// The answer was the one before.
    pub(super) fn in_vain(&mut self) {
        *self = Pace { in_vain: self.in_vain.saturating_add(1), failed: 0, ..*self };
    }

    /// There was no answer, or none of use. How many in a row by now.
    pub(super) fn failed(&mut self) -> u32 {
        self.failed = self.failed.saturating_add(1);
        self.failed
    }

    /// How long after the last question the next may come.
    pub(super) fn gap(self, now: Instant) -> Duration {
        let gap = if self.failed > 0 {
            FAILED_GAP.saturating_mul(1 << (self.failed - 1).min(10)).min(FAILED_GAP_MAX)
        } else {
            GAP.saturating_mul(1 << self.in_vain.min(VAIN_DOUBLINGS_MAX))
        };
        gap.max(self.losses_gap(now))
    }

    fn losses_gap(self, now: Instant) -> Duration {
        let left = self.losses_until.map_or(Duration::ZERO, |until| until.duration_since(now));
        let losses = u32::try_from(left.as_millis().div_ceil(LOSS.as_millis()));
        let doublings = losses.unwrap_or(LOSSES_MAX).saturating_sub(LOSSES_FREE);
        GAP.saturating_mul(1 << doublings.min(LOSSES_MAX)).min(LOSSES_GAP_MAX)
    }
}

/// Checks of the host because other VMs have changed: the first at once, then one a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct ForNeighbours {
    last: Option<Instant>,
    due: Option<Instant>,
}

impl ForNeighbours {
    /// Another VM came or went. Whether the host is to be looked at now, and not when that is due.
    pub(super) fn changed(&mut self, now: Instant) -> bool {
        let next = self.last.map_or(now, |last| last + NEIGHBOURS_GAP);
        if next > now {
            self.due = Some(next);
            return false;
        }
        self.looked(now);
        true
    }

    /// It could not be looked at now.
    pub(super) fn again(&mut self, now: Instant) {
        self.due = Some(now + NEIGHBOURS_GAP);
    }

    /// When it is due, if anything has changed since the last.
    pub(super) fn due(self) -> Option<Instant> {
        self.due
    }

    /// It is looked at now.
    pub(super) fn looked(&mut self, now: Instant) {
        *self = ForNeighbours { last: Some(now), due: None };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_in_vain_grow_rare_until_one_teaches() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.gap(now), GAP);
        let mut last = pace.gap(now);
        for _ in 0..VAIN_DOUBLINGS_MAX {
            pace.in_vain();
            assert_eq!(pace.gap(now), last * 2);
            last = pace.gap(now);
        }
        pace.in_vain();
        assert_eq!(pace.gap(now), last);
        pace.taught();
        assert_eq!(pace.gap(now), GAP);
    }

    #[test]
    fn after_failures_qemu_is_given_time_but_not_for_ever() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.failed(), 1);
        assert_eq!(pace.gap(now), FAILED_GAP);
        for _ in 0..100 {
            pace.failed();
        }
        assert_eq!(pace.gap(now), FAILED_GAP_MAX);
        pace.in_vain();
        assert!(pace.gap(now) < FAILED_GAP);
    }

    #[test]
    fn a_qemu_whose_vcpus_come_and_go_all_day_is_asked_ever_less_often() {
        let mut now = Instant::now();
        let mut pace = Pace::default();
        for _ in 0..LOSSES_FREE {
            pace.lost_a_vcpu(now);
            assert_eq!(pace.gap(now), GAP);
            now += GAP;
        }
        let mut last = GAP;
        while last < LOSSES_GAP_MAX {
            pace.lost_a_vcpu(now);
            assert_eq!(pace.gap(now), (last * 2).min(LOSSES_GAP_MAX));
            last = pace.gap(now);
            now += GAP;
        }
        // It is not forgotten for what else it says, or does not.
        pace.failed();
        pace.in_vain();
        pace.taught();
        assert_eq!(pace.gap(now), LOSSES_GAP_MAX);
        // An hour of it is about ten a minute.
        let (hour, mut losses) = (now + Duration::from_secs(3600), 0);
        while now < hour {
            pace.lost_a_vcpu(now);
            losses += 1;
            now += pace.gap(now);
        }
        assert!(losses <= 60 * 12 + 1, "{losses}");
        assert_eq!(pace.gap(now + LOSS * (LOSSES_MAX - LOSSES_FREE)), GAP);
    }

    #[test]
    fn the_host_is_looked_at_once_a_second_for_neighbours_and_at_once_for_the_first() {
        let start = Instant::now();
        let mut looks = ForNeighbours::default();
        assert!(looks.changed(start));
        assert_eq!(looks.due(), None);
        for ms in [1, 500, 999] {
            assert!(!looks.changed(start + Duration::from_millis(ms)));
            assert_eq!(looks.due(), Some(start + NEIGHBOURS_GAP));
        }
        looks.looked(start + NEIGHBOURS_GAP);
        assert_eq!(looks.due(), None);
        assert!(!looks.changed(start + NEIGHBOURS_GAP));
        assert_eq!(looks.due(), Some(start + NEIGHBOURS_GAP * 2));
        assert!(looks.changed(start + NEIGHBOURS_GAP * 3), "late, as after a long look");
        assert_eq!(looks.due(), None);
    }
}
