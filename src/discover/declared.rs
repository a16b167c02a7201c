//! The guest that a VM's Proxmox configuration declares: what QEMU would report once it is started
//! (`PVE/QemuServer.pm: config_to_command`, `PVE/QemuServer/Memory.pm`).
//!
//! ```text
//!   sockets, cores          vCPU i is core i % cores of socket i / cores, one thread each
//!   args: -smp ...          QEMU merges it with Proxmox's own, and its values count
//!   vcpus                   the first so many of them
//!   numa: 1, numaN          guest nodes with cpus=, memory=, hostnodes=; without numaN each socket is one
//! ```

use std::collections::BTreeMap;

use super::config_memory::{ConfigNode, VCPUS_MAX, config_nodes, has_iothread, memory_mib};
use super::devices;
use super::proxmox_config::{config_lines, is_numbered};
use crate::devices::Device;
use crate::guest::{Guest, GuestMemory, GuestVcpu};
use crate::ids::{IothreadId, VcpuIndex, VmName};
use crate::sysroot::SysRoot;

const MIB: u64 = 1 << 20;

/// Reads the guest that the VM would be, if it were started now.
///
/// # Errors
/// Why that cannot be known, in words with the path.
pub fn declared_guest(root: &SysRoot, vm: &VmName) -> Result<Guest, String> {
    let lines = config_lines(root, vm)?;
    guest(&lines).map_err(|why| format!("{}: {why}", super::proxmox_config_path(vm)))
}

/// Reads the devices that it would have for itself; none where its configuration cannot be read.
#[must_use]
pub fn declared_devices(root: &SysRoot, vm: &VmName) -> Vec<Device> {
    config_lines(root, vm).map(|lines| devices::declared(root, &lines)).unwrap_or_default()
}

/// The guest's cores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Smp {
    vcpus: u32,
    sockets: u32,
    /// In a socket; Proxmox itself has one in each.
    dies: u32,
    /// In a die.
    cores: u32,
    threads: u32,
}

fn guest(lines: &BTreeMap<String, String>) -> Result<Guest, String> {
    let smp = smp(lines)?;
    let nodes = config_nodes(lines)?;
    let per_die = smp.cores * smp.threads;
    let per_socket = smp.dies * per_die;
    let is_numa = lines.get("numa").is_some_and(|numa| numa == "1");
    let node_of = |index: u32| match (is_numa, nodes.is_empty()) {
        (false, _) => None,
        (true, true) => Some(index / per_socket),
        (true, false) => {
            let has = |node: &&ConfigNode| node.vcpus.contains(&index);
            nodes.iter().find(has).map(|node| node.number)
        }
    };
    let vcpu = |index: u32| GuestVcpu {
        index: VcpuIndex(index),
        node: node_of(index),
        socket: Some(index / per_socket),
        die: (smp.dies > 1).then_some(index % per_socket / per_die),
        cluster: None,
        core: Some(index % per_die / smp.threads),
        thread: Some(index % smp.threads),
    };
    let memory = if is_numa && !nodes.is_empty() {
        let piece = |node: &ConfigNode| GuestMemory {
            guest_node: Some(node.number),
            bytes: node.memory_mib.saturating_mul(MIB),
            bound: node.on.iter().copied().collect(),
        };
        nodes.iter().map(piece).collect()
    } else {
        let bytes = memory_mib(lines)?.saturating_mul(MIB);
        vec![GuestMemory { guest_node: None, bytes, bound: Vec::new() }]
    };
    Ok(Guest {
        vcpus: (0..smp.vcpus).map(vcpu).collect(),
        iothreads: iothreads(lines),
        beyond: Vec::new(),
        memory,
    })
}

fn smp(lines: &BTreeMap<String, String>) -> Result<Smp, String> {
    let number = |key: &str, default: u32| match lines.get(key) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .ok()
            .filter(|number| (1..=VCPUS_MAX).contains(number))
            .ok_or_else(|| format!("{key}: {text} is no number from 1 to {VCPUS_MAX}")),
    };
    let (sockets, cores) = (number("sockets", 1)?, number("cores", 1)?);
    let mut smp = Smp { vcpus: 0, sockets, dies: 1, cores, threads: 1 };
    let mut wanted = match lines.get("vcpus") {
        None => None,
        Some(_) => Some(number("vcpus", 1)?),
    };
    let args = lines.get("args").map_or("", String::as_str);
    let mut words = args.split_ascii_whitespace();
    while let Some(word) = words.next() {
        if word != "-smp" && word != "--smp" {
            continue;
        }
        for (at, part) in words.next().unwrap_or_default().split(',').enumerate() {
            let (key, value) = part.split_once('=').unwrap_or(("cpus", part));
            let of = |value: &str| {
                let number = value.parse().ok().filter(|number| (1..=VCPUS_MAX).contains(number));
                number.ok_or_else(|| format!("args: -smp {key}={value} is no number of CPUs"))
            };
            match key {
                "cpus" if at == 0 || part.contains('=') => wanted = Some(of(value)?),
                "sockets" => smp.sockets = of(value)?,
                "dies" => smp.dies = of(value)?,
                "cores" => smp.cores = of(value)?,
                "threads" => smp.threads = of(value)?,
                _ => {}
            }
        }
    }
    let more = [smp.dies, smp.cores, smp.threads];
    let all = more.into_iter().try_fold(smp.sockets, u32::checked_mul);
    let all = all.filter(|all| *all <= VCPUS_MAX);
    let all = all.ok_or_else(|| format!("it declares more than {VCPUS_MAX} vCPUs"))?;
    smp.vcpus = wanted.unwrap_or(all).min(all);
    Ok(smp)
}

