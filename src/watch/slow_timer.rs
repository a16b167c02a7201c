//! The slow timer, by a timerfd (`man 2 timerfd_create`): one wake-up a turn and no other.
//!
//! A timer of tokio's is a hierarchy of wheels, and a time some seconds away is handed down from wheel to
//! wheel: two more wake-ups for each turn, all day, for each VM.

use std::io;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::sys::Readable;

/// Ticks again and again. Ticks that passed unnoticed count as one.
#[derive(Debug)]
pub struct SlowTimer {
    timer: Readable,
}

impl SlowTimer {
    /// Ticks every so often, for the first time when that has passed. It must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// Those of `timerfd_create(2)`.
    pub fn every(interval: Duration) -> io::Result<SlowTimer> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let timer = SlowTimer { timer: Readable::new(timer)? };
        timer.set_interval(interval)?;
        Ok(timer)
    }

    /// Makes it tick this often from now on.
    ///
    /// # Errors
    /// Those of `timerfd_settime(2)`.
    pub fn set_interval(&self, interval: Duration) -> io::Result<()> {
        let every = Timespec::try_from(interval).map_err(io::Error::other)?;
        let times = Itimerspec { it_interval: every, it_value: every };
        timerfd_settime(self.timer.as_fd(), TimerfdTimerFlags::empty(), &times)?;
        Ok(())
    }

    /// The next tick. Cancel safe.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn tick(&self) -> io::Result<()> {
        let mut count = [0; 8];
        self.timer.read(|timer| Ok(rustix::io::read(timer, &mut count)?)).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_ticks_again_and_again() {
        let timer = SlowTimer::every(Duration::from_secs(3600)).expect("a timer");
        timer.set_interval(Duration::from_millis(1)).expect("faster");
        for _ in 0..3 {
            timer.tick().await.expect("a tick");
        }
    }
}
