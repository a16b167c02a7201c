//! Which kind of end an error is, and what to do next.

use std::path::Path;

use crate::attachment::error::StartError;
use crate::discover::{DiscoverError, ProcessError, VmError, VmLocation};
use crate::error::{Failure, Kind};
use crate::journal::JournalError;
use crate::knobs::affinity::restore::RestoreError;
use crate::knobs::host::keep::HostError;
use crate::leases::StateError;
use crate::plan::PlanError;
use crate::qmp::QmpError;
use crate::runtime::is_shortage;

fn permission_or(error: &std::io::Error, otherwise: Kind) -> Kind {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => Kind::Permission,
        _ => otherwise,
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Failure {
        let kind = match &error {
            VmError::Process(process) if process.is_not_running() => Kind::NoVm,
            VmError::Process(ProcessError::BadPidFile { source, .. }) => {
                permission_or(source, Kind::NoVm)
            }
            VmError::Qmp(qmp) if qmp.is_nobody_there() => Kind::NoVm,
            VmError::Qmp(QmpError::Connect { source, .. }) => permission_or(source, Kind::Qmp),
            VmError::Process(_) | VmError::Qmp(_) | VmError::Held(_) | VmError::Tasks(_) => {
                Kind::Qmp
            }
        };
        if let VmError::Held(held) = &error {
            let hints = own_socket_hints(&held.own, &held.location);
            let failure = Failure::new(kind, error);
            return hints.into_iter().fold(failure, Failure::hint);
        }
        let hint = match &error {
            VmError::Process(ProcessError::NoPidFile { vm, .. }) => {
                let start = if vm.is_vmid() { "start it; " } else { "" };
                Some(format!(
                    "{start}a VM that is not Proxmox's is named with its QMP socket: --qmp PATH"
                ))
            }
            VmError::Qmp(QmpError::Connect { .. }) if kind == Kind::NoVm => Some(
                "--qmp names the socket on QEMU's command line: -qmp unix:PATH,server=on,wait=off"
                    .to_owned(),
            ),
            VmError::Qmp(QmpError::DuplicateTid { .. }) => Some(
                "QEMU runs several vCPUs on one thread (-accel tcg,thread=single): there is \
                 nothing to pin apart"
                    .to_owned(),
            ),
            _ if kind == Kind::Permission => Some("run it as root".to_owned()),
            _ => None,
        };
        with_hint(Failure::new(kind, error), hint)
    }
}

/// How a VM is given a socket for qmpin alone.
fn own_socket_hints(own: &Path, location: &VmLocation) -> Vec<String> {
    // In an option of QEMU's a comma is written twice.
    let path = own.display().to_string().replace(',', ",,");
    let option = format!("unix:{path},server=on,wait=off");
    let first = "a monitor serves one client at a time; give qmpin one of its own";
    match location {
        VmLocation::Proxmox { .. } => {
            vec![format!("{first}: `-qmp {option}` in the line `args:` of the VM's configuration")]
        }
        VmLocation::Socket { .. } => {
            let mut hints = vec![
                format!("{first}, {}:", own.display()),
                format!("QEMU's command line: -qmp {option}"),
                "libvirt (`virsh edit`): <domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ...>, and"
                    .to_owned(),
                "  <qemu:commandline><qemu:arg value='-qmp'/>".to_owned(),
                format!("  <qemu:arg value='{}'/></qemu:commandline>", in_xml(&option)),
            ];
            let folder = own.parent().and_then(|folder| folder.file_name());
            if folder.is_some_and(|name| name.to_string_lossy().starts_with("domain-")) {
                hints.push(
                    "libvirt renames that folder at each start: choose a path that stays, and give it to --qmp"
                        .to_owned(),
                );
            }
            hints
        }
    }
}

