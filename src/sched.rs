//! The seam for what is not a file: affinity and scheduling calls. One small trait, the kernel behind
//! it, and in tests a table.

use std::io;
use std::num::NonZeroU64;

use nix::libc::SCHED_RESET_ON_FORK;
use rustix::process::Pid as RustixPid;
use rustix::thread::{
    CoreSchedulingScope, CpuSet as RustixCpuSet, core_scheduling_cookie,
    create_core_scheduling_cookie, gettid, pull_core_scheduling_cookie,
    push_core_scheduling_cookie, sched_getaffinity, sched_setaffinity,
};

use crate::cpuset::CpuSet;
use crate::ids::{CPUS_MAX, CpuId, KTHREADD, Pid, Tid};
use crate::scheduling::{Class, Cookie, OnFork, Scheduling};
use crate::sys;

/// Whether the error says that the thread has ended.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ESRCH)
}

/// Reads and writes threads' affinity masks, and how they are scheduled.
pub trait Sched {
    /// The CPUs a thread may run on. The kernel leaves offline CPUs out
    /// (`kernel/sched/syscalls.c: sched_getaffinity`).
    ///
    /// # Errors
    /// `ESRCH` where there is no such thread.
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet>;

    /// Sets the CPUs a thread may run on.
    ///
    /// # Errors
    /// `ESRCH` where there is no such thread, `EPERM` without the right, `EINVAL` where no CPU of the
    /// set is online and allowed by the thread's cpuset.
    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()>;