/// Disks with `iothread=1`: one for each on `virtio-scsi-single`, and one for each `virtioN`.
fn iothreads(lines: &BTreeMap<String, String>) -> Vec<IothreadId> {
    let is_single = lines.get("scsihw").is_some_and(|kind| kind == "virtio-scsi-single");
    let id = |(key, text): (&String, &String)| {
        let digits = |name: &str| key.strip_prefix(name).filter(|_| is_numbered(key, name));
        let id = match (digits("scsi"), digits("virtio")) {
            (Some(number), _) if is_single => format!("iothread-virtioscsi{number}"),
            (None, Some(number)) => format!("iothread-virtio{number}"),
            _ => return None,
        };
        has_iothread(text).then_some(IothreadId(id))
    };
    lines.iter().filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::super::proxmox_config::lines_of;
    use super::*;

    fn of(text: &str) -> Result<Guest, String> {
        guest(&lines_of(text))
    }

    /// Each vCPU as node, socket, core and thread.
    fn places(text: &str) -> Vec<(Option<u32>, u32, u32, u32)> {
        let place = |vcpu: &GuestVcpu| {
            let known = |part: Option<u32>| part.expect("known");
            (vcpu.node, known(vcpu.socket), known(vcpu.core), known(vcpu.thread))
        };
        of(text).expect("a guest").vcpus.iter().map(place).collect()
    }

    #[test]
    fn vcpus_are_numbered_core_by_core() {
        assert_eq!(places(""), [(None, 0, 0, 0)]);
        let two = [(None, 0, 0, 0), (None, 0, 1, 0), (None, 1, 0, 0), (None, 1, 1, 0)];
        assert_eq!(places("sockets: 2\ncores: 2\n"), two);
        assert_eq!(places("sockets: 2\ncores: 2\nvcpus: 3\n"), two[..3]);
        let siblings = [(None, 0, 0, 0), (None, 0, 0, 1), (None, 0, 1, 0), (None, 0, 1, 1)];
        assert_eq!(places("cores: 4\nargs: -k de -smp 4,cores=2,threads=2\n"), siblings);
        let dies =
            of("cores: 8\nargs: -smp 8,sockets=1,dies=2,cores=2,threads=2\n").expect("a guest");
        let dies: Vec<_> =
            dies.vcpus.iter().map(|vcpu| (vcpu.die, vcpu.core, vcpu.thread)).collect();
        assert_eq!(dies.len(), 8);
        assert_eq!(dies[3], (Some(0), Some(1), Some(1)));
        assert_eq!(dies[4], (Some(1), Some(0), Some(0)));
        // What waits for the next start, and snapshots, are not what is started.
        assert_eq!(places("cores: 1\n[PENDING]\ncores: 4\n[old]\ncores: 8\n").len(), 1);
    }

    #[test]
    fn nodes_have_their_vcpus_and_memory() {
        let text = "cores: 4\nmemory: 4096\nnuma: 1\n\
                    numa0: cpus=0-1,hostnodes=1,memory=1024,policy=bind\nnuma1: cpus=2;3,memory=3072\n";
        let nodes: Vec<Option<u32>> = places(text).into_iter().map(|place| place.0).collect();
        assert_eq!(nodes, [Some(0), Some(0), Some(1), Some(1)]);
        let memory = of(text).expect("a guest").memory;
        let memory: Vec<_> = memory
            .iter()
            .map(|piece| (piece.guest_node, piece.bytes >> 20, piece.bound.len()))
            .collect();
        assert_eq!(memory, [(Some(0), 1024, 1), (Some(1), 3072, 0)]);
        let off = of(&text.replace("numa: 1", "numa: 0")).expect("a guest");
        assert_eq!((off.vcpus[3].node, off.memory[0].bytes >> 20), (None, 4096));
        let sockets = places("sockets: 2\ncores: 1\nnuma: 1\n");
        assert_eq!((sockets[0].0, sockets[1].0), (Some(0), Some(1)));
        assert_eq!(of("memory: current=2048\n").expect("a guest").memory[0].bytes >> 20, 2048);
    }

    #[test]
    fn disks_with_an_iothread_have_one() {
        let text = "scsihw: virtio-scsi-single\nscsi0: local:vm-100-disk-0,iothread=1,size=8G\n\
                    scsi1: local:vm-100-disk-1,size=8G\nvirtio2: local:vm-100-disk-2,iothread=1\n";
        let ids = |text: &str| -> Vec<String> {
            of(text).expect("a guest").iothreads.into_iter().map(|id| id.0).collect()
        };
        assert_eq!(ids(text), ["iothread-virtioscsi0", "iothread-virtio2"]);
        assert_eq!(ids(&text.replace("-single", "-pci")), ["iothread-virtio2"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, words) in [
            ("cores: many\n", "cores: many"),
            ("cores: 0\n", "cores: 0"),
            ("sockets: 4096\ncores: 4096\n", "more than 4096 vCPUs"),
            ("vcpus: -1\n", "vcpus: -1"),
            ("memory: much\n", "memory: much"),
            ("numa: 1\nnuma0: cpus=3-1\n", "numa0: cpus=3-1"),
            ("args: -smp threads=x\n", "-smp threads=x"),
        ] {
            let error = of(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
