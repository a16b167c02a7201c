//! The signals that a supervisor takes.
//!
//! | signal | meaning |
//! |---|---|
//! | SIGTERM, SIGINT | restore everything and end |
//! | SIGHUP | from systemd: read the policy again; from a terminal that closes: as SIGTERM; under `nohup`: nothing |

use std::pin::Pin;

use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::SignalStream;
use tokio_stream::{Stream, StreamExt as _};

use crate::attachment::error::StartError;
use crate::sysroot::SysRoot;

/// Yields once for each signal.
pub(super) type Signal = Pin<Box<dyn Stream<Item = ()>>>;

/// The signals of one process. They are taken for the whole life of the process: one that comes between two VMs is
/// kept for the next who waits.
pub(super) struct Signals {
    /// This process is to end.
    pub(super) stop: Signal,
    /// This process is to read the policy again.
    pub(super) reload: Signal,
}

impl Signals {
    /// Takes the signals. To be called within a tokio runtime.
    ///
    /// # Errors
    /// [`StartError::Watch`].
    pub(super) fn of(root: &SysRoot) -> Result<Signals, StartError> {
        let on = |kind| {
            let stream = signal(kind).map(SignalStream::new);
            stream.map_err(|source| StartError::Watch { what: "signals", source })
        };
        let stop = on(SignalKind::terminate())?.merge(on(SignalKind::interrupt())?);
        let never = || Box::pin(tokio_stream::pending());
        if hangup_is_ignored(root) {
            return Ok(Signals { stop: Box::pin(stop), reload: never() });
        }
        let hangup = on(SignalKind::hangup())?;
        Ok(if is_started_by_systemd(std::env::var("SYSTEMD_EXEC_PID").ok().as_deref()) {
            Signals { stop: Box::pin(stop), reload: Box::pin(hangup) }
        } else {
            Signals { stop: Box::pin(stop.merge(hangup)), reload: never() }
        })
    }
}

/// Whether systemd has started this very process. The variable is inherited by children, so it counts only where it
/// names this process (`man 5 systemd.exec`, `SYSTEMD_EXEC_PID`).
fn is_started_by_systemd(exec_pid: Option<&str>) -> bool {
    exec_pid.and_then(|pid| pid.parse().ok()) == Some(std::process::id())
}

fn hangup_is_ignored(root: &SysRoot) -> bool {
    let stat = root.read_lossy("proc/self/stat").unwrap_or_default();
    // Field 33 is the mask of ignored signals, decimal; the name, field 2, ends at the last bracket.
    // Bit 0 is signal 1, SIGHUP. `status` has it as well, and takes ten times as long to make.
    let ignored =
        stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(33 - 3));
    ignored.and_then(|mask| mask.parse::<u64>().ok()).is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_that_systemd_started_takes_hangup_for_a_reload() {
        let own = std::process::id().to_string();
        assert!(is_started_by_systemd(Some(&own)));
        let other = (std::process::id() + 1).to_string();
        for inherited in [None, Some(""), Some("x"), Some(other.as_str())] {
            assert!(!is_started_by_systemd(inherited), "{inherited:?}");
        }
    }
}
