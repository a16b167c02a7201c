//! The seam for what is not a file: affinity calls. One small trait, the kernel behind it, and in
//! tests a table.

use std::io;

use nix::sched::{CpuSet as NixCpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid as NixPid;

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
        let mask = sched_getaffinity(NixPid::from_raw(tid.0))?;
        let is_set = |cpu: &CpuId| mask.is_set(cpu.index()).unwrap_or(false);
        Ok((0..CPUS_MAX).filter_map(CpuId::from_index).filter(is_set).collect())
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        let mut mask = NixCpuSet::new();
        for cpu in cpus.iter() {
            mask.set(cpu.index())?;
        }
        Ok(sched_setaffinity(NixPid::from_raw(tid.0), &mask)?)
    }
}
