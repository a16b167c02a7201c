//! Reads the core-scheduling cookies of threads.

use crate::knobs::core_scheduling::plan::{Cookies, NoCookies};
use crate::sched::{Sched, is_gone};
use crate::threads::Thread;

/// The cookies of threads; one that has ended has none.
///
/// # Errors
/// [`NoCookies`] (`kernel/sched/core_sched.c`: EINVAL where it is not built, ENODEV without SMT).
pub fn cookies(sched: &dyn Sched, threads: &[Thread]) -> Result<Cookies, NoCookies> {
    let mut cookies = Cookies::new();
    for thread in threads {
        match sched.cookie(thread.key.tid) {
            Ok(cookie) => {
                cookies.insert(thread.key, cookie);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                return Err(match error.raw_os_error() {
                    Some(nix::libc::EINVAL) => NoCookies::NotBuilt,
                    Some(nix::libc::ENODEV) => NoCookies::NoSmt,
                    _ => NoCookies::Failed(error.to_string()),
                });
            }
        }
    }
    Ok(cookies)
}
