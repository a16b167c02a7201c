//! `qmpin doctor`: what the host, and a VM, still cost, and the exact command that fixes it.

use std::collections::BTreeMap;

use super::args::{DoctorArgs, Global};
use super::look::look;
use super::{Answer, output};
use crate::cgroups::CgroupTree;
use crate::check::doctor::{Asked, HostFacts, VmFacts, advise};
use crate::discover::{
    VmLocation, cgroup, channel_paths, guest, proxmox_config, read_topology, rt_throttling,
};
use crate::error::Failure;
use crate::ids::{Pid, VmName};
use crate::knobs::host::irqbalance::read::irqbalances;
use crate::leases::StateDir;
use crate::qmp::ChannelKind;
use crate::render::DoctorDocument;
use crate::standing::read_standing;
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &DoctorArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let topology = read_topology(&root)?;
    let cgroups = CgroupTree::of(&root);
    let vm = args.vm.as_ref().map(|vm| of_vm(global, args, vm, &root)).transpose()?;
    let (qemu, vm) = vm.unzip();
    let partition = match qemu {
        Some(pid) => cgroup::partition_site(&root, &cgroups, pid).map(|_| ()),
        None => cgroup::can_partition(&root, &cgroups),
    };
    let irqbalances = irqbalances(&root, &BTreeMap::new());
    let throttling = rt_throttling(&root);
    let host = HostFacts { topology: &topology, partition, irqbalances: &irqbalances, throttling };
    let document = DoctorDocument::new(args.vm.as_ref(), advise(&host, vm.as_ref()));
    output::answer(args.json, &document, DoctorDocument::to_text)?;
    Ok(if document.is_fine() { Answer::Done } else { Answer::No })
}

/// What is known of the VM, with its process.
fn of_vm<'a>(
    global: &Global,
    args: &DoctorArgs,
    vm: &'a VmName,
    root: &SysRoot,
) -> Result<(Pid, VmFacts<'a>), Failure> {
    let (location, limits) = (args.ask.location(global), args.ask.limits(None));
    let state = global.state(root);
    let view = look(vm, &location, &limits, &state)?;
    let has_own_socket = || channel_paths(vm, &location).own.exists();
    let asked = match location {
        VmLocation::Proxmox { .. } if has_own_socket() => Some(Asked::Alone),
        VmLocation::Proxmox { .. } => Some(asked_by_supervisor(&state, vm)),
        VmLocation::Socket { .. } => None,
    };
    let config = asked.map(|_| proxmox_config(root, vm));
    Ok((view.process.pid, VmFacts { vm, guest: guest(&view.roles), asked, config }))
}

/// How its supervisor queries QEMU; a VM without one would be visited.
fn asked_by_supervisor(state: &StateDir, vm: &VmName) -> Asked {
    match read_standing(state, vm).and_then(|standing| standing.channel) {
        Some(ChannelKind::Socket | ChannelKind::RuntimeMonitor) => Asked::Alone,
        Some(ChannelKind::Lease) | None => Asked::Visits,
    }
}
