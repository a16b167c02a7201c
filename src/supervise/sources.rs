//! What can wake the loop.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::SignalStream;
use tokio_stream::{Stream, StreamExt as _};

use super::notify;
use super::settings::{Host, Settings};
use super::start_error::StartError;
use crate::threads::ProcessKey;
use crate::watch::{Births, Exit, LeaseChanges, SlowTimer};

/// Where births cannot be watched, the slow timer is all there is: it is made faster.
pub(super) const BLIND_INTERVAL: Duration = Duration::from_secs(1);

/// What can wake the loop.
pub(super) struct Watch {
    pub(super) exit: Exit,
    /// None where the kernel does not permit it.
    pub(super) births: Option<Births>,
    /// None where it could not be had.
    pub(super) leases: Option<LeaseChanges>,
    pub(super) stop: Stop,
    pub(super) slow_timer: SlowTimer,
}

/// Yields when we are told to stop.
pub(super) type Stop = Pin<Box<dyn Stream<Item = ()>>>;

/// SIGTERM, SIGINT, and the terminal's end, unless we are run under `nohup`.
pub(super) fn stop_signals(host: Host<'_>) -> Result<Stop, StartError> {
    let on = |kind| {
        let stream = signal(kind).map(SignalStream::new);
        stream.map_err(|source| StartError::Watch { what: "signals", source })
    };
    let hangup_is_ignored = hangup_is_ignored(host);
    let stop = on(SignalKind::terminate())?.merge(on(SignalKind::interrupt())?);
    if hangup_is_ignored {
        return Ok(Box::pin(stop));
    }
    Ok(Box::pin(stop.merge(on(SignalKind::hangup())?)))
}

fn hangup_is_ignored(host: Host<'_>) -> bool {
    let stat = host.root.read_lossy("proc/self/stat").unwrap_or_default();
    // Field 33 is the mask of ignored signals, decimal; the name, field 2, ends at the last bracket.
    // Bit 0 is signal 1, SIGHUP. `status` has it as well, and takes ten times as long to make.
    let ignored =
        stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(33 - 3));
    ignored.and_then(|mask| mask.parse::<u64>().ok()).is_some_and(|mask| mask & 1 == 1)
}

impl Watch {
    pub(super) fn of(
        host: Host<'_>,
        settings: &Settings,
        process: ProcessKey,
        stop: Stop,
    ) -> Result<Watch, StartError> {
        let fail = |what| move |source| StartError::Watch { what, source };
        let exit = Exit::of(host.root, process).map_err(fail("the QEMU process"))?;
        let births = Births::of(process.pid)
            .inspect_err(|error| {
                tracing::warn!(
                    "new threads are found by the slow timer alone: no process connector: {error}"
                );
            })
            .ok();
        let leases = LeaseChanges::of(&settings.state, &settings.vm)
            .inspect_err(|error| {
                tracing::warn!("other VMs' comings and goings are not seen: {error}");
            })
            .ok();
        let mut every = settings.policy.vm.check_interval.value;
        if births.is_none() {
            every = every.min(BLIND_INTERVAL);
        }
        if let Some(watchdog) = notify::watchdog_interval() {
            every = every.min(watchdog);
        }
        let slow_timer = SlowTimer::every(every).map_err(fail("the time"))?;
        Ok(Watch { exit, births, leases, stop, slow_timer })
    }
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
