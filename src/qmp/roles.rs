//! Who is which thread: the replies to `query-cpus-fast` and `query-iothreads`, checked; and where the guest's memory
//! was bound, the reply to `query-memdev`.

use std::collections::HashSet;

use qapi::qmp::{CpuInfoFastBase, CpuInstanceProperties};
use serde::{Deserialize, Serialize};

use super::Limits;
use super::error::{QmpError, excerpt};
use super::memory::{self, Backend};
use super::wire::Pending;
use crate::ids::{IothreadId, Tid, VcpuIndex};

/// The longest iothread id taken, in bytes.
const IOTHREAD_ID_BYTES_MAX: usize = 256;

/// Where a vCPU sits in the guest's topology, as QEMU reports it to the guest (`CpuInstanceProperties` in
/// qapi/machine.json). `None` where QEMU says nothing: x86 gives a die only if there are several,
/// and a node only if NUMA is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct GuestPosition {
    /// The socket.
    pub socket: Option<u32>,
    /// The die in the socket.
    pub die: Option<u32>,
    /// The cluster in the die (Arm, RISC-V).
    pub cluster: Option<u32>,
    /// The module in the die (x86, QEMU 9.1 and later).
    pub module: Option<u32>,
    /// The core in the die, cluster or module.
    pub core: Option<u32>,
    /// The SMT thread in the core. Not a thread of the host.
    pub thread: Option<u32>,
    /// The guest's NUMA node.
    pub node: Option<u32>,
}

/// A vCPU and its host thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// QEMU's `cpu-index`.
    pub index: VcpuIndex,
    /// The host thread that runs it, as QEMU claims.
    pub tid: Tid,
    /// Where it sits in the guest.
    pub guest: GuestPosition,
}

/// An iothread and its host thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iothread {
    /// The id of its QEMU object.
    pub id: IothreadId,
    /// The host thread, as QEMU claims.
    pub tid: Tid,
}

/// All vCPUs and iothreads at one moment. Every thread is there once. That a thread belongs to QEMU
/// at all is *not* checked here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// The vCPUs, sorted by index; there may be holes.
    pub vcpus: Vec<Vcpu>,
    /// The iothreads made by the user, sorted by id.
    pub iothreads: Vec<Iothread>,
    /// vCPUs that QEMU reports beyond those that the VM was given, sorted by index. Their threads have no role.
    pub beyond: Vec<VcpuIndex>,
    /// The guest's memory, as QEMU claims; empty where it was not asked, or would not say.
    pub memory: Vec<Backend>,
}

/// The two members of an `IOThreadInfo` that matter. The type of the `qapi` crate wants all six.
#[derive(Deserialize)]
struct IothreadRow {
    id: String,
    #[serde(rename = "thread-id")]
    thread_id: i64,
}

impl Roles {
    /// Reads the replies, in the order of the queries.
    pub(super) fn read(answers: Vec<Pending>, limits: &Limits) -> Result<Roles, QmpError> {
        let mut answers = answers.into_iter();
        let mut next = || answers.next().ok_or(QmpError::WrongState { state: "out of step" });
        // `CpuInfoFastBase` knows no `target`, so an architecture of the future does not matter.
        let roles = Roles::check(next()?.read()?, next()?.read()?, limits)?;
        Ok(Roles { memory: answers.next().map(memory::read).unwrap_or_default(), ..roles })
    }

