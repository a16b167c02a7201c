//! `qmpin plan`, and `qmpin attach --dry-run`.

use std::collections::BTreeMap;

use super::args::{Global, PlanArgs, VmArgs};
use super::look::look;
use super::scene::Scene;
use super::{Answer, output, plan_all};
use crate::attachment::leasing::neighbours_of;
use crate::attachment::settings::{Follow, Settings};
use crate::cgroups::CgroupTree;
use crate::discover::{VmLocation, read_topology, tasks};
use crate::error::{Failure, Kind};
use crate::ids::VmName;
use crate::knobs::abilities::Abilities;
use crate::knobs::affinity::diff::diff;
use crate::knobs::affinity::limit;
use crate::knobs::findings::{Facts, findings};
use crate::knobs::ground::Host;
use crate::knobs::host::Wants;
use crate::knobs::host::irqbalance::read::Silent;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::kernel_threads::{KthreadScan, kernel_threads};
use crate::knobs::host::places::HostView;
use crate::knobs::host::step::HostStep;
use crate::knobs::partition::keep::would_be;
use crate::knobs::reonline::cycle::would_take;
use crate::leases::Lease;
use crate::plan::{Plan, PlanError, Stay};
use crate::policy::Knob;
use crate::promises::Surroundings;
use crate::render::{Explain, PlanDocument, declared_text, host_text, plan_text};
use crate::sched::Kernel;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;
use crate::threads::ProcessKey;
use crate::topology::Topology;
use crate::{discover, journal};

/// How the plan is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    Json,
    Text(Explain),
}

pub(super) fn run(global: &Global, args: &PlanArgs) -> Result<Answer, Failure> {
    let Some(vm) = &args.vm else { return plan_all::run(global, args) };
    let vm = VmArgs { vm: vm.clone(), ask: args.ask.clone() };
    let root = args.root.root()?;
    let policy = args.policy.policy(global, &root, &vm)?;
    let settings = vm.settings(global, &root, policy, Follow::Once);
    let shape = match (args.json, args.explain) {
        (true, _) => Shape::Json,
        (false, true) => Shape::Text(Explain::All),
        (false, false) => Shape::Text(Explain::Shortfalls),
    };
    show(&root, &settings, shape, Stopped::ByConfiguration)
}

/// What is planned where the VM does not run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stopped {
    /// Nothing: that is an error.
    Refuse,
    /// What its Proxmox configuration declares.
    ByConfiguration,
}

