//! `qmpin doctor`: what the host, and a VM, still cost, and the exact command that fixes it.

use std::collections::BTreeMap;

use super::args::{DoctorArgs, Global, VmArgs};
use super::look::look;
use super::scene::Scene;
use super::{Answer, output};
use crate::attachment::settings::{Follow, Settings};
use crate::cgroups::CgroupTree;
use crate::check::doctor::{Advice, Asked, HostFacts, VmFacts, advise};
use crate::discover::{
    VmLocation, cgroup, channel_paths, guest, memory, proxmox_config, read_topology, rt_throttling,
};
use crate::error::{Failure, chain};
use crate::guest::Guest;
use crate::ids::{CpuId, VcpuIndex, VmName};
use crate::knobs::host::irqbalance::read::irqbalances;
use crate::leases::StateDir;
use crate::plan::Plan;
use crate::qmp::ChannelKind;
use crate::render::DoctorDocument;
use crate::standing::read_standing;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;
use crate::topology::Topology;

pub(super) fn run(global: &Global, args: &DoctorArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let topology = read_topology(&root)?;
    let advice = match &args.vm {
        None => {
            let partition = cgroup::can_partition(&root, &CgroupTree::of(&root));
            with_host(&root, &topology, partition, |host| advise(host, None))
        }
        Some(vm) => of_vm(global, args, vm, &root, &topology)?,
    };
    let document = DoctorDocument::new(args.vm.as_ref(), advice);
    output::answer(args.json, &document, DoctorDocument::to_text)?;
    Ok(if document.is_fine() { Answer::Done } else { Answer::No })
}

/// Reads what is known of the host, and hands it on.
fn with_host(
    root: &SysRoot,
    topology: &Topology,
    partition: Result<(), String>,
    act: impl FnOnce(&HostFacts<'_>) -> Vec<Advice>,
) -> Vec<Advice> {
    let irqbalances = irqbalances(root, &BTreeMap::new());
    let throttling = rt_throttling(root);
    act(&HostFacts { root, topology, partition, irqbalances: &irqbalances, throttling })
}

/// All advice for a running VM.
fn of_vm(
    global: &Global,
    args: &DoctorArgs,
    vm: &VmName,
    root: &SysRoot,
    topology: &Topology,
) -> Result<Vec<Advice>, Failure> {
    let (location, limits) = (args.ask.location(global), args.ask.limits(None));
    let state = global.state(root);
    let view = look(vm, &location, &limits, &state)?;
    let has_own_socket = || channel_paths(vm, &location).own.exists();
    let asked = match location {
        VmLocation::Proxmox { .. } if has_own_socket() => Some(Asked::Alone),
        VmLocation::Proxmox { .. } => Some(asked_by_supervisor(&state, vm)),
        VmLocation::Socket { .. } => None,
    };
    let planner = Plans::read(global, args, vm, root, topology, view.process);
    let plans =
        |guest: &Guest| planner.as_ref().map_err(String::clone)?.plan(guest, &BTreeMap::new());
    let guest = guest(&view.roles);
    let plan =
        planner.as_ref().map_err(String::clone).and_then(|all| all.plan(&guest, &all.scene.held));
    let cgroups = CgroupTree::of(root);
    let process = view.process.pid;
    let facts = VmFacts {
        vm,
        process,
        guest,
        asked,
        config: asked.map(|_| proxmox_config(root, vm)),
        plan,
        plans: &plans,
        huge: memory::huge_share(root, &cgroups, process),
    };
    let partition = cgroup::partition_site(root, &cgroups, process).map(|_| ());
    Ok(with_host(root, topology, partition, |host| advise(host, Some(&facts))))
}

/// What plans are made of.
struct Plans<'a> {
    settings: Settings,
    scene: Scene,
    topology: &'a Topology,
}

impl Plans<'_> {
    /// Reads the VM's policy, and what it is planned beside. A policy that cannot be used is why there is no plan.
    fn read<'a>(
        global: &Global,
        args: &DoctorArgs,
        vm: &VmName,
        root: &SysRoot,
        topology: &'a Topology,
        process: ProcessKey,
    ) -> Result<Plans<'a>, String> {
        let policy = global.policy_dirs(root, args.ask.place()).load(Some(vm));
        let policy = policy.map_err(|error| chain(&error))?;
        let of = VmArgs { vm: vm.clone(), ask: args.ask.clone() };
        let settings = of.settings(global, root, policy, Follow::Once);
        let scene = Scene::read(root, &settings, process, topology);
        let scene = scene.map_err(|failure| failure.to_string())?;
        Ok(Plans { settings, scene, topology })
    }

    fn plan(&self, guest: &Guest, held: &BTreeMap<VcpuIndex, CpuId>) -> Result<Plan, String> {
        let plan = self.scene.plan(&self.settings, self.topology, guest, held);
        plan.map_err(|error| chain(&error))
    }
}

/// How its supervisor queries QEMU; a VM without one would be visited.
fn asked_by_supervisor(state: &StateDir, vm: &VmName) -> Asked {
    match read_standing(state, vm).and_then(|standing| standing.channel) {
        Some(ChannelKind::Socket | ChannelKind::RuntimeMonitor) => Asked::Alone,
        Some(ChannelKind::Lease) | None => Asked::Visits,
    }
}
