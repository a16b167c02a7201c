//! What a host and a VM still cost, whatever qmpin does, and the command that fixes it.
//!
//! Each check has a file; those of the kernel's own settings read them through [`SysRoot`], the others are pure. A
//! check says what is fine, what costs, what is a choice with two sides, and what is not known. Advice never loses
//! something silently: what a command takes away is in the reason, and where that may be needed it is a choice.
//!
//! | check | what it looks at |
//! |---|---|
//! | `partition` | whether an isolated partition is possible |
//! | `irqbalance` | whether one runs that cannot be configured to exclude the VMs' CPUs |
//! | `rt-throttling` | whether real-time threads leave time to the kernel's own |
//! | `ksm` | whether the kernel merges equal pages of guests |
//! | `swap` | whether guests' memory is swapped |
//! | `huge-pages` | whether guests' memory is in huge pages |
//! | `halt-poll` | how long KVM polls before it gives up a CPU |
//! | `mitigations` | what of the CPU's weaknesses is mitigated |
//! | `sched-ext` | whether a BPF program schedules threads |
//! | `guest-cores` | whether the guest knows which of its vCPUs share a core of the host |
//! | `guest-caches` | whether it knows which share a cache |
//! | `guest-nodes` | whether its memory is on the nodes of its vCPUs |
//! | `cpu-flags` | CPU properties that Proxmox's interface lacks |
//! | `storage` | disks without an iothread |
//! | `config` | whether Proxmox's own configuration moves or throttles the VM |
//! | `channel` | whether QEMU is asked by visits of the socket that Proxmox needs, too |
//!
//! [`SysRoot`]: crate::sysroot::SysRoot

mod advice;
mod args_line;
mod cache;
mod channel;
mod config;
mod config_line;
mod cpu_flags;
mod cpu_type;
mod facts;
#[cfg(test)]
mod fixture;
mod halt_poll;
mod host;
mod ksm;
mod mitigations;
mod numa;
mod qemu;
mod read;
mod sched_ext;
mod smp;
mod storage;
mod swap;
mod thp;

pub use advice::{Advice, Health, Severity};
pub use facts::{Asked, HostFacts, Planner, VmFacts};

use cache::Fix;
use config_line::ConfigLine;
use qemu::Qemu;

/// Returns the results of all checks, those of the host first.
#[must_use]
pub fn advise(host: &HostFacts<'_>, vm: Option<&VmFacts<'_>>) -> Vec<Advice> {
    let root = host.root;
    let mut all = vec![host::partition(host), host::irqbalance(host), host::rt_throttling(host)];
    all.extend(ksm::advice(root, vm));
    all.extend(swap::advice(root, vm.map(|vm| (vm.vm, vm.process))));
    all.push(thp::advice(root, vm));
    all.push(halt_poll::advice(root));
    all.push(mitigations::advice(root));
    all.extend(sched_ext::advice(root));
    all.extend(vm.map(|vm| of_vm(host, vm)).unwrap_or_default());
    all
}

/// The checks of one VM. The options of QEMU's that several of them need are in one line `args:`.
fn of_vm(host: &HostFacts<'_>, vm: &VmFacts<'_>) -> Vec<Advice> {
    let topology = host.topology;
    let cores = smp::cores(topology, vm);
    let caches = cache::caches(topology, vm, cores.fits.as_ref(), Qemu::of(host.root));
    let better = match &caches.fix {
        Fix::Shape(shape) => Some(*shape),
        _ => cores.better(),
    };
    // Proxmox counts cores itself where it plugs vCPUs.
    let hotplug = better.and_then(|_| smp::cpu_hotplug(vm));
    let smp = better.filter(|_| hotplug.is_none());
    let flags = cpu_flags::flags(host.root, vm, smp.or(cores.now)).unwrap_or_default();
    let (channel, socket) = vm.asked.map(|asked| channel::channel(vm, asked)).unzip();
    let socket = socket.flatten();

    let smp = smp.map(smp::Shape::option);
    let machine = if let Fix::Option(option) = &caches.fix { Some(option) } else { None };
    let line = ConfigLine {
        vm,
        options: smp.iter().chain(machine).chain(&flags.option).chain(&socket).collect(),
        shows_l3: caches.fix == Fix::ShowL3,
    };
    let with_smp = |advice: Advice| match &hotplug {
        Some(why) => Advice { reason: format!("{}; {why}", advice.reason), ..advice },
        None => line.added(advice),
    };
    let mut all = Vec::new();
    all.push(if cores.better().is_some() { with_smp(cores.advice) } else { cores.advice });
    all.extend(smp::clash(vm));
    all.push(match caches.fix {
        Fix::Nothing => caches.advice,
        Fix::Shape(_) => with_smp(caches.advice),
        Fix::Option(_) | Fix::ShowL3 => line.added(caches.advice),
    });
    all.extend(caches.sizes);
    all.extend(numa::nodes(topology, vm));
    all.extend(flags.topoext.map(|advice| line.added(advice)));
    all.extend(flags.others);
    all.extend(storage::storage(vm));
    all.extend(vm.config.iter().flat_map(|read| config::config(topology, vm.vm, read)));
    all.extend(channel.map(|advice| if socket.is_some() { line.added(advice) } else { advice }));
    all
}

#[cfg(test)]
mod tests;
