//! `qmpin may-start`: whether the service of a VM has anything to do. systemd asks it before each start
//! (`ExecCondition=` of `qmpin@.service` and `qmpin-running@.service`): exit 0 starts, exit 1 does not, and is no failure.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::args::{Global, MayStartArgs};
use super::{Answer, output};
use crate::discover::{ProcessError, boot_id, is_alive, proxmox_process};
use crate::error::{Failure, chain};
use crate::ids::{Pid, VmName};
use crate::marks::{Detached, read_mark, remove_mark, sweep_marks};
use crate::services::{self, Activity};
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// How long a pid file that names no QEMU may be one that is just being written.
const PID_FILE_PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// systemd sets it where a path unit or a timer has started the service (`man 5 systemd.exec`).
const TRIGGER: &str = "TRIGGER_UNIT";

pub(super) fn run(global: &Global, args: &MayStartArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let state = global.state(&root);
    let vm = &args.vm;
    // The timer asks again and again, and an answer that is always the same is not for the log.
    let is_timed = is_started_by_timer();
    if is_timed && !is_idle(vm) {
        return Ok(Answer::No);
    }
    let boot_id = boot_id(&root)?;
    sweep_marks(&state, &boot_id, &|process| is_alive(&root, process));
    let qemu = match running(&root, global, vm) {
        Ok(qemu) => qemu,
        Err(error) => {
            if !is_timed {
                output::text(&format!("VM {vm}: nothing to attach: {}\n", chain(&error)))?;
            }
            return Ok(Answer::No);
        }
    };
    let mark: Option<Detached> = read_mark(&state, vm);
    if mark.is_none_or(|mark| mark.qemu != qemu || mark.boot_id != boot_id) {
        return Ok(Answer::Done);
    }
    if is_timed {
        return Ok(Answer::No);
    }
    if args.automatic || is_automatic() {
        output::text(&format!(
            "VM {vm}: stays detached, as it was by hand, until the VM is started anew; \
             `systemctl start qmpin@{vm}` attaches it\n"
        ))?;
        return Ok(Answer::No);
    }
    if let Err(error) = remove_mark::<Detached>(&state, vm) {
        tracing::warn!("VM {vm}: is attached, and still marked as detached by hand: {error}");
    }
    Ok(Answer::Done)
}

/// The VM's QEMU; a pid file that is just being written is waited for.
fn running(root: &SysRoot, global: &Global, vm: &VmName) -> Result<ProcessKey, ProcessError> {
    let deadline = Instant::now() + PID_FILE_PATIENCE;
    loop {
        match proxmox_process(root, &global.proxmox_dir, vm) {
            Err(error) if error.may_be_young() && Instant::now() < deadline => thread::sleep(PAUSE),
            found => return found,
        }
    }
}

/// Whether this is a start by the timer.
fn is_started_by_timer() -> bool {
    let trigger = std::env::var_os(TRIGGER).map(PathBuf::from);
    trigger.is_some_and(|unit| unit.extension().is_some_and(|kind| kind == "timer"))
}

/// Whether the service of the VM does not run, and has not failed.
fn is_idle(vm: &VmName) -> bool {
    let service = services::service(&services::service_name(vm));
    // The path unit has loaded it.
    matches!(service, Ok(Some(service)) if service.activity == Activity::Idle)
}

/// Whether systemd starts the service by itself. Where it does not answer it is taken to.
fn is_automatic() -> bool {
    if std::env::var_os(TRIGGER).is_some() {
        return true;
    }
    let own = i32::try_from(std::process::id()).map(Pid);
    match own.map(services::service_of) {
        Ok(Ok(Some(service))) => service.restarts > 0,
        Ok(Ok(None)) | Err(_) => false,
        Ok(Err(error)) => {
            tracing::warn!("whether this start was asked for is not known: {}", chain(&error));
            true
        }
    }
}