    fn check(
        cpus: Vec<CpuInfoFastBase>,
        iothreads: Vec<IothreadRow>,
        limits: &Limits,
    ) -> Result<Roles, QmpError> {
        if cpus.len() > limits.vcpus_max {
            return Err(QmpError::TooManyVcpus { count: cpus.len(), limit: limits.vcpus_max });
        }
        if iothreads.len() > limits.iothreads_max {
            let (count, limit) = (iothreads.len(), limits.iothreads_max);
            return Err(QmpError::TooManyIothreads { count, limit });
        }
        let mut vcpus = cpus
            .into_iter()
            .map(|row| vcpu(&row, limits))
            .collect::<Result<Vec<Vcpu>, QmpError>>()?;
        let mut iothreads =
            iothreads.into_iter().map(iothread).collect::<Result<Vec<Iothread>, QmpError>>()?;

        // QEMU lists vCPUs in the order of insertion and iothreads in that of its hash table.
        vcpus.sort_unstable_by_key(|vcpu| vcpu.index);
        iothreads.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        if let Some(index) = first_twin(&vcpus, |vcpu| &vcpu.index) {
            return Err(QmpError::DuplicateVcpu { index: *index });
        }
        if let Some(id) = first_twin(&iothreads, |iothread| &iothread.id) {
            return Err(QmpError::DuplicateIothread { id: id.clone() });
        }
        let tids = vcpus.iter().map(|vcpu| vcpu.tid).chain(iothreads.iter().map(|io| io.tid));
        let mut seen = HashSet::with_capacity(vcpus.len() + iothreads.len());
        for tid in tids {
            if !seen.insert(tid) {
                return Err(QmpError::DuplicateTid { tid });
            }
        }
        let named = limits.vcpus_named_max.unwrap_or(usize::MAX).min(vcpus.len());
        let beyond = vcpus.split_off(named).into_iter().map(|vcpu| vcpu.index).collect();
        Ok(Roles { vcpus, iothreads, beyond, memory: Vec::new() })
    }
}

fn first_twin<T, K: PartialEq>(sorted: &[T], key: impl Fn(&T) -> &K) -> Option<&K> {
    sorted.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])).map(|pair| key(&pair[0]))
}

fn vcpu(row: &CpuInfoFastBase, limits: &Limits) -> Result<Vcpu, QmpError> {
    let index = small("cpu-index", row.cpu_index)?;
    if usize::try_from(index).map_or(true, |index| index >= limits.vcpus_max) {
        return Err(QmpError::BadVcpuNumber { member: "cpu-index", value: row.cpu_index });
    }
    let tid = tid(row.thread_id, || format!("vCPU {index}"))?;
    let guest = row.props.as_ref().map_or(Ok(GuestPosition::default()), position)?;
    Ok(Vcpu { index: VcpuIndex(index), tid, guest })
}

fn iothread(row: IothreadRow) -> Result<Iothread, QmpError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if row.id.is_empty() || row.id.len() > IOTHREAD_ID_BYTES_MAX || !row.id.bytes().all(good) {
        return Err(QmpError::BadIothreadId { excerpt: excerpt(row.id.as_bytes()) });
    }
    let tid = tid(row.thread_id, || format!("iothread {}", row.id))?;
    Ok(Iothread { id: IothreadId(row.id), tid })
}

fn tid(number: i64, owner: impl FnOnce() -> String) -> Result<Tid, QmpError> {
    match i32::try_from(number) {
        Ok(tid) if tid > 0 => Ok(Tid(tid)),
        _ => Err(QmpError::BadTid { owner: owner(), tid: number }),
    }
}

fn small(member: &'static str, value: i64) -> Result<u32, QmpError> {
    u32::try_from(value).map_err(|_| QmpError::BadVcpuNumber { member, value })
}

fn position(props: &CpuInstanceProperties) -> Result<GuestPosition, QmpError> {
    let part = |member, value: Option<i64>| value.map(|value| small(member, value)).transpose();
    Ok(GuestPosition {
        socket: part("socket-id", props.socket_id)?,
        die: part("die-id", props.die_id)?,
        cluster: part("cluster-id", props.cluster_id)?,
        module: part("module-id", props.module_id)?,
        core: part("core-id", props.core_id)?,
        thread: part("thread-id (SMT)", props.thread_id)?,
        node: part("node-id", props.node_id)?,
    })
}
