//! Translates thread numbers of a QEMU in a PID namespace: QMP reports the numbers inside the namespace, and system
//! calls of qmpin take those outside. The kernel shows both (`NSpid` in `/proc/PID/status`, proc_pid_status(5)).
//!
//! ```text
//!   NSpid:  25073           one number: the process is in our namespace
//!   NSpid:  25075   7       ours, then one for each namespace below; QMP reports the last
//! ```

use std::collections::BTreeMap;

use super::tasks::{self, TasksError};
use crate::ids::{Pid, Tid};
use crate::qmp::Roles;
use crate::sysroot::SysRoot;
use crate::threads::Role;

/// Returns the roles with the numbers that the process's threads have in our namespace.
///
/// # Errors
/// [`TasksError`]: QEMU named a thread that is not its own, or its threads could not be listed.
pub fn in_our_numbers(root: &SysRoot, pid: Pid, mut roles: Roles) -> Result<Roles, TasksError> {
    if numbers(root, pid, pid.main_thread()).is_none_or(|numbers| numbers.len() < 2) {
        return Ok(roles);
    }
    let ours: BTreeMap<Tid, Tid> = tasks::list(root, pid)?
        .into_iter()
        .filter_map(|tid| Some((*numbers(root, pid, tid)?.last()?, tid)))
        .collect();
    let our = |role: Role, tid: Tid| {
        let unknown = || TasksError::not_its_thread(&role, tid, pid);
        ours.get(&tid).copied().ok_or_else(unknown)
    };
    for vcpu in &mut roles.vcpus {
        vcpu.tid = our(Role::Vcpu(vcpu.index), vcpu.tid)?;
    }
    for iothread in &mut roles.iothreads {
        iothread.tid = our(Role::Iothread(iothread.id.clone()), iothread.tid)?;
    }
    Ok(roles)
}

/// A thread's numbers, from our namespace down to its own; `None` where the kernel does not say.
fn numbers(root: &SysRoot, pid: Pid, tid: Tid) -> Option<Vec<Tid>> {
    let status = root.read_lossy(&format!("proc/{pid}/task/{tid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().map(|number| number.parse().ok().map(Tid)).collect()
}
