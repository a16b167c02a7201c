//! The VM: which process it is, and who is which thread. The first reading, for every command.
//!
//! ```text
//!   pid file ─▶ process ─┐
//!   socket ─▶ peer ──────┴─ agree? ─▶ list threads ─┬─▶ QMP: who is who ─┬─▶ scan ─▶ VmView
//!                                                   └─▶ read their lines ┘
//! ```

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::task::yield_now;

use super::namespaces::in_our_numbers;
use super::peer::prove_peer;
use super::process::{ProcessError, VmLocation};
use super::tasks::{Identified, Scan, Survey, TasksError};
use super::{process, tasks};
use crate::guest::{Guest, GuestMemory, GuestVcpu};
use crate::ids::{Tid, VmName};
use crate::peer::Peer;
use crate::qmp::{Channel, ChannelPaths, Limits, PeerCheck, QmpError, Roles};
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// How many threads are read before it is looked whether QEMU has answered: some 50 µs' worth.
const THREADS_AT_A_TIME: usize = 4;

/// A VM as it was found.
#[derive(Debug)]
pub struct VmView {
    /// Its QEMU process.
    pub process: ProcessKey,
    /// The way to QEMU.
    pub channel: Channel,
    /// What QMP said, already checked against the process.
    pub roles: Roles,
    /// Whose role is known.
    pub identified: Identified,
    /// Every thread.
    pub scan: Scan,
}

/// A VM whose socket another client holds.
#[derive(Debug)]
pub struct Held {
    /// What was tried.
    pub error: QmpError,
    /// Where a socket for qmpin alone would be found.
    pub own: PathBuf,
    /// Where the VM was found.
    pub location: VmLocation,
}

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It does not run, or its process is not to be believed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Another client holds the socket that it shares, and it has none for qmpin.
    #[error("{}", .0.error)]
    Held(Box<Held>),
    /// What it said does not agree with its process.
    #[error(transparent)]
    Tasks(#[from] TasksError),
}

/// The process that a socket's peer turned out to be, and its threads before QEMU was asked.
#[derive(Debug, Default)]
struct FirstSight {
    process: Cell<Option<ProcessKey>>,
    before: RefCell<Vec<Tid>>,
    accepted: Notify,
}

impl FirstSight {
    /// The process, once there was a peer.
    fn process(&self, target: Target<'_>) -> Result<ProcessKey, ProcessError> {
        let none = || ProcessError::NoPeer { socket: target.paths.shared.clone() };
        self.process.get().ok_or_else(none)
    }

    /// Reads the lines of the threads seen, and checks now and then whether QEMU has answered.
    async fn survey(&self, root: &SysRoot) -> Option<Survey> {
        let mut survey = Survey::begin(root, self.process.get()?.pid).ok()?;
        let tids = self.before.borrow().clone();
        for few in tids.chunks(THREADS_AT_A_TIME) {
            for tid in few {
                survey.read(*tid);
            }
            yield_now().await;
        }
        Some(survey)
    }
}

/// Which way QEMU is asked first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FirstWay {
    /// The VM's own socket for us, where there is one, else a lease.
    Best,
    /// A lease: the own socket is another qmpin's to hold, or not wanted.
    Lease,
}

/// How QEMU's sockets are found.
#[must_use]
pub fn channel_paths(vm: &VmName, location: &VmLocation) -> ChannelPaths {
    match location {
        VmLocation::Proxmox { dir } => ChannelPaths::proxmox(dir, vm),
        VmLocation::Socket { path } => ChannelPaths::plain(path),
    }
}

/// Which VM to read, and how to ask it.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its name.
    pub vm: &'a VmName,
    /// Where it is found.
    pub location: &'a VmLocation,
    /// Its sockets.
    pub paths: &'a ChannelPaths,
    /// Which is tried first.
    pub first: FirstWay,
    /// What QEMU is granted.
    pub limits: &'a Limits,
}

/// Finds the VM, asks it, and reads its threads. What there is to read is read while QEMU answers, a few
/// threads at a time, so that an answer is taken within microseconds and the socket let go; `meanwhile`
/// is done then, too, with the process, and should take no longer.
///
/// # Errors
/// [`VmError`], and those of `meanwhile`, which are not kept waiting for QEMU.
pub async fn read_vm<T, E: From<VmError>>(
    root: &SysRoot,
    sched: &dyn Sched,
    target: Target<'_>,
    meanwhile: impl FnOnce(ProcessKey) -> Result<T, E>,
) -> Result<(VmView, T), E> {
    let process = Cell::new(expected(root, target).map_err(VmError::from)?);
    let sight = Rc::new(FirstSight { process, ..FirstSight::default() });
    let asking = async { ask(root, target, &sight).await.map_err(E::from) };
    let reading = async {
        sight.accepted.notified().await;
        let survey = sight.survey(root).await;
        let process = sight.process(target).map_err(VmError::from)?;
        Ok((survey, meanwhile(process)?))
    };
    let (asked, (survey, done)) = tokio::try_join!(biased; asking, reading)?;
    Ok((join(root, sched, target, &sight, asked, survey).await?, done))
}

