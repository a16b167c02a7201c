//! *watch*: what wakes the supervisor because something may have changed. All of it is hints; the truth
//! is a fresh look.
//!
//! ```text
//!   births.rs   a thread of the VM was created   process connector, filtered in the kernel
//!   exit.rs     QEMU has ended                   pidfd
//!   leases.rs   another VM came or went          inotify on the state folder
//!   slow_timer.rs  nothing else has said so      timerfd
//! ```

mod births;
mod exit;
mod leases;
mod readable;
mod slow_timer;

pub use births::Births;
pub use exit::Exit;
pub use leases::LeaseChanges;
pub use slow_timer::SlowTimer;
