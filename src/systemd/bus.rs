//! The connection to the system bus: one for the process, made by the first call and kept.
//!
//! ```text
//!   any thread: ask ── waits for the answer, at most as long as the limit ──▶ connection ◀── thread qmpin-bus
//! ```
//!
//! The thread `qmpin-bus` reads and writes the socket. It sleeps while no call is under way: without match rules the
//! bus sends nothing else. It takes 100 KiB, so it is kept. A connection that was closed, as when the bus is restarted,
//! is made anew by the next call. No call is sent twice.
//!
//! The connection is kept after a call that was late: what systemd reads late it then reads in the order in which it
//! was asked for, and the last of two `AllowedCPUs=` holds. A call that is given up leaves no half of a message: the
//! kernel takes one of less than 30 kB whole or not at all (`unix_stream_sendmsg`), and none here has 2 kB.

use std::future::{Future, pending};
use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::task::{unconstrained, yield_now};
use zbus::Connection;

use super::SystemdError;

/// A bus, and the connection to it.
pub(crate) struct Bus {
    /// Where it is; `None`: the system bus.
    address: Option<String>,
    /// The runtime of the thread, once there is one.
    runtime: std::sync::Mutex<Option<Handle>>,
    connection: Mutex<Option<Connection>>,
}

/// The system bus.
pub(crate) static SYSTEM: Bus = Bus::new();

impl Bus {
    const fn new() -> Bus {
        let runtime = std::sync::Mutex::new(None);
        Bus { address: None, runtime, connection: Mutex::const_new(None) }
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
        wait_for(tokio::time::timeout(limit, answer))
            .unwrap_or_else(|_| Err(SystemdError::Late { what: what.to_owned(), limit }))
    }

    /// Returns the connection, or a new one where there is none or the bus has closed it.
    async fn connection(&self) -> zbus::Result<Connection> {
        let mut known = self.connection.lock().await;
        if known.is_some() {
            // The thread polls the socket before it runs this to its end. So a bus that has ended by now is seen here,
            // and not by the call. The result says only that the thread lives.
            let _ = tokio::spawn(yield_now()).await;
        }
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
    fn runtime(&self) -> Result<Handle, SystemdError> {
        let mut known = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let runtime = crate::runtime::build().map_err(SystemdError::Thread)?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name("qmpin-bus".to_owned())
            .spawn(move || runtime.block_on(pending::<()>()))
            .map_err(SystemdError::Thread)?;
        Ok(known.insert(handle).clone())
    }
}

/// Wakes the thread that waits.
struct Waiting(Thread);

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future in this thread. Unlike a runtime's `block_on` it may be called below one, and so the future does
/// not count in the budget of the task that it is called in.
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
mod tests;
