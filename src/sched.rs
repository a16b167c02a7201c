//! The seam for what is not a file: affinity calls. One small trait, the kernel behind it, and in
//! tests a table.

use std::io;

use rustix::thread::{CpuSet as RustixCpuSet, sched_getaffinity, sched_setaffinity};

use crate::cpuset::{CPUS_MAX, CpuSet};
use crate::ids::{CpuId, Tid};

/// Reads and writes threads' affinity masks.
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
}

/// The kernel qmpin runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel;

impl Sched for Kernel {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        let mask = sched_getaffinity(raw(tid)?)?;
        // It is done for every thread at every look, so it ends with the last CPU that is set.
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
}

/// `None` is the calling thread, as 0 is for the kernel.
fn raw(tid: Tid) -> io::Result<Option<rustix::process::Pid>> {
    if tid.0 < 0 {
        return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
    }
    Ok(rustix::process::Pid::from_raw(tid.0))
}
