//! *watch*: what wakes the supervisor because something may have changed. All of it is hints; the truth
//! is a new pass.
//!
//! ```text
//!   new_threads.rs  a thread of the VM was created   process connector, filtered in the kernel
//!   exit.rs     QEMU has ended                   pidfd
//!   leases.rs   another VM came or went          inotify on the state folder
//!   slow_timer.rs  nothing else has said so      timerfd
//! ```

mod exit;
mod leases;
mod new_threads;
mod slow_timer;

pub use exit::Exit;
pub use leases::LeaseChanges;
pub use new_threads::NewThreads;
pub use slow_timer::SlowTimer;