    /// How a thread is scheduled. A stand-in for the kernel need not know.
    ///
    /// # Errors
    /// `ESRCH` where there is no such thread; `InvalidData` for a policy that is not known here.
    fn scheduling(&self, _tid: Tid) -> io::Result<Scheduling> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Changes how a thread is scheduled. Its nice value stays
    /// (`kernel/sched/syscalls.c: _sched_setscheduler`).
    ///
    /// # Errors
    /// `ESRCH` where there is no such thread; `EPERM` without the right, or where its group is given no
    /// real-time at all (`Documentation/scheduler/sched-rt-group.rst`); `EINVAL` for a deadline.
    fn set_scheduling(&self, _tid: Tid, _to: Scheduling) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A thread's core-scheduling cookie (`PR_SCHED_CORE_GET`); `None`: it has none.
    ///
    /// # Errors
    /// `EINVAL` where the kernel has no core scheduling, `ENODEV` where the machine has no SMT
    /// (`kernel/sched/core_sched.c`); `ESRCH` where there is no such thread.
    fn cookie(&self, _tid: Tid) -> io::Result<Option<Cookie>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives all threads of a process one new cookie (`PR_SCHED_CORE_CREATE`). One that is being made just
    /// then may miss it.
    ///
    /// # Errors
    /// As [`Sched::cookie`]; `EPERM` without the right.
    fn make_cookie(&self, _process: Pid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes a thread's cookie from it (`PR_SCHED_CORE_SHARE_TO`, of one that has none).
    ///
    /// # Errors
    /// As [`Sched::make_cookie`].
    fn clear_cookie(&self, _tid: Tid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The kernel qmpin runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel;

impl Sched for Kernel {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        let mask = sched_getaffinity(raw(tid)?)?;
        // It is done for every thread in every pass, so it ends with the last CPU that is set.
        let set = (0..CPUS_MAX).filter(|cpu| mask.is_set(*cpu)).take(mask.count() as usize);
        Ok(set.filter_map(CpuId::from_index).collect())
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        let mut mask = RustixCpuSet::new();
        for cpu in cpus.iter() {
            mask.set(cpu.index());
        }
        Ok(sched_setaffinity(raw(tid)?, &mask)?)
    }

    fn scheduling(&self, tid: Tid) -> io::Result<Scheduling> {
        let (found, priority) = sys::scheduler(some(tid)?.as_raw_pid())?;
        // The flag comes with the number (`kernel/sched/syscalls.c: sys_sched_getscheduler`).
        let number = found & !SCHED_RESET_ON_FORK;
        let unknown = || io::Error::new(io::ErrorKind::InvalidData, format!("policy {number}"));
        Ok(Scheduling {
            class: Class::from_number(number).ok_or_else(unknown)?,
            priority: u8::try_from(priority).unwrap_or_default(),
            on_fork: if number == found { OnFork::Inherit } else { OnFork::Reset },
        })
    }

    fn set_scheduling(&self, tid: Tid, to: Scheduling) -> io::Result<()> {
        let flag = match to.on_fork {
            OnFork::Inherit => 0,
            OnFork::Reset => SCHED_RESET_ON_FORK,
        };
        sys::set_scheduler(some(tid)?.as_raw_pid(), to.class.number() | flag, to.priority.into())
    }

    fn cookie(&self, tid: Tid) -> io::Result<Option<Cookie>> {
        let cookie = core_scheduling_cookie(some(tid)?, CoreSchedulingScope::Thread)?;
        Ok(NonZeroU64::new(cookie).map(Cookie))
    }

    fn make_cookie(&self, process: Pid) -> io::Result<()> {
        let group = some(process.main_thread())?;
        Ok(create_core_scheduling_cookie(group, CoreSchedulingScope::ThreadGroup)?)
    }

    fn clear_cookie(&self, tid: Tid) -> io::Result<()> {
        let to = some(tid)?;
        let own = || core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread);
        let give = || push_core_scheduling_cookie(to, CoreSchedulingScope::Thread);
        if own()? == 0 {
            return Ok(give()?);
        }
        // The process that started us has given us one. To be without, a thread for that alone takes after the
        // parent of all kernel threads, which has none.
        let without = || -> io::Result<()> {
            pull_core_scheduling_cookie(some(KTHREADD)?, CoreSchedulingScope::Thread)?;
            if own()? != 0 {
                return Err(io::Error::other(
                    "qmpin has a cookie of its own and cannot put it down",
                ));
            }
            Ok(give()?)
        };
        let ended = std::thread::scope(|scope| scope.spawn(without).join());
        ended.unwrap_or_else(|_| Err(io::Error::other("a thread of qmpin's has panicked")))
    }
}

/// 0 would be the calling thread.
fn some(tid: Tid) -> io::Result<RustixPid> {
    raw(tid)?.ok_or_else(|| io::Error::from_raw_os_error(nix::libc::ESRCH))
}

/// `None` is the calling thread, as 0 is for the kernel.
fn raw(tid: Tid) -> io::Result<Option<RustixPid>> {
    if tid.0 < 0 {
        return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
    }
    Ok(RustixPid::from_raw(tid.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_thread() -> Tid {
        Tid(nix::unistd::gettid().as_raw())
    }

    #[test]
    fn what_is_set_is_read_back_and_children_have_none_of_it() {
        // What any user may do to an own thread, but not undo; so it is a thread for that alone.
        let of_child = std::thread::spawn(|| {
            let batch = Scheduling { class: Class::Batch, priority: 0, on_fork: OnFork::Reset };
            assert_eq!(Kernel.scheduling(this_thread()).expect("read"), Scheduling::OTHER);
            Kernel.set_scheduling(this_thread(), batch).expect("set");
            assert_eq!(Kernel.scheduling(this_thread()).expect("read"), batch);
            std::thread::spawn(|| Kernel.scheduling(this_thread()).expect("read")).join()
        });
        let child = of_child.join().expect("ended").expect("ended");
        assert_eq!(child.on_fork, OnFork::Inherit, "{child:?}");
    }

    #[test]
    fn no_thread_is_no_thread_and_not_this_one() {
        for tid in [0, -1, i32::MAX] {
            let gone = |error: io::Error| is_gone(&error);
            assert!(Kernel.scheduling(Tid(tid)).is_err_and(gone), "{tid}");
            assert!(Kernel.set_scheduling(Tid(tid), Scheduling::OTHER).is_err_and(gone), "{tid}");
        }
    }
}
