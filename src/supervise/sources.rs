//! What can wake the loop.

use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until};

use super::notify;
use crate::attachment::error::StartError;
use crate::attachment::settings::Settings;
use crate::knobs::ground::Host;
use crate::threads::ProcessKey;
use crate::watch::{Exit, LeaseChanges, NewThreads, SlowTimer};

/// Where new threads cannot be watched, the slow timer is all there is: it is made faster.
const BLIND_INTERVAL: Duration = Duration::from_secs(1);

/// What can wake the loop.
pub(super) struct Watch {
    pub(super) exit: Source<Exit>,
    /// None where the kernel does not permit it.
    pub(super) new_threads: Option<Source<NewThreads>>,
    /// None where it could not be had.
    pub(super) leases: Option<Source<LeaseChanges>>,
    pub(super) slow_timer: Source<SlowTimer>,
}

/// A source of the kernel's, or one that a test plays.
pub(super) enum Source<S> {
    Kernel(S),
    #[cfg(test)]
    Played(Played),
}

/// Yields once for each message.
#[cfg(test)]
pub(super) type Played = UnboundedReceiver<()>;

impl<S> Source<S> {
    /// Waits for what this source has to report next. `next` asks the kernel's. Cancel safe where that is.
    pub(super) async fn next<'a, T, F>(
        &'a mut self,
        next: impl FnOnce(&'a mut S) -> F,
    ) -> io::Result<()>
    where
        F: Future<Output = io::Result<T>>,
    {
        match self {
            Source::Kernel(source) => next(source).await.map(drop),
            #[cfg(test)]
            Source::Played(source) => {
                next_message(source).await;
                Ok(())
            }
        }
    }
}

impl Source<SlowTimer> {
    /// Makes it tick this often from now on; one that is played stays as it is.
    pub(super) fn set_interval(&self, interval: Duration) -> io::Result<()> {
        match self {
            Source::Kernel(timer) => timer.set_interval(interval),
            #[cfg(test)]
            Source::Played(_) => Ok(()),
        }
    }
}

impl Source<NewThreads> {
    /// Drops what has come so far.
    pub(super) fn drain(&mut self) {
        match self {
            Source::Kernel(new_threads) => new_threads.drain(),
            #[cfg(test)]
            Source::Played(source) => while source.try_recv().is_ok() {},
        }
    }
}

impl Watch {
    pub(super) fn of(
        host: Host<'_>,
        settings: &Settings,
        process: ProcessKey,
    ) -> Result<Watch, StartError> {
        let fail = |what| move |source| StartError::Watch { what, source };
        let exit = Exit::of(host.root, process).map_err(fail("the QEMU process"))?;
        let new_threads = NewThreads::of(process.pid)
            .inspect_err(|error| {
                tracing::warn!(
                    "new threads are found only by the slow timer, because there is no process connector: {error}"
                );
            })
            .ok();
        let leases = LeaseChanges::of(&settings.state, Some(&settings.vm))
            .inspect_err(|error| {
                tracing::warn!("other VMs' comings and goings are not seen: {error}");
            })
            .ok();
        let every = interval(settings, new_threads.is_some());
        let slow_timer = SlowTimer::every(every).map_err(fail("the time"))?;
        Ok(Watch {
            exit: Source::Kernel(exit),
            new_threads: new_threads.map(Source::Kernel),
            leases: leases.map(Source::Kernel),
            slow_timer: Source::Kernel(slow_timer),
        })
    }
}

/// How often the slow timer ticks, where new threads are seen or not.
pub(super) fn interval(settings: &Settings, sees_new_threads: bool) -> Duration {
    let mut every = settings.policy.vm.check_interval.value;
    if !sees_new_threads {
        every = every.min(BLIND_INTERVAL);
    }
    notify::within_watchdog(every)
}

pub(super) async fn next_of<'a, W, T, F>(
    watch: &'a mut Option<W>,
    next: impl FnOnce(&'a mut W) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    match watch {
        Some(watch) => next(watch).await,
        None => pending().await,
    }
}

pub(super) async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => pending().await,
    }
}

/// Waits for the next message; for ever where the sender has ended.
pub(super) async fn next_message<T>(messages: &mut UnboundedReceiver<T>) -> T {
    match messages.recv().await {
        Some(message) => message,
        None => pending().await,
    }
}
