//! The connection to the system bus: one for the process, made by the first call and kept.
//!
//! ```text
//!   any thread: ask ── waits for the answer, at most as long as the limit ──▶ connection ◀── thread qmpin-bus
//! ```
//!
//! The thread `qmpin-bus` reads and writes the socket. It sleeps while no call is under way: without match rules the bus
//! sends nothing else. A connection that was closed, as when the bus is restarted, is made anew by the next call.

use std::future::{Future, pending};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::unconstrained;
use zbus::Connection;

use super::SystemdError;

/// A bus, and the connection to it.
pub(crate) struct Bus {
    /// Where it is; `None`: the system bus.
    address: Option<String>,
    /// The runtime of the thread, once there is one.
    runtime: OnceLock<Handle>,
    connection: Mutex<Option<Connection>>,
}

/// The system bus.
pub(crate) static SYSTEM: Bus = Bus::new();

impl Bus {
    const fn new() -> Bus {
        Bus { address: None, runtime: OnceLock::new(), connection: Mutex::const_new(None) }
    }

    /// Asks something, and waits for the answer. It may be called from any thread, also from one that runs a runtime.
    ///
    /// # Errors
    /// [`SystemdError`]; [`SystemdError::Late`] where there is no answer within the limit.
    pub(crate) fn ask<T>(
        &self,
        what: &str,
        limit: Duration,
        job: impl for<'a> AsyncFnOnce(&'a Connection) -> zbus::Result<T>,
    ) -> Result<T, SystemdError> {
        let runtime = self.runtime()?;
        let _within = runtime.enter();
        let answer = async {
            let bus =
                self.connection().await.map_err(|error| SystemdError::Reach(Box::new(error)))?;
            job(&bus).await.map_err(|source| SystemdError::Refused {
                what: what.to_owned(),
                source: Box::new(source),
            })
        };
        wait_for(async {
            tokio::time::timeout(limit, answer)
                .await
                .unwrap_or_else(|_| Err(SystemdError::Late { what: what.to_owned(), limit }))
        })
    }

    async fn connection(&self) -> zbus::Result<Connection> {
        let mut known = self.connection.lock().await;
        if let Some(open) = known.as_ref().filter(|known| !known.is_closed()) {
            return Ok(open.clone());
        }
        let made = match &self.address {
            None => Connection::system().await?,
            Some(address) => zbus::connection::Builder::address(address.as_str())?.build().await?,
        };
        Ok(known.insert(made).clone())
    }

    /// The runtime of the thread, which is started where there is none yet.
    fn runtime(&self) -> Result<&Handle, SystemdError> {
        if let Some(known) = self.runtime.get() {
            return Ok(known);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(SystemdError::Thread)?;
        let handle = runtime.handle().clone();
        let (start, started) = std::sync::mpsc::channel();
        let run = move || {
            // Another thread may have been first: then this one is not needed.
            if started.recv().is_ok() {
                runtime.block_on(pending::<()>());
            }
        };
        thread::Builder::new()
            .name("qmpin-bus".to_owned())
            .spawn(run)
            .map_err(SystemdError::Thread)?;
        Ok(self.runtime.get_or_init(|| {
            let _ = start.send(());
            handle
        }))
    }
}

