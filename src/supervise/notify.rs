//! Words to systemd (`man 3 sd_notify`). Without it, nothing is said and nothing fails.

use std::time::Duration;

/// How long systemd is asked to wait for the next sign of life while something is under way.
const BUSY: Duration = Duration::from_secs(30);

use sd_notify::NotifyState;

use crate::shown;

/// Everything is in place for the first time.
pub(super) fn ready(status: &str) {
    say(&[NotifyState::Ready, NotifyState::Status(&shown::line(status))]);
}

/// Alive, and how it stands.
pub(super) fn alive(status: &str) {
    say(&[NotifyState::Watchdog, NotifyState::Status(&shown::line(status))]);
}

/// Alive, and busy with something that may take longer than systemd waits by default.
pub(super) fn busy() {
    let extend =
        NotifyState::ExtendTimeoutUsec(u32::try_from(BUSY.as_micros()).unwrap_or(u32::MAX));
    say(&[NotifyState::Watchdog, extend]);
}

/// How it stands, between two signs of life.
pub(super) fn status(status: &str) {
    say(&[NotifyState::Status(&shown::line(status))]);
}

/// Restoring now.
pub(super) fn stopping() {
    say(&[NotifyState::Stopping, NotifyState::Status("restoring the host")]);
}

/// How often systemd wants to hear from us at least, halved as the manual advises.
pub(super) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}

fn say(words: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(words) {
        tracing::debug!("could not notify systemd: {error}");
    }
}
