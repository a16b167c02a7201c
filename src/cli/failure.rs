//! Which kind of end an error is, and what to do next.

use std::path::Path;

use crate::attachment::error::StartError;
use crate::discover::{DiscoverError, PolicyFileError, ProcessError, VmError, VmLocation};
use crate::error::{Failure, Kind};
use crate::journal::JournalError;
use crate::knobs::affinity::restore::RestoreError;
use crate::knobs::host::keep::HostError;
use crate::leases::StateError;
use crate::plan::PlanError;
use crate::qmp::QmpError;
use crate::runtime::is_shortage;
use crate::sysroot::ReadError;

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
        let hints = match &error {
            VmError::Held(held) => own_socket_hints(&held.own, &held.location),
            VmError::Process(ProcessError::NoPidFile { vm, .. }) => {
                let start = if vm.is_vmid() { "start it; " } else { "" };
                vec![format!(
                    "{start}a VM that is not Proxmox's is named with its QMP socket: --qmp PATH"
                )]
            }
            VmError::Qmp(QmpError::Connect { .. }) if kind == Kind::NoVm => vec![
                "--qmp names the socket on QEMU's command line: -qmp unix:PATH,server=on,wait=off"
                    .to_owned(),
            ],
            VmError::Qmp(QmpError::DuplicateTid { .. }) => vec![
                "QEMU runs several vCPUs on one thread (-accel tcg,thread=single): there is \
                 nothing to pin apart"
                    .to_owned(),
            ],
            _ if kind == Kind::Permission => vec!["run it as root".to_owned()],
            _ => Vec::new(),
        };
        with_hints(kind, hints, error)
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
        let (kind, nearest) = match &error {
            PlanError::Policy { .. } => (Kind::Usage, None),
            PlanError::Infeasible { nearest, .. } => (Kind::No, nearest.as_ref()),
        };
        let hint = nearest.map(|nearest| {
            let vcpus = nearest.plan.vcpus.iter();
            let pins: Vec<String> =
                vcpus.map(|planned| format!("{}→{}", planned.vcpu, planned.cpus)).collect();
            format!("the nearest that would do: {} (vCPU→CPU {})", nearest.takes, pins.join(" "))
        });
        with_hints(kind, hint, error)
    }
}

impl From<PolicyFileError> for Failure {
    fn from(error: PolicyFileError) -> Failure {
        let kind = match &error {
            PolicyFileError::Read { source, .. } => permission_or(source, Kind::Usage),
            _ => Kind::Usage,
        };
        let hint = match &error {
            PolicyFileError::NoCluster { .. } => {
                "nothing was changed; `systemctl status pve-cluster` tells more"
            }
            _ => "nothing was changed",
        };
        Failure::new(kind, error).hint(hint)
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
        with_hints(kind, hint, error)
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
        with_hints(kind, hint, error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Failure {
        Failure::new(Kind::No, error)
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
        let (kind, hint) = match error {
            StartError::Vm(error) => return error.into(),
            StartError::Discover(error) => return error.into(),
            StartError::BootId(error) => return error.into(),
            StartError::Plan(error) | StartError::NoRoom { reason: error, .. } => {
                return error.into();
            }
            StartError::State(error) => return error.into(),
            StartError::Journal(error) | StartError::Restore(RestoreError::Journal(error)) => {
                return error.into();
            }
            StartError::Host(error) => return error.into(),
            StartError::AlreadyAttached { ref vm, .. } => {
                (Kind::No, format!("`qmpin detach {vm}` ends it and restores everything"))
            }
            StartError::NotEnded { .. } => {
                (Kind::No, "its journal stays: try again when it has ended".to_owned())
            }
            StartError::NameTaken { ref vm, .. } => {
                let hint = format!(
                    "`qmpin detach {vm}` restores everything of that process; or attach this one under \
                     another name"
                );
                (Kind::No, hint)
            }
            StartError::OtherName { ref other, .. } => {
                (Kind::No, format!("`qmpin detach {other}` first, or use that name"))
            }
            StartError::LeftOver { ref vm, .. } => {
                (Kind::No, format!("nothing was forgotten: `qmpin detach {vm}` tries again"))
            }
            StartError::NotUndone { .. } => {
                (Kind::Partial, "nothing was forgotten: `qmpin detach` tries again".to_owned())
            }
            StartError::UnknownUndo { ref unknown, .. } => {
                let path = unknown.path.display();
                (Kind::Partial, format!("or remove {path} if that is not needed"))
            }
            StartError::NotPermitted { .. } => (Kind::Permission, "run it as root".to_owned()),
            StartError::Look(_) => (Kind::Partial, "`qmpin detach` restores everything".to_owned()),
            StartError::Restore(RestoreError::Look(ref read)) => {
                let kind = permission_or(&read.source, Kind::Partial);
                (kind, "nothing was forgotten: try again".to_owned())
            }
            StartError::Watch { ref source, .. } if is_shortage(source) => {
                let hint = "raise the limits of this process: `ulimit -n`, `ulimit -u`";
                (Kind::No, hint.to_owned())
            }
            StartError::Watch { ref source, .. } => {
                return Failure::new(permission_or(source, Kind::NoVm), error);
            }
        };
        Failure::new(kind, error).hint(hint)
    }
}

fn with_hints(
    kind: Kind,
    hints: impl IntoIterator<Item = String>,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Failure {
    hints.into_iter().fold(Failure::new(kind, error), Failure::hint)
}
