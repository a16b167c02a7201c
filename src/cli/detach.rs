//! `qmpin detach`: ends the supervisor, if there is one, and restores from the journal.

use std::time::Duration;

use super::args::{DetachArgs, Global};
use super::looked_after::Keeper;
use super::{Answer, output};
use crate::attachment::end::{Supervised, end_supervisor};
use crate::attachment::leasing::{give_back, lock_forsaken};
use crate::attachment::restored::{host_lines, restore_lines};
use crate::cgroups::CgroupTree;
use crate::discover::{boot_id, unlinked_holder};
use crate::error::{Failure, chain};
use crate::ids::VmName;
use crate::knobs::affinity::restore::Nothing;
use crate::knobs::ground::Host;
use crate::knobs::host::keep::settle_host;
use crate::knobs::host::outcome::HostApplied;
use crate::leases::StateDir;
use crate::sched::Kernel;
use crate::services;
use crate::supervise::end_waiting;
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;

pub(super) fn run(global: &Global, args: &DetachArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let cgroups = CgroupTree::of(&root);
    let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let state = global.state(&root);
    let boot_id = boot_id(&root)?;
    let whom = if args.dead { Whom::Forsaken } else { Whom::Any };
    let mut keeper = Keeper::new(global, &root, &state, &boot_id);
    let mut vms = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => state.vms()?,
    };
    if args.all {
        vms.extend(keeper.vms());
        vms.sort_unstable();
        vms.dedup();
    }
    let mut answer = Answer::Done;
    let mut failures = Vec::new();
    let mut is_anybody_treated = false;
    for vm in vms {
        // One VM's trouble is no reason to leave the others attached.
        let detached = match whom {
            Whom::Any => by_hand(host, &mut keeper, &vm).map(Some),
            Whom::Forsaken => detach(host, &state, &vm, &boot_id, whom),
        };
        match detached {
            Ok(None) => continue,
            Ok(Some(Answer::Done)) => {}
            Ok(Some(partly)) => answer = partly,
            Err(failure) => failures.push(failure),
        }
        is_anybody_treated = true;
    }
    if !is_anybody_treated && state.path().exists() {
        // A qmpin that was killed between its lease's end and the host's.
        let report = settle_host(host, &state, &boot_id)?;
        let unknown =
            report.unknown.iter().map(ToString::to_string).chain(report.held_back.clone());
        for line in host_lines(&report.applied).into_iter().chain(unknown) {
            output::sentence(&line)?;
        }
        if report.unknown.is_some()
            || !report.held_back.is_empty()
            || report.applied.iter().any(HostApplied::is_left_changed)
        {
            answer = Answer::Partly;
        }
    }
    match failures.pop() {
        None => Ok(answer),
        Some(last) => {
            for failure in &failures {
                output::error(&failure.report());
            }
            Err(last)
        }
    }
}

/// Who is detached.
#[derive(Clone, Copy)]
enum Whom {
    /// Every VM that was named; its supervisor is ended.
    Any,
    /// Only VMs without a supervisor; no process is ended.
    Forsaken,
}

/// Detaches one VM so that it stays so, also where a service looks after it.
fn by_hand(host: Host<'_>, keeper: &mut Keeper<'_>, vm: &VmName) -> Result<Answer, Failure> {
    let service = keeper.keep_detached(vm)?;
    // Where systemd has stopped it, it has ended or is about to.
    if let Err(error) = end_waiting(host.root, keeper.state, vm) {
        tracing::warn!("VM {vm}: the process that waits to attach it could not be ended: {error}");
    }
    let detached = detach(host, keeper.state, vm, keeper.boot_id, Whom::Any);
    if let Some(service) = service {
        match services::wait_stopped(&service) {
            Ok(true) => output::text(&format!(
                "VM {vm}: detached by hand, {service} is stopped; `systemctl start qmpin@{vm}` attaches it again\n"
            ))?,
            Ok(false) => tracing::warn!("VM {vm}: {service} is still stopping"),
            Err(error) => {
                tracing::warn!(
                    "VM {vm}: whether {service} has stopped is not known: {}",
                    chain(&error)
                );
            }
        }
    }
    Ok(detached?.unwrap_or(Answer::Done))
}

/// How long one VM's restore may take: two reloads of systemd, and what waits for locks.
const RESTORE_LIMIT: Duration = Duration::from_secs(240);

/// Detaches one VM; `None`: a supervisor follows it, and that is not to be changed. That is asked for each
/// just before it is treated, since the one before may take its time.
fn detach(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
    whom: Whom,
) -> Result<Option<Answer>, Failure> {
    if !state.path().exists() {
        if unlinked_holder(state, vm).is_none() {
            output::text(&format!("VM {vm}: nothing to restore, it is not attached\n"))?;
            return Ok(Some(Answer::Done));
        }
        // It was removed under a supervisor that lives.
        state.create()?;
    }
    let (lock, supervised) = match whom {
        Whom::Any => end_supervisor(host, state, vm)?,
        Whom::Forsaken => match lock_forsaken(host.root, state, vm, boot_id)? {
            Some(lock) => (lock, Supervised::WasNot),
            None => return Ok(None),
        },
    };
    // Another `detach` waits while this one makes progress.
    let _pulse = lock.heart().pulse(RESTORE_LIMIT);
    let report = give_back(host, state, vm, boot_id)?;
    if supervised == Supervised::Was && report.nothing == Some(Nothing::NeverAttached) {
        output::text(&format!("VM {vm}: its supervisor has restored everything and ended\n"))?;
        return Ok(Some(Answer::Done));
    }
    for line in restore_lines(vm, &report) {
        output::sentence(&line)?;
    }
    Ok(Some(if report.is_complete() { Answer::Done } else { Answer::Partly }))
}
