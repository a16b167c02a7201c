//! Why a VM could not be attached, or a pass could not be finished.

use crate::attachment::settings::Settings;
use crate::discover::tasks::TasksError;
use crate::discover::{DiscoverError, VmError, tasks};
use crate::guest::Guest;
use crate::ids::{Pid, Tid, VmName};
use crate::journal::{JournalError, UnknownLines};
use crate::knobs::affinity::restore::RestoreError;
use crate::knobs::host::keep::HostError;
use crate::knobs::partition::apply::Refused;
use crate::leases::StateError;
use crate::plan::PlanError;
use crate::sysroot::ReadError;
use crate::threads::ProcessKey;

/// Why a VM could not be attached or restored.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process follows the VM already.
    #[error("VM {vm} is attached already{}", by(*pid))]
    AlreadyAttached {
        /// Which VM.
        vm: VmName,
        /// By which process, where its lease says so.
        pid: Option<Pid>,
    },
    /// The process that has the VM does not end.
    #[error("VM {vm} is in use{} and does not end", used_by(*pid))]
    NotEnded {
        /// Which VM.
        vm: VmName,
        /// By which process, where that is known.
        pid: Option<Pid>,
    },
    /// The name is that of another QEMU, which has not ended as far as is known.
    #[error("VM {vm} is attached as another process: {pid}, which {}", still_runs(source.as_ref()))]
    NameTaken {
        /// Which VM.
        vm: VmName,
        /// The process that was attached under this name.
        pid: Pid,
        /// Why it could not be learnt whether it lives.
        #[source]
        source: Option<ReadError>,
    },
    /// The process is attached under another name.
    #[error("VM {vm} cannot be attached: process {} is attached as VM {other}", process.pid)]
    OtherName {
        /// The name that was asked for.
        vm: VmName,
        /// The process.
        process: ProcessKey,
        /// The name that it has.
        other: VmName,
    },
    /// What a QEMU of this name that is gone has left could not be restored, and is not to be forgotten.
    #[error("could not restore what VM {vm} changed earlier: {refused}")]
    LeftOver {
        /// Which VM.
        vm: VmName,
        /// What was refused.
        refused: Refused,
    },
    /// The journal of a QEMU of this name that is gone has lines that this version cannot undo.
    #[error("VM {vm} was attached before, and not all of that is undone: {unknown}")]
    UnknownUndo {
        /// Which VM.
        vm: VmName,
        /// Which lines.
        unknown: UnknownLines,
    },
    /// It could not be attached, and what had been written before is not all restored.
    #[error("{source}; not all is restored: {}", left.join("; "))]
    NotUndone {
        /// Why it could not be attached.
        source: Box<StartError>,
        /// What became of restoring, in sentences.
        left: Vec<String>,
    },
    /// The VM could not be read.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The host could not be read.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// The boot id could not be read.
    #[error(transparent)]
    BootId(ReadError),
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no room for the VM on this host now.
    #[error("{reason}")]
    NoRoom {
        /// What is known of the VM, so that it can be planned again without asking QEMU.
        seen: Box<Seen>,
        /// What it needs and what there is. (Not a source: it is the message.)
        reason: PlanError,
    },
    /// The state folder could not be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The journal could not be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Not one thread could be moved.
    #[error("not permitted to move any thread of VM {vm}, such as {who}")]
    NotPermitted {
        /// Which VM.
        vm: VmName,
        /// `vcpu 0, tid 533`.
        who: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It was applied, and could not be checked a second time.
    #[error("could not check all threads again")]
    Look(#[from] PassError),
    /// The rest of the host could not be dealt with.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Something to watch the VM by could not be had.
    #[error("could not watch {what}")]
    Watch {
        /// `the QEMU process`.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// What a visit of QEMU has shown of a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Its process.
    pub process: ProcessKey,
    /// What it needs.
    pub guest: Guest,
    /// The threads of its vCPUs.
    pub vcpus: Vec<Tid>,
}

fn by(pid: Option<Pid>) -> String {
    pid.map_or(String::new(), |pid| format!(": process {pid} follows it"))
}

fn used_by(pid: Option<Pid>) -> String {
    pid.map_or(" by another qmpin".to_owned(), |pid| {
        format!(" by process {pid}, which was asked to end,")
    })
}

fn still_runs(unknown: Option<&ReadError>) -> &'static str {
    if unknown.is_some() { "may still run" } else { "still runs" }
}

impl StartError {
    /// A pass that failed before anything was applied.
    pub(crate) fn before_the_first_write(vm: VmName, error: PassError) -> StartError {
        match error {
            PassError::OtherName { process, other } => StartError::OtherName { vm, process, other },
            PassError::Tasks(error) => StartError::Vm(VmError::Tasks(error)),
            PassError::Discover(error) => StartError::Discover(error),
            PassError::Plan(error) => StartError::Plan(error),
            PassError::State(error) => StartError::State(error),
            PassError::Journal(error) => StartError::Journal(error),
        }
    }

    pub(crate) fn already_attached(settings: &Settings) -> StartError {
        let pid = settings.state.supervisor(&settings.vm).map(|process| process.pid);
        StartError::AlreadyAttached { vm: settings.vm.clone(), pid }
    }
}

/// Why a pass could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The threads could not be read.
    #[error(transparent)]
    Tasks(#[from] TasksError),
    /// The host could not be read.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// There is no plan any more.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The lease could not be written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The undo could not be made durable.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The process is attached under another name.
    #[error("process {} is attached as VM {other}", process.pid)]
    OtherName {
        /// The process.
        process: ProcessKey,
        /// The name that it is attached under.
        other: VmName,
    },
}

impl PassError {
    /// Whether it only says that QEMU has ended.
    #[must_use]
    pub fn means_gone(&self) -> bool {
        matches!(self, PassError::Tasks(error) if tasks::means_gone(error))
    }
}
