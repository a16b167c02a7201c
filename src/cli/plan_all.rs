//! `qmpin plan --all`: every VM of this host at once.

use std::collections::BTreeSet;

use super::args::{AllPlanArgs, Global, Place, PlanArgs, host_policy};
use super::topology::{Sheet, picture, put_svg};
use super::{Answer, output};
use crate::attachment::leasing::{all_neighbours, neighbour};
use crate::attachment::settings::declare;
use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::{self, PolicyDirs, all_leases, enabled_vms, read_topology};
use crate::error::Failure;
use crate::ids::VmName;
use crate::knobs::affinity::limit::promises_beside;
use crate::knobs::ground::Host;
use crate::leases::StateDir;
use crate::plan::{Machine, Neighbour, PlanError, plan_all};
use crate::promises::Surroundings;
use crate::render::{Owners, PlanAllDocument, PlanDocument, VmOfAll, VmPlace};
use crate::sched::Kernel;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;

/// Plans and prints. The answer is no where a VM does not fit.
pub(super) fn run(global: &Global, args: &PlanArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let AllPlanArgs { replan, svg, .. } = &args.all;
    let topology = read_topology(&root)?;
    let state = global.state(&root);
    let host_policy = host_policy(global, &root)?;
    let boot_id = discover::boot_id(&root).unwrap_or_default();
    let cgroups = CgroupTree::of(&root);
    let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let attached = attached(host, &state, &boot_id);
    let dirs = global.policy_dirs(&root, Place::Proxmox);
    let stays = |one: &&Neighbour| !*replan || one.doubt.is_some();
    let staying: Vec<Neighbour> = attached.iter().filter(stays).cloned().collect();
    let mut vms = Vec::new();
    let mut declared = Vec::new();
    for vm in all_vms(&dirs, &root, &attached)? {
        if let Some(one) = staying.iter().find(|one| one.vm == vm) {
            vms.push(of_attached(&state, one));
            continue;
        }
        match declare(&dirs, &root, &vm) {
            Ok(one) => declared.push(one),
            Err(reason) => vms.push(VmOfAll { reason: Some(reason), ..unknown(vm) }),
        }
    }
    let counts: Vec<(VmName, usize)> =
        declared.iter().map(|one| (one.vm.clone(), one.guest.vcpus.len())).collect();
    let promises = promises_beside(host, &state, &boot_id);
    let set_aside = discover::devices::nodes_set_aside(&root);
    let around = Surroundings { promises, set_aside, ..Surroundings::default() };
    let machine = Machine::of(&topology);
    let beside = staying.into_iter().collect();
    let all = plan_all(&machine, declared, beside, &around, &host_policy);
    vms.extend(all.plans.iter().map(|(vm, planned)| {
        let vcpu_count = counts.iter().find(|(one, _)| one == vm).map(|(_, count)| *count);
        match planned {
            Ok(plan) => VmOfAll {
                state: VmPlace::Planned,
                vcpu_count,
                exclusive: plan.exclusive,
                plan: Some(PlanDocument::of(plan)),
                ..unknown(vm.clone())
            },
            Err(error) => VmOfAll {
                state: VmPlace::Infeasible,
                vcpu_count,
                reason: Some(reason(error)),
                ..unknown(vm.clone())
            },
        }
    }));
    let document = PlanAllDocument::new(vms, &all);
    let does_not_fit = document.vms().iter().any(|one| one.state == VmPlace::Infeasible);
    let owners: Owners = document.vms().iter().map(|one| (one.vm.clone(), one.exclusive)).collect();
    let sheet = Sheet { topology: &topology, owners: &owners, policy: &host_policy };
    let picture = picture(&sheet, &around.promises);
    if args.json {
        output::json(&document)?;
    } else if let Some(path) = svg {
        put_svg(path, &picture)?;
    } else {
        output::text(&document.to_text())?;
        output::text("\n")?;
        output::painted(&picture.draw())?;
    }
    Ok(if does_not_fit { Answer::No } else { Answer::Done })
}

/// The VMs that have CPUs. Whether a captured machine's are alive cannot be known: it is taken as it was.
fn attached(host: Host<'_>, state: &StateDir, boot_id: &str) -> Vec<Neighbour> {
    if host.root.is_live() {
        return all_neighbours(host, state, boot_id);
    }
    all_leases(state).into_iter().map(neighbour).collect()
}

/// The VMs that have a policy, are enabled, or have CPUs. A policy of the cluster alone is for a VM that may be on
/// another node.
fn all_vms(
    dirs: &PolicyDirs,
    root: &SysRoot,
    attached: &[Neighbour],
) -> Result<BTreeSet<VmName>, Failure> {
    let (with_policy, _) = dirs.all()?;
    let is_here = |vm: &VmName| {
        dirs.host.join(format!("{vm}.toml")).exists() || discover::declared_guest(root, vm).is_ok()
    };
    let mut vms: BTreeSet<VmName> = with_policy.into_iter().filter(is_here).collect();
    vms.extend(enabled_vms(root));
    vms.extend(attached.iter().map(|one| one.vm.clone()));
    Ok(vms)
}

fn reason(error: &PlanError) -> String {
    match error {
        PlanError::Infeasible { nearest: Some(nearest), .. } => {
            format!("{error}; {} would do", nearest.takes)
        }
        error => error.to_string(),
    }
}

fn unknown(vm: VmName) -> VmOfAll {
    VmOfAll {
        vm,
        state: VmPlace::Unknown,
        vcpu_count: None,
        exclusive: CpuSet::EMPTY,
        reason: None,
        plan: None,
    }
}

fn of_attached(state: &StateDir, one: &Neighbour) -> VmOfAll {
    let lease = state.lease(&one.vm).ok().flatten();
    VmOfAll {
        state: VmPlace::Attached,
        vcpu_count: lease.map(|lease| lease.vcpus.len()).filter(|count| *count > 0),
        exclusive: one.exclusive,
        reason: one.doubt.clone(),
        ..unknown(one.vm.clone())
    }
}