/// The process that a Proxmox VM's pid file names.
fn expected(root: &SysRoot, target: Target<'_>) -> Result<Option<ProcessKey>, ProcessError> {
    match target.location {
        VmLocation::Proxmox { dir } => process::proxmox_process(root, dir, target.vm).map(Some),
        VmLocation::Socket { .. } => Ok(None),
    }
}

async fn ask(
    root: &SysRoot,
    target: Target<'_>,
    sight: &Rc<FirstSight>,
) -> Result<(Channel, Roles), VmError> {
    let check = peer_check(root.clone(), Rc::clone(sight));
    let (paths, limits) = (target.paths.clone(), target.limits.clone());
    let asked = match target.first {
        FirstWay::Best => Channel::first(paths, limits, check).await,
        FirstWay::Lease => Channel::first_by_lease(paths, limits, check).await,
    };
    asked.map_err(|error| match error {
        QmpError::Held { .. } => {
            let (own, location) = (target.paths.own.clone(), target.location.clone());
            VmError::Held(Box::new(Held { error, own, location }))
        }
        error => VmError::Qmp(error),
    })
}

/// Joins what QEMU said with the threads that there are.
async fn join(
    root: &SysRoot,
    sched: &dyn Sched,
    target: Target<'_>,
    sight: &FirstSight,
    (mut channel, mut roles): (Channel, Roles),
    survey: Option<Survey>,
) -> Result<VmView, VmError> {
    let process = sight.process(target)?;
    let before = sight.before.take();
    let mut scan = tasks::scan(root, sched, process.pid, survey)?;
    let mut joined = identify(root, process, &before, &mut roles, &scan);
    if joined.is_err() {
        // A thread that ended between the answer and the scan looks like a lie. Once more.
        let before = tasks::list(root, process.pid)?;
        roles = channel.roles().await?;
        scan = tasks::scan(root, sched, process.pid, None)?;
        joined = identify(root, process, &before, &mut roles, &scan);
    }
    Ok(VmView { process, channel, roles, identified: joined?, scan })
}

/// Finds the threads that QEMU named; from then on the roles have our numbers.
fn identify(
    root: &SysRoot,
    process: ProcessKey,
    before: &[Tid],
    roles: &mut Roles,
    scan: &Scan,
) -> Result<Identified, TasksError> {
    *roles = in_our_numbers(root, process.pid, std::mem::take(roles))?;
    tasks::identify(process, before, roles, scan)
}

/// Accepts one process: the one that the pid file names, or the listener of the first connection. Each peer is proved
/// to be it. Its threads are listed each time, because QEMU is about to be asked.
fn peer_check(root: SysRoot, sight: Rc<FirstSight>) -> PeerCheck {
    Box::new(move |peer: &Peer| {
        let pid = peer.pid();
        let process = match sight.process.get() {
            Some(process) if process.pid != pid => {
                return Err(ProcessError::WrongPeer { found: pid, expected: process.pid }.into());
            }
            known => {
                let found = prove_peer(&root, peer)?;
                if known.is_some_and(|known| known != found) {
                    return Err(ProcessError::Replaced { pid }.into());
                }
                found
            }
        };
        sight.process.set(Some(process));
        sight.before.replace(tasks::list(&root, pid)?);
        // It keeps the wake-up for a caller that waits later.
        sight.accepted.notify_one();
        Ok(())
    })
}

/// The guest as the planner wants it.
#[must_use]
pub fn guest(roles: &Roles) -> Guest {
    let vcpus = roles.vcpus.iter().map(|vcpu| GuestVcpu {
        index: vcpu.index,
        node: vcpu.guest.node,
        socket: vcpu.guest.socket,
        die: vcpu.guest.die,
        cluster: vcpu.guest.cluster.or(vcpu.guest.module),
        core: vcpu.guest.core,
        thread: vcpu.guest.thread,
    });
    let iothreads = roles.iothreads.iter().map(|io| io.id.clone());
    let beyond = roles.beyond.clone();
    let memory = roles.memory.iter().map(|backend| GuestMemory {
        guest_node: backend.guest_node,
        bytes: backend.bytes,
        bound: backend.on.clone(),
    });
    Guest {
        vcpus: vcpus.collect(),
        iothreads: iothreads.collect(),
        beyond,
        memory: memory.collect(),
    }
}
