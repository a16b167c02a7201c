//! The VM: which process it is, and who is which thread. The first look, for every command.
//!
//! ```text
//!   pid file ─▶ process ─┐
//!   socket ─▶ peer ──────┴─ agree? ─▶ list threads ─┬─▶ QMP: who is who ─┬─▶ scan ─▶ VmView
//!                                                   └─▶ read their lines ┘
//! ```

use std::cell::RefCell;
use std::rc::Rc;
use std::thread::{self, JoinHandle};

use super::process::{self, ProcessError, VmLocation};
use super::tasks::{self, Identified, NamedThreads, Scan, Survey, TasksError};
use crate::ids::{Pid, Tid, VmName};
use crate::plan::{Guest, GuestVcpu};
use crate::qmp::{Channel, ChannelPaths, Limits, PeerCheck, QmpError, Roles};
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

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

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It does not run, or its process is not to be believed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// What it said does not agree with its process.
    #[error(transparent)]
    Tasks(#[from] TasksError),
}

/// The process that a socket's peer turned out to be, and its threads before QEMU was asked.
#[derive(Debug, Default)]
struct FirstSight {
    process: Option<ProcessKey>,
    before: Vec<Tid>,
    /// Their lines, read by a thread of its own while QEMU finds its answer.
    survey: Option<JoinHandle<Survey>>,
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

/// Finds the VM, asks it, and reads its threads.
///
/// # Errors
/// [`VmError`].
pub async fn read_vm(
    root: &SysRoot,
    sched: &dyn Sched,
    target: Target<'_>,
) -> Result<VmView, VmError> {
    let Target { vm, location, .. } = target;
    let expected = match location {
        VmLocation::Proxmox { dir } => Some(process::proxmox_process(root, dir, vm)?),
        VmLocation::Socket { .. } => None,
    };
    let sight = Rc::new(RefCell::new(FirstSight { process: expected, ..FirstSight::default() }));
    let check = peer_check(root.clone(), Rc::clone(&sight));
    let (paths, limits) = (target.paths.clone(), target.limits.clone());
    let (mut channel, mut roles) = match target.first {
        FirstWay::Best => Channel::first(paths, limits, check).await?,
        FirstWay::Lease => Channel::first_by_lease(paths, limits, check).await?,
    };
    let (process, mut before, survey) = {
        let mut sight = sight.borrow_mut();
        let none = || ProcessError::NoPeer { socket: target.paths.shared.clone() };
        (sight.process.ok_or_else(none)?, sight.before.clone(), sight.survey.take())
    };
    let survey = survey.and_then(|survey| survey.join().ok());
    let mut scan = tasks::scan(root, sched, process.pid, survey)?;
    let mut joined = tasks::identify(process, &before, &named(&roles), &scan);
    if joined.is_err() {
        // A thread that ended between the answer and the scan looks like a lie. Once more.
        before = tasks::list(root, process.pid)?;
        roles = channel.roles().await?;
        scan = tasks::scan(root, sched, process.pid, None)?;
        joined = tasks::identify(process, &before, &named(&roles), &scan);
    }
    Ok(VmView { process, channel, roles, identified: joined?, scan })
}

/// Accepts the one process: the pid file's, or whoever was there first. Its threads are listed each
/// time, because QEMU is about to be asked.
fn peer_check(root: SysRoot, sight: Rc<RefCell<FirstSight>>) -> PeerCheck {
    Box::new(move |pid: Pid| {
        let mut sight = sight.borrow_mut();
        let process = match sight.process {
            Some(process) if process.pid != pid => {
                return Err(ProcessError::WrongPeer { found: pid, expected: process.pid }.into());
            }
            Some(process) if !process::is_alive(&root, process) => {
                return Err(ProcessError::Replaced { pid }.into());
            }
            Some(process) => process,
            None => process::process_key(&root, pid)?,
        };
        sight.process = Some(process);
        sight.before = tasks::list(&root, pid)?;
        let (root, before) = (root.clone(), sight.before.clone());
        let survey = thread::Builder::new().spawn(move || tasks::survey(&root, pid, &before));
        sight.survey = survey.ok(); // without, the lines are read later
        Ok(())
    })
}

/// The host threads that QMP named.
#[must_use]
pub fn named(roles: &Roles) -> NamedThreads {
    NamedThreads {
        vcpus: roles.vcpus.iter().map(|vcpu| (vcpu.index, vcpu.tid)).collect(),
        iothreads: roles.iothreads.iter().map(|io| (io.id.clone(), io.tid)).collect(),
    }
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
    Guest { vcpus: vcpus.collect(), iothreads: iothreads.collect() }
}
