//! Words to systemd (`man 3 sd_notify`). Without it, nothing is said and nothing fails.

use std::time::Duration;

/// How long systemd is asked to wait for the next sign of life while something is under way, in microseconds.
const BUSY_US: u32 = 30_000_000;

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
    say(&[NotifyState::Watchdog, NotifyState::ExtendTimeoutUsec(BUSY_US)]);
}

/// How it stands, between two signs of life.
pub(super) fn status(status: &str) {
    say(&[NotifyState::Status(&shown::line(status))]);
}

/// Restoring now.
pub(super) fn stopping() {
    say(&[NotifyState::Stopping, NotifyState::Status("restoring the host")]);
}

/// An interval, or the one in which systemd wants to hear from us at least where that is shorter, halved as the manual
/// advises.
pub(super) fn within_watchdog(every: Duration) -> Duration {
    sd_notify::watchdog_enabled().map_or(every, |limit| every.min(limit / 2))
}

#[cfg(test)]
fn say(words: &[NotifyState<'_>]) {
    heard::note(words);
}

#[cfg(not(test))]
fn say(words: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(words) {
        tracing::debug!("could not notify systemd: {error}");
    }
}

/// What systemd would be notified of in a test: it stays in the thread.
#[cfg(test)]
pub(super) mod heard {
    use std::cell::RefCell;

    use sd_notify::NotifyState;
    use tokio::time::Instant;

    thread_local! {
        static WORDS: RefCell<Vec<(Instant, String)>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn note(words: &[NotifyState<'_>]) {
        let now = Instant::now();
        let words = words.iter().map(|word| (now, word.to_string()));
        WORDS.with_borrow_mut(|all| all.extend(words));
    }

    /// When this was sent.
    pub(in crate::supervise) fn times(word: &str) -> Vec<Instant> {
        WORDS.with_borrow(|all| {
            let of = all.iter().filter(|(_, sent)| sent == word);
            of.map(|(when, _)| *when).collect()
        })
    }

    /// Forgets what an earlier test in the same thread has sent.
    pub(in crate::supervise) fn forget() {
        WORDS.with_borrow_mut(Vec::clear);
    }
}