fn in_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Failure {
        match error {
            PlanError::Policy { .. } => Failure::new(Kind::Usage, error),
            PlanError::Infeasible { ref nearest, .. } => {
                let hint = nearest.as_ref().map(|nearest| {
                    let pins: Vec<String> = nearest
                        .plan
                        .vcpus
                        .iter()
                        .map(|planned| format!("{}→{}", planned.vcpu, planned.cpus))
                        .collect();
                    format!(
                        "the nearest that would do: {} (vCPU→CPU {})",
                        nearest.takes,
                        pins.join(" ")
                    )
                });
                with_hint(Failure::new(Kind::No, error), hint)
            }
        }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Failure {
        let kind = match &error {
            StateError::Io { source, .. } => permission_or(source, Kind::Partial),
            StateError::NotALease { .. } => Kind::Partial,
            StateError::Busy { .. } => Kind::No,
        };
        let hint = match &error {
            StateError::NotALease { path, .. } => {
                Some(format!("if no qmpin is at work, remove {}", path.display()))
            }
            StateError::Busy { holder: Some(pid), .. } => Some(format!(
                "nothing was changed; see what process {pid} is and what it waits for, then try again"
            )),
            StateError::Busy { holder: None, .. } => {
                Some("nothing was changed; try again".to_owned())
            }
            StateError::Io { .. } if kind == Kind::Permission => Some("run it as root".to_owned()),
            StateError::Io { .. } => None,
        };
        with_hint(Failure::new(kind, error), hint)
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Failure {
        let kind = match &error {
            JournalError::Io { source, .. } => permission_or(source, Kind::Partial),
            _ => Kind::Partial,
        };
        let hint = match &error {
            JournalError::NotAJournal { path, .. } => Some(format!(
                "nothing was changed; keep a copy of {} and remove it to go on",
                path.display()
            )),
            JournalError::Newer { .. } => Some("nothing was changed".to_owned()),
            JournalError::Untrusted { .. } | JournalError::Full { .. } => {
                Some("what is in force stays so; detach and attach the VM to begin anew".to_owned())
            }
            _ => None,
        };
        with_hint(Failure::new(kind, error), hint)
    }
}

impl From<DiscoverError> for Failure {
    fn from(error: DiscoverError) -> Failure {
        Failure::new(Kind::No, error)
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Failure {
        match error {
            HostError::Journal(error) => error.into(),
            HostError::Discover(error) => error.into(),
            HostError::State(error) => error.into(),
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        match error {
            StartError::AlreadyAttached { ref vm, .. } => {
                let hint = format!("`qmpin detach {vm}` ends it and restores everything");
                Failure::new(Kind::No, error).hint(hint)
            }
            StartError::NotEnded { .. } => {
                let hint = "its journal stays: try again when it has ended";
                Failure::new(Kind::No, error).hint(hint)
            }
            StartError::NameTaken { ref vm, .. } => {
                let hint = format!(
                    "`qmpin detach {vm}` restores everything of that process; or attach this one under \
                     another name"
                );
                Failure::new(Kind::No, error).hint(hint)
            }
            StartError::OtherName { ref other, .. } => {
                let hint = format!("`qmpin detach {other}` first, or use that name");
                Failure::new(Kind::No, error).hint(hint)
            }
            StartError::LeftOver { ref vm, .. } => {
                let hint = format!("nothing was forgotten: `qmpin detach {vm}` tries again");
                Failure::new(Kind::No, error).hint(hint)
            }
            StartError::NotUndone { .. } => Failure::new(Kind::Partial, error)
                .hint("nothing was forgotten: `qmpin detach` tries again"),
            StartError::UnknownUndo { ref unknown, .. } => {
                let hint = format!("or remove {} if that is not needed", unknown.path.display());
                Failure::new(Kind::Partial, error).hint(hint)
            }
            StartError::Vm(error) => error.into(),
            StartError::Discover(error) => error.into(),
            StartError::BootId(error) => Failure::new(Kind::No, error),
            StartError::Plan(error) | StartError::NoRoom { reason: error, .. } => error.into(),
            StartError::State(error) => error.into(),
            StartError::Journal(error) => error.into(),
            StartError::NotPermitted { .. } => {
                Failure::new(Kind::Permission, error).hint("run it as root")
            }
            StartError::Look(_) => {
                Failure::new(Kind::Partial, error).hint("`qmpin detach` restores everything")
            }
            StartError::Restore(RestoreError::Journal(error)) => error.into(),
            StartError::Host(error) => error.into(),
            StartError::Restore(RestoreError::Look(ref read)) => {
                let kind = permission_or(&read.source, Kind::Partial);
                Failure::new(kind, error).hint("nothing was forgotten: try again")
            }
            StartError::Watch { ref source, .. } => {
                if is_shortage(source) {
                    let hint = "raise the limits of this process: `ulimit -n`, `ulimit -u`";
                    return Failure::new(Kind::No, error).hint(hint);
                }
                let kind = permission_or(source, Kind::NoVm);
                Failure::new(kind, error)
            }
        }
    }
}

fn with_hint(failure: Failure, hint: Option<String>) -> Failure {
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
