//! The threads of a VM, as everything after discovery speaks of them. A word: no I/O.

use crate::shown;
use serde::Serialize;

use crate::ids::{IothreadId, Pid, StartTicks, Tid, VcpuIndex};
use crate::mask::Mask;

/// What a thread is for. vCPUs and iothreads are known from QMP alone; the rest is distinguished by
/// `/proc`, for display, and treated alike.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Runs a guest CPU.
    Vcpu(VcpuIndex),
    /// Runs the I/O of one or more disks.
    Iothread(IothreadId),
    /// The main loop, or anything else of QEMU's own.
    Emulator,
    /// A short-lived helper: the thread pool, io_uring workers, KVM's page recovery.
    Worker,
    /// Moves packets or blocks in the kernel, inside the process or (Linux < 6.4) beside it.
    Vhost,
    /// A kernel thread of this VM outside its process, such as `kvm-pit/PID`.
    Kernel,
}

impl Role {
    /// The role's name in `qmpin.threads/1`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Role::Vcpu(_) => "vcpu",
            Role::Iothread(_) => "iothread",
            Role::Emulator => "emulator",
            Role::Worker => "worker",
            Role::Vhost => "vhost",
            Role::Kernel => "kernel",
        }
    }
}

/// One thread, named for good by its number and start.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, serde::Deserialize,
)]
pub struct ThreadKey {
    /// Its number.
    pub tid: Tid,
    /// When it started.
    pub start: StartTicks,
}

/// One process, named for good by its number and start.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, serde::Deserialize,
)]
pub struct ProcessKey {
    /// Its number.
    pub pid: Pid,
    /// When it started.
    pub start: StartTicks,
}

/// A thread as it was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thread {
    /// Which thread.
    pub key: ThreadKey,
    /// What it is for.
    pub role: Role,
    /// Its name, for display only.
    pub comm: String,
    /// The CPUs it may run on: `sched_getaffinity(2)`, so online CPUs only.
    pub allowed: Mask,
    /// The CPU it last ran on.
    pub last_cpu: Option<u32>,
}

/// `vCPU 3 (tid 533, CPU 3/KVM)`: a thread in a sentence. An empty name is left out.
#[must_use]
pub fn thread_in_words(tid: Tid, role: &Role, comm: &str) -> String {
    let who = match role {
        Role::Vcpu(index) => format!("vCPU {index}"),
        Role::Iothread(id) => format!("iothread {}", shown::line(&id.0)),
        Role::Kernel => "kernel thread".to_owned(),
        Role::Emulator | Role::Worker | Role::Vhost => role.name().to_owned(),
    };
    if comm.is_empty() {
        return format!("{who} (tid {tid})");
    }
    format!("{who} (tid {tid}, {})", shown::line(comm))
}
