//! `qmpin doctor`: what the host, and a VM, still cost, and the exact line that mends it.

use std::collections::BTreeMap;

use super::args::{DoctorArgs, Global, VmArgs};
use super::{Answer, block_on, output};
use crate::cgroups::CgroupTree;
use crate::discover::{
    Target, VmError, VmLocation, VmView, cgroup, channel_paths, guest, irqbalances, read_topology,
    read_vm, rt_throttling, way_beside_supervisor,
};
use crate::error::Failure;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::plan::Guest;
use crate::qmp::ChannelKind;
use crate::render::DoctorDocument;
use crate::sched::Kernel;
use crate::standing::read_standing;
use crate::sysroot::SysRoot;
use crate::watch::doctor::{Asked, HostFacts, VmFacts, advise};

pub(super) fn run(global: &Global, args: &DoctorArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let topology = read_topology(&root)?;
    let cgroups = CgroupTree::of(&root);
    let target = args.target();
    let vm = target.as_ref().map(|target| look(global, target, &root)).transpose()?;
    let partition = match &vm {
        Some((view, ..)) => cgroup::partition_site(&root, &cgroups, view.process.pid).map(|_| ()),
        None => cgroup::can_partition(&root, &cgroups),
    };
    let irqbalances = irqbalances(&root, &BTreeMap::new());
    let throttling = rt_throttling(&root);
    let host = HostFacts { topology: &topology, partition, irqbalances: &irqbalances, throttling };
    let facts = args.vm.as_ref().zip(vm.as_ref());
    let facts = facts.map(|(vm, (_, guest, asked))| VmFacts { vm, guest, asked: *asked });
    let document = DoctorDocument::new(args.vm.as_ref(), advise(&host, facts.as_ref()));
    if args.json {
        output::json(&document)?;
    } else {
        output::text(&document.to_text())?;
    }
    Ok(if document.is_fine() { Answer::Done } else { Answer::No })
}

fn look(
    global: &Global,
    args: &VmArgs,
    root: &SysRoot,
) -> Result<(VmView, Guest, Option<Asked>), Failure> {
    let (vm, state) = (&args.vm, global.state(root));
    let location = args.location(global);
    let paths = channel_paths(vm, &location);
    let limits = args.limits();
    let first = way_beside_supervisor(&state, vm);
    let target = Target { vm, location: &location, paths: &paths, first, limits: &limits };
    let nothing = |_| Ok::<_, VmError>(());
    let (view, ()) = block_on(read_vm(root, &Kernel, target, nothing))??;
    let guest = guest(&view.roles);
    let asked = match location {
        VmLocation::Proxmox { .. } if paths.own.exists() => Some(Asked::Alone),
        VmLocation::Proxmox { .. } => Some(asked_by_supervisor(&state, vm)),
        VmLocation::Socket { .. } => None,
    };
    Ok((view, guest, asked))
}

/// How whoever follows it asks QEMU; a VM that nobody follows would be visited.
fn asked_by_supervisor(state: &StateDir, vm: &VmName) -> Asked {
    match read_standing(state, vm).map(|standing| standing.channel) {
        Some(ChannelKind::Socket | ChannelKind::RuntimeMonitor) => Asked::Alone,
        Some(ChannelKind::Lease) | None => Asked::Visits,
    }
}
