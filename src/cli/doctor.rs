//! `qmpin doctor`: what the host, and a VM, still cost, and the exact command that fixes it.

use std::collections::BTreeMap;

use super::args::{DoctorArgs, Global};
use super::look::look;
use super::{Answer, output};
use crate::cgroups::CgroupTree;
use crate::check::doctor::{Asked, HostFacts, VmFacts, advise};
use crate::discover::{
    VmLocation, VmView, cgroup, channel_paths, guest, proxmox_config, read_topology, rt_throttling,
};
use crate::error::Failure;
use crate::guest::Guest;
use crate::ids::VmName;
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
    let partition = match &vm {
        Some((view, ..)) => cgroup::partition_site(&root, &cgroups, view.process.pid).map(|_| ()),
        None => cgroup::can_partition(&root, &cgroups),
    };
    let irqbalances = irqbalances(&root, &BTreeMap::new());
    let throttling = rt_throttling(&root);
    let host = HostFacts { topology: &topology, partition, irqbalances: &irqbalances, throttling };
    let facts = args.vm.as_ref().zip(vm.as_ref());
    let facts = facts.map(|(vm, (_, guest, asked))| {
        let config = asked.is_some().then(|| proxmox_config(&root, vm));
        VmFacts { vm, guest, asked: *asked, config }
    });
    let document = DoctorDocument::new(args.vm.as_ref(), advise(&host, facts.as_ref()));
    output::answer(args.json, &document, DoctorDocument::to_text)?;
    Ok(if document.is_fine() { Answer::Done } else { Answer::No })
}

fn of_vm(
    global: &Global,
    args: &DoctorArgs,
    vm: &VmName,
    root: &SysRoot,
) -> Result<(VmView, Guest, Option<Asked>), Failure> {
    let (location, limits) = (args.ask.location(global), args.ask.limits(None));
    let state = global.state(root);
    let (view, ()) = look(vm, &location, &limits, &state, || Ok(()))?;
    let guest = guest(&view.roles);
    let has_own_socket = || channel_paths(vm, &location).own.exists();
    let asked = match location {
        VmLocation::Proxmox { .. } if has_own_socket() => Some(Asked::Alone),
        VmLocation::Proxmox { .. } => Some(asked_by_supervisor(&state, vm)),
        VmLocation::Socket { .. } => None,
    };
    Ok((view, guest, asked))
}

/// How its supervisor queries QEMU; a VM without one would be visited.
fn asked_by_supervisor(state: &StateDir, vm: &VmName) -> Asked {
    match read_standing(state, vm).and_then(|standing| standing.channel) {
        Some(ChannelKind::Socket | ChannelKind::RuntimeMonitor) => Asked::Alone,
        Some(ChannelKind::Lease) | None => Asked::Visits,
    }
}