/// Plans for the host below `root` and prints. Nothing is locked and nothing is written.
pub(super) fn show(
    root: &SysRoot,
    settings: &Settings,
    shape: Shape,
    stopped: Stopped,
) -> Result<Answer, Failure> {
    let live = SysRoot::live();
    let Settings { vm, location, state, limits, .. } = settings;
    let topology = read_topology(root)?;
    let view = match look(vm, location, limits, state) {
        Err(failure) if failure.kind() == Kind::NoVm && stopped == Stopped::ByConfiguration => {
            return show_declared(root, settings, shape, &topology, failure);
        }
        view => view?,
    };
    let scene = Scene::read(root, settings, view.process, &topology)?;
    let (boot_id, held) = (&scene.boot_id, &scene.held);
    let guest = discover::guest(&view.roles);
    let mut plan = or_document(vm, shape, scene.plan(settings, &topology, &guest, held))?;
    let cgroups = CgroupTree::of(&live);
    let host = Host { root: &live, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let mut threads = tasks::observe(view.process, view.scan, &view.identified).threads;
    let memory = journal::memory(&state.journal_path(vm));
    let policy = &settings.policy.vm;
    let has_partition = root.is_live() && policy.wanted_knobs().contains(&Knob::Partition);
    let partition = has_partition.then(|| would_be(host, state, view.process, &plan, boot_id));
    let reonline = if root.is_live() && held.is_empty() {
        let memory = HostJournal::read(&state.host_journal_path(), boot_id)?;
        would_take(host, state, boot_id, &plan, policy, &memory)
    } else {
        None
    };
    let abilities = Abilities::read(root, host.sched, policy, &memory, &threads);
    plan.report = findings(&Facts {
        topology: &topology,
        plan: &plan,
        policy,
        partition,
        throttling: abilities.throttling,
        cookies: &abilities.cookies,
        made: memory.cookie(),
        reonline: reonline.as_ref(),
    });
    threads.extend(kernel_threads(&live, &Kernel, view.process.pid, KthreadScan::Children));
    match shape {
        Shape::Json => output::json(&PlanDocument::of(&plan))?,
        Shape::Text(explain) => {
            let steps = diff(&plan, view.process.pid, &threads, &topology.online());
            output::text(&plan_text(&plan, threads.len(), &steps, explain))?;
            let (host, steps) = host_steps(root, settings, view.process, &plan, boot_id)?;
            output::text(&host_text(&steps, &host.vfio))?;
        }
    }
    Ok(Answer::Done)
}

/// Plans a VM that does not run, as its configuration declares it. Where there is none, the VM is just not running.
fn show_declared(
    root: &SysRoot,
    settings: &Settings,
    shape: Shape,
    topology: &Topology,
    not_running: Failure,
) -> Result<Answer, Failure> {
    let Settings { vm, location, state, .. } = settings;
    if !matches!(location, VmLocation::Proxmox { .. }) {
        return Err(not_running);
    }
    let guest = match discover::declared_guest(root, vm) {
        Ok(guest) => guest,
        Err(why) => {
            return Err(
                not_running.hint(format!("a plan without it needs its configuration: {why}"))
            );
        }
    };
    let boot_id = discover::boot_id(&SysRoot::live())?;
    let cgroups = CgroupTree::of(root);
    let host = Host { root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let promises = limit::promises_beside(host, state, &boot_id);
    let mut around = Surroundings {
        promises,
        devices: discover::declared_devices(root, vm),
        set_aside: discover::devices::nodes_set_aside(root),
        ..Surroundings::default()
    };
    let beside = neighbours_of(host, state, vm, &boot_id);
    around.expected = settings.expected(topology, &guest, &beside, &around);
    let planned = settings.plan(topology, &guest, &beside, &around, &BTreeMap::new(), Stay::Always);
    let plan = or_document(vm, shape, planned)?;
    let from = root.root().join(discover::proxmox_config_path(vm)).display().to_string();
    match shape {
        Shape::Json => output::json(&PlanDocument::declared(&plan, &from))?,
        Shape::Text(explain) => output::text(&declared_text(&plan, &from, explain))?,
    }
    Ok(Answer::Done)
}

/// The plan; where there is none, the document that says so has been printed.
fn or_document(
    vm: &VmName,
    shape: Shape,
    planned: Result<Plan, PlanError>,
) -> Result<Plan, Failure> {
    if let (Err(PlanError::Infeasible { reason, nearest, .. }), Shape::Json) = (&planned, shape) {
        output::json(&PlanDocument::infeasible(vm, reason, nearest.as_deref()))?;
    }
    Ok(planned?)
}

/// The rest of the host, and what would be changed about it.
fn host_steps(
    root: &SysRoot,
    settings: &Settings,
    process: ProcessKey,
    plan: &Plan,
    boot_id: &str,
) -> Result<(HostView, Vec<HostStep>), Failure> {
    let mut leases = discover::live_leases(&SysRoot::live(), &settings.state, boot_id);
    leases.retain(|lease| lease.vm != settings.vm);
    let policy = &settings.policy.vm;
    leases.push(Lease {
        exclusive: plan.exclusive,
        iothreads: plan.iothread_cpus,
        vcpus: plan.held().into_iter().collect(),
        floats: plan.floats(),
        knobs: policy.wanted_knobs(),
        vfio_irqs: policy.vfio_irqs.value,
        ..Lease::new(settings.vm.clone(), boot_id.to_owned(), process)
    });
    let memory = HostJournal::read(&settings.state.host_journal_path(), boot_id)?;
    Ok(crate::knobs::host::keep::host_steps(
        Host { root, sched: &Kernel, cgroups: &CgroupTree::of(root), units: &SystemBus },
        &Wants::of(&leases),
        &memory,
        &mut Silent::new(),
    )?)
}