/// Wakes the thread that waits.
struct Waiting(Thread);

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future in this thread. Unlike a runtime's `block_on` it may be called below one, and so the future does not
/// count in the budget of the task that it is called in.
fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(unconstrained(future));
    let waker = Waker::from(Arc::new(Waiting(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use super::*;

    const BUS: &str = "org.freedesktop.DBus";
    const PATIENCE: Duration = Duration::from_secs(10);

    struct Daemon {
        folder: tempfile::TempDir,
        child: Child,
    }

    impl Daemon {
        /// `None`: there is no such program here, and the test says that it was skipped.
        fn start(test: &str) -> Option<Daemon> {
            if Command::new("dbus-daemon").arg("--version").output().is_err() {
                // Past the capture of the test harness and off its line of dots, to be counted.
                let text = format!("\nskipped: {test}: there is no dbus-daemon\n");
                let _ = std::io::stderr().write_all(text.as_bytes());
                return None;
            }
            let folder = tempfile::tempdir().expect("a folder");
            let child = Daemon::run(folder.path());
            Some(Daemon { folder, child })
        }

        fn run(folder: &std::path::Path) -> Child {
            let address = format!("--address=unix:path={}", folder.join("bus").display());
            let child = Command::new("dbus-daemon")
                .args(["--session", "--nofork", "--nopidfile", "--nosyslog", &address])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("dbus-daemon, of the package dbus");
            let begun = Instant::now();
            while std::os::unix::net::UnixStream::connect(folder.join("bus")).is_err() {
                assert!(begun.elapsed() < PATIENCE, "no bus");
                thread::yield_now();
            }
            child
        }

        fn restart(&mut self) {
            self.child.kill().expect("killed");
            self.child.wait().expect("ended");
            std::fs::remove_file(self.folder.path().join("bus")).expect("removed");
            self.child = Daemon::run(self.folder.path());
        }

        fn bus(&self) -> Bus {
            let address = Some(format!("unix:path={}", self.folder.path().join("bus").display()));
            Bus { address, ..Bus::new() }
        }
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// The names of all connections to the bus: this one's, and no others.
    fn connections(bus: &Bus) -> Result<Vec<String>, SystemdError> {
        bus.ask("list its connections", PATIENCE, async |connection| {
            let path = "/org/freedesktop/DBus";
            let found =
                connection.call_method(Some(BUS), path, Some(BUS), "ListNames", &()).await?;
            let names: Vec<String> = found.body().deserialize()?;
            Ok(names.into_iter().filter(|name| name.starts_with(':')).collect())
        })
    }

    #[test]
    fn all_calls_share_one_connection_from_any_thread_and_below_a_runtime() {
        let test = "all_calls_share_one_connection_from_any_thread_and_below_a_runtime";
        let Some(daemon) = Daemon::start(test) else { return };
        let bus = daemon.bus();
        let first = connections(&bus).expect("asked");
        assert_eq!(first.len(), 1);
        thread::scope(|scope| {
            let ask = || connections(&bus).expect("asked");
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
            for thread in threads {
                assert_eq!(thread.join().expect("no panic"), first);
            }
        });
        let runtime = crate::runtime::build().expect("a runtime");
        runtime.block_on(async {
            // More than a task may do at a time (`tokio::task::coop`).
            for _ in 0..300 {
                assert_eq!(connections(&bus).expect("asked"), first);
            }
        });
    }

    #[test]
    fn connection_is_made_anew_after_the_bus_was_restarted() {
        let test = "connection_is_made_anew_after_the_bus_was_restarted";
        let Some(mut daemon) = Daemon::start(test) else { return };
        let bus = daemon.bus();
        connections(&bus).expect("asked");
        daemon.restart();
        let begun = Instant::now();
        // That the old one is closed is seen in a moment; a call that meets it fails, and is not sent twice.
        while connections(&bus).is_err() {
            assert!(begun.elapsed() < PATIENCE, "it stays closed");
        }
        assert_eq!(connections(&bus).expect("asked").len(), 1);
    }

    #[test]
    fn no_answer_within_the_limit_is_an_error_and_the_next_call_is_answered() {
        let test = "no_answer_within_the_limit_is_an_error_and_the_next_call_is_answered";
        let Some(daemon) = Daemon::start(test) else { return };
        let (bus, mute) = (daemon.bus(), daemon.bus());
        let name = "org.example.Mute";
        mute.ask("be there", PATIENCE, async |connection| connection.request_name(name).await)
            .expect("a name");
        let limit = Duration::from_millis(50);
        let late = bus.ask("hear it", limit, async |connection| {
            connection.call_method(Some(name), "/", Some(name), "Speak", &()).await.map(drop)
        });
        assert!(matches!(late, Err(SystemdError::Late { .. })), "{late:?}");
        assert_eq!(connections(&bus).expect("asked").len(), 2);
    }

    #[test]
    fn bus_that_is_not_there_is_an_error() {
        let bus = Bus { address: Some("unix:path=/nowhere/bus".to_owned()), ..Bus::new() };
        assert!(matches!(connections(&bus), Err(SystemdError::Reach(_))));
    }
}
