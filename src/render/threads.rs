//! The thread map: the document `qmpin.threads/1`, and a table.

use serde::Serialize;

use super::table::table;
use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, Pid, Tid, VcpuIndex, VmName};
use crate::qmp::{ChannelKind, Roles};
use crate::threads::{Role, Thread};

/// `threads --json`. The contract is in ARCHITECTURE.md.
#[derive(Debug, Serialize)]
pub struct ThreadsDocument {
    schema: &'static str,
    vm: VmName,
    pid: Pid,
    channel: ChannelKind,
    threads: Vec<ThreadRow>,
}

#[derive(Debug, Serialize)]
struct ThreadRow {
    tid: Tid,
    role: &'static str,
    vcpu: Option<VcpuIndex>,
    iothread: Option<IothreadId>,
    guest: Option<Position>,
    comm: String,
    allowed_cpus: CpuSet,
    last_cpu: Option<u32>,
}

#[derive(Debug, Serialize)]
struct Position {
    socket: Option<u32>,
    die: Option<u32>,
    core: Option<u32>,
    thread: Option<u32>,
    node: Option<u32>,
}

impl ThreadsDocument {
    /// Puts the threads in order: by role, then by index, id or number.
    #[must_use]
    pub fn new(
        vm: &VmName,
        pid: Pid,
        channel: ChannelKind,
        roles: &Roles,
        mut threads: Vec<Thread>,
    ) -> ThreadsDocument {
        threads.sort_by(|a, b| (&a.role, a.key.tid).cmp(&(&b.role, b.key.tid)));
        let rows = threads.into_iter().map(|thread| {
            let (vcpu, iothread) = match &thread.role {
                Role::Vcpu(index) => (Some(*index), None),
                Role::Iothread(id) => (None, Some(id.clone())),
                _ => (None, None),
            };
            let guest = vcpu.and_then(|index| {
                let vcpu = roles.vcpus.iter().find(|vcpu| vcpu.index == index)?;
                Some(Position {
                    socket: vcpu.guest.socket,
                    die: vcpu.guest.die,
                    core: vcpu.guest.core,
                    thread: vcpu.guest.thread,
                    node: vcpu.guest.node,
                })
            });
            ThreadRow {
                tid: thread.key.tid,
                role: thread.role.name(),
                vcpu,
                iothread,
                guest,
                comm: thread.comm,
                allowed_cpus: *thread.allowed,
                last_cpu: thread.last_cpu,
            }
        });
        ThreadsDocument {
            schema: "qmpin.threads/1",
            vm: vm.clone(),
            pid,
            channel,
            threads: rows.collect(),
        }
    }

    /// The table for a terminal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let channel = match self.channel {
            ChannelKind::Lease => "a lease",
            ChannelKind::Socket => "its own socket",
            ChannelKind::RuntimeMonitor => "a runtime monitor",
        };
        let mut rows = vec![["TID", "ROLE", "GUEST", "CPUS", "LAST", "NAME"].map(str::to_owned)];
        rows.extend(self.threads.iter().map(|thread| {
            let role = match (thread.vcpu, &thread.iothread) {
                (Some(index), _) => format!("vcpu {index}"),
                (None, Some(id)) => format!("iothread {id}"),
                (None, None) => thread.role.to_owned(),
            };
            [
                thread.tid.to_string(),
                role,
                thread.guest.as_ref().map_or(String::new(), Position::in_short),
                thread.allowed_cpus.to_string(),
                thread.last_cpu.map_or(String::new(), |cpu| cpu.to_string()),
                thread.comm.clone(),
            ]
        }));
        format!("VM {}, process {}, asked over {channel}\n{}", self.vm, self.pid, table(&rows))
    }
}

impl Position {
    /// `s0 c1 t0`: what QEMU says, and no more.
    fn in_short(&self) -> String {
        let parts = [
            ("n", self.node),
            ("s", self.socket),
            ("d", self.die),
            ("c", self.core),
            ("t", self.thread),
        ];
        let parts: Vec<String> =
            parts.iter().filter_map(|(letter, id)| id.map(|id| format!("{letter}{id}"))).collect();
        parts.join(" ")
    }
}
