//! The CPU time that QEMU can make its supervisor use, by events and by threads that come and go.
//!
//! ```text
//!   credit  grows by SHARE of the time that passes, up to CREDIT_MAX
//!           is spent by what QEMU causes: reading its events, passes and answers that followed from them
//!   below zero: QEMU's events and new threads are not heard until it is zero again
//! ```
//!
//! What is not heard waits in the kernel, or in QEMU: nothing is lost, since one pass sees all that has changed. An
//! honest QEMU never spends its credit, and is heard at once. Timers, other VMs and signals are always heard.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// One part in this many of a CPU.
const SHARE: u32 = 50;
/// What can be spent at once: some hundred passes.
const CREDIT_MAX: Duration = Duration::from_millis(120);
/// The longest rest, whatever was spent: a vCPU that is plugged is not to wait for longer.
const REST_MAX: Duration = Duration::from_secs(5);

/// What is left for QEMU to spend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Budget {
    /// When the credit is, or was, zero.
    zero_at: Instant,
}

impl Budget {
    /// A full one.
    pub(super) fn new(now: Instant) -> Budget {
        Budget { zero_at: now.checked_sub(CREDIT_MAX * SHARE).unwrap_or(now) }
    }

    /// Spends.
    pub(super) fn spend(&mut self, now: Instant, cost: Duration) {
        let fullest = now.checked_sub(CREDIT_MAX * SHARE).unwrap_or(now);
        self.zero_at = (self.zero_at.max(fullest) + cost * SHARE).min(now + REST_MAX);
    }

    /// Until when QEMU is not heard; `None`: it is.
    pub(super) fn rest(&self, now: Instant) -> Option<Instant> {
        (self.zero_at > now).then_some(self.zero_at)
    }
}

/// What QEMU has said and caused, and what that has cost so far.
#[derive(Debug)]
pub(super) struct Hearing {
    budget: Budget,
    /// The CPU time of the loop's thread that is accounted for.
    loop_time: Duration,
    /// Whether QEMU is heard since then. What the loop does otherwise, but for the pass that QEMU has caused, is not
    /// of its making; charged to it, the end of one rest would cost the next.
    is_heard: bool,
    /// Whether QEMU has caused the pass or answer that is due or under way.
    is_cause: bool,
}

impl Hearing {
    /// Nothing heard yet. `loop_time` is the [`thread_time`] of the loop's thread.
    pub(super) fn new(now: Instant, loop_time: Duration) -> Hearing {
        Hearing { budget: Budget::new(now), loop_time, is_heard: false, is_cause: false }
    }

    /// Accounts for what the loop's thread has done since the last time. Until when QEMU is not heard, but for
    /// the answer to a question under way.
    pub(super) fn rest(
        &mut self,
        now: Instant,
        loop_time: Duration,
        is_asked: bool,
    ) -> Option<Instant> {
        let used = loop_time.saturating_sub(std::mem::replace(&mut self.loop_time, loop_time));
        if self.is_heard || self.is_cause {
            self.budget.spend(now, used);
        }
        let rest = self.budget.rest(now);
        self.is_heard = rest.is_none() || is_asked;
        rest
    }

    /// QEMU has caused a pass.
    pub(super) fn heard(&mut self) {
        self.is_cause = true;
    }

    /// A pass or answer is done. Whether another one is `due`.
    pub(super) fn done(&mut self, cost: Duration, due: bool) {
        if self.is_cause {
            self.budget.spend(Instant::now(), cost);
            self.is_cause = due;
        }
    }
}

/// The CPU time that this thread has used.
pub(super) fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_at_once_is_rested_for_and_what_is_spent_slowly_is_not() {
        let mut now = Instant::now();
        let mut budget = Budget::new(now);
        budget.spend(now, CREDIT_MAX);
        assert_eq!(budget.rest(now), None);
        budget.spend(now, Duration::from_millis(10));
        assert_eq!(budget.rest(now), Some(now + Duration::from_millis(10) * SHARE));
        now += Duration::from_secs(3600);
        for _ in 0..10_000 {
            now += Duration::from_millis(1) * (SHARE + 1);
            budget.spend(now, Duration::from_millis(1));
            assert_eq!(budget.rest(now), None);
        }
    }

    #[test]
    fn a_rest_ends_however_much_the_loop_costs_meanwhile() {
        let (mut now, mut loop_time) = (Instant::now(), Duration::ZERO);
        let mut hearing = Hearing::new(now, loop_time);
        assert_eq!(hearing.rest(now, loop_time, false), None);
        loop_time += 2 * CREDIT_MAX;
        let begun = now;
        while let Some(rest) = hearing.rest(now, loop_time, false) {
            // The loop wakes, does what others want, and uses more than the rest was meant to save.
            loop_time += Duration::from_millis(1);
            now = rest;
            assert!(now - begun <= REST_MAX, "{:?}", now - begun);
        }
    }

    #[test]
    fn a_flood_gets_its_share_and_no_more() {
        let start = Instant::now();
        let (mut now, mut used) = (start, Duration::ZERO);
        let mut budget = Budget::new(now);
        while now < start + Duration::from_secs(30) {
            let cost = Duration::from_millis(2);
            used += cost;
            now += cost;
            budget.spend(now, cost);
            now = budget.rest(now).unwrap_or(now);
        }
        assert!(used < Duration::from_secs(30) / 20, "{used:?}");
    }
}
