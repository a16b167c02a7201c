//! Guests as QEMU describes them, from a few numbers.

use qmpin::guest::{Guest, GuestVcpu};
use qmpin::ids::{IothreadId, VcpuIndex};

/// A guest whose vCPUs are numbered core by core, the cores dealt out over its nodes in order.
/// `gone` are vCPUs that are not plugged.
pub(crate) fn guest(vcpus: u32, threads: u32, nodes: u32, gone: &[u32]) -> Guest {
    let cores = vcpus.div_ceil(threads);
    let vcpu = |index: u32| {
        let core = index / threads;
        GuestVcpu {
            index: VcpuIndex(index),
            node: (nodes > 0).then(|| core * nodes / cores.max(1)),
            socket: Some(0),
            die: None,
            cluster: None,
            core: Some(core),
            thread: Some(index % threads),
        }
    };
    let vcpus = (0..vcpus).filter(|index| !gone.contains(index)).map(vcpu).collect();
    Guest { vcpus, iothreads: Vec::new(), beyond: Vec::new(), memory: Vec::new() }
}

pub(crate) fn with_iothreads(mut guest: Guest, ids: &[String]) -> Guest {
    guest.iothreads = ids.iter().cloned().map(IothreadId).collect();
    guest
}
