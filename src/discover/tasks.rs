//! The threads of a VM: QMP says which are vCPUs and iothreads, `/proc` has the rest.
//!
//! ```text
//!   list ──▶ ask QMP ──▶ scan ──▶ identify ──▶ observe
//!    │                    │
//!    └── in both: its role is known for good      only in the scan: created meanwhile, ask again
//! ```
//!
//! A thread is (tid, start time). A tid that QMP names counts only if it is a thread of the QEMU
//! process; QEMU is not trusted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::grips::Grips;
use super::stat::{self, Stat};
use crate::cpuset::CpuSet;
use crate::ids::{Pid, Tid};
use crate::mask::{Mask, Masks};
use crate::qmp::Roles;
use crate::sched::Sched;
use crate::sysroot::{Folder, ReadError, SysRoot};
use crate::threads::{ProcessKey, Role, Thread, ThreadKey};

/// How old a survey may be: names may have changed since, and are shown.
const MOMENT: Duration = Duration::from_millis(100);

/// How often it looks again for threads created meanwhile. Each pass makes the window smaller; more than
/// two are not seen in practice.
pub const LOOKS_MAX: usize = 8;

/// The roles that are known for good.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identified {
    named: BTreeMap<ThreadKey, Role>,
    settled: BTreeSet<ThreadKey>,
}

impl Identified {
    /// The threads that QMP named, and as what.
    pub fn named(&self) -> impl Iterator<Item = (ThreadKey, &Role)> {
        self.named.iter().map(|(key, role)| (*key, role))
    }

    /// The role that QMP gave a thread.
    #[must_use]
    pub fn role(&self, key: ThreadKey) -> Option<&Role> {
        self.named.get(&key)
    }
}

/// The threads as they are now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// All living threads of the process, and kernel threads that work for it.
    pub threads: Vec<Thread>,
    /// Those that QMP has not been asked about yet.
    pub unidentified: Vec<ThreadKey>,
}

/// Why the threads could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// The process has no threads any more, or they cannot be listed.
    #[error("could not list the threads of process {pid}")]
    List {
        /// Which process.
        pid: Pid,
        /// Why.
        #[source]
        source: Box<ReadError>,
    },
    /// QEMU named a thread that is not its own.
    #[error("QEMU says that {what} is thread {tid}, but process {pid} has no such thread")]
    NotItsThread {
        /// `vCPU 3`, `iothread io0`.
        what: String,
        /// The thread it named.
        tid: Tid,
        /// The QEMU process.
        pid: Pid,
    },
    /// QEMU named one thread twice.
    #[error("QEMU says that {first} and {second} are both thread {tid}")]
    NamedTwice {
        /// The first role.
        first: String,
        /// The second.
        second: String,
        /// The thread.
        tid: Tid,
    },
    /// QEMU named its main thread as a vCPU or iothread.
    #[error("QEMU says that {what} is thread {tid}, which is its main thread")]
    MainThread {
        /// `vCPU 3`, `iothread io0`.
        what: String,
        /// The thread it named.
        tid: Tid,
    },
}

impl TasksError {
    fn not_listed(pid: Pid) -> impl FnOnce(ReadError) -> TasksError {
        move |source| TasksError::List { pid, source: Box::new(source) }
    }

    pub(crate) fn not_its_thread(role: &Role, tid: Tid, pid: Pid) -> TasksError {
        TasksError::NotItsThread { what: in_words(role), tid, pid }
    }
}

/// The numbers of a process's threads, ascending. One folder is read and nothing else.
///
/// # Errors
/// [`TasksError::List`]: most likely the process is gone.
pub fn list(root: &SysRoot, pid: Pid) -> Result<Vec<Tid>, TasksError> {
    Ok(open(root, pid).map_err(TasksError::not_listed(pid))?.1)
}

fn open(root: &SysRoot, pid: Pid) -> Result<(Folder, Vec<Tid>), ReadError> {
    let folder = root.folder(&task_folder(pid))?;
    let tids = folder.numbers()?.into_iter().map(Tid).collect();
    Ok((folder, tids))
}

/// One thread as `/proc` and the scheduler have it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Seen {
    key: ThreadKey,
    stat: Stat,
    allowed: Mask,
}

/// All living threads of a process, ascending by number.
#[derive(Debug, Default)]
pub struct Scan {
    threads: Vec<Seen>,
    grips: Grips,
}

impl Scan {
    /// Takes out the grips, to prove by them that a thread is still the one that was scanned.
    pub fn take_grips(&mut self) -> Grips {
        std::mem::take(&mut self.grips)
    }

    /// Whether any thread may run on some of these CPUs only.
    #[must_use]
    pub fn is_confined(&self, online: &CpuSet) -> bool {
        self.threads.iter().any(|thread| !online.is_subset(&thread.allowed))
    }
}

/// The lines of some threads, and grips on them, read while QEMU is being asked.
#[derive(Debug)]
pub struct Survey {
    taken: Instant,
    folder: Folder,
    is_live: bool,
    /// Ascending by number.
    lines: Vec<(Tid, Stat)>,
    grips: Grips,
}

impl Survey {
    /// Nothing read yet.
    ///
    /// # Errors
    /// [`ReadError`]: most likely the process is gone.
    pub fn begin(root: &SysRoot, pid: Pid) -> Result<Survey, ReadError> {
        Ok(Survey {
            taken: Instant::now(),
            folder: root.folder(&task_folder(pid))?,
            is_live: root.is_live(),
            lines: Vec::new(),
            grips: Grips::default(),
        })
    }

    /// Reads a thread's line; threads come in ascending order. One that has ended is left out.
    pub fn read(&mut self, tid: Tid) {
        // The grip comes before the line: only so it proves whose line that is.
        let grip = if self.is_live { self.grips.take(tid) } else { None };
        let Ok(stat) = stat_in(&self.folder, tid) else { return };
        if let Some(grip) = grip {
            self.grips.keep(ThreadKey { tid, start: stat.start }, grip);
        }
        self.lines.push((tid, stat));
    }
}

/// Reads every thread of the process, with its mask. Lines of a survey a moment ago are taken from
/// there; a thread whose number was given to another since is found out when it is about to be written.
///
/// # Errors
/// [`TasksError::List`]. A thread that ends meanwhile is left out.
pub fn scan(
    root: &SysRoot,
    sched: &dyn Sched,
    pid: Pid,
    earlier: Option<Survey>,
) -> Result<Scan, TasksError> {
    let (mut lines, grips) = match earlier {
        Some(survey) if survey.taken.elapsed() < MOMENT => (survey.lines, survey.grips),
        _ => (Vec::new(), Grips::default()),
    };
    let (folder, tids) = open(root, pid).map_err(TasksError::not_listed(pid))?;
    let (mut threads, mut masks) = (Vec::with_capacity(tids.len()), Masks::default());
    for tid in tids {
        let stat = match lines.binary_search_by_key(&tid, |(tid, _)| *tid) {
            Ok(at) => std::mem::take(&mut lines[at].1),
            Err(_) => match stat_in(&folder, tid) {
                Ok(stat) => stat,
                Err(_) => continue,
            },
        };
        let Ok(allowed) = sched.affinity(tid) else { continue };
        let allowed = masks.of(allowed);
        threads.push(Seen { key: ThreadKey { tid, start: stat.start }, stat, allowed });
    }
    Ok(Scan { threads, grips })
}

/// Names every living thread of the process for good.
///
/// A process that has gone has none.
///
/// # Errors
/// [`ReadError`] where a thread that is there could not be read.
pub fn keys(root: &SysRoot, pid: Pid) -> Result<Vec<ThreadKey>, ReadError> {
    let (folder, tids) = match open(root, pid) {
        Ok(opened) => opened,
        Err(error) if error.is_gone() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut keys = Vec::with_capacity(tids.len());
    for tid in tids {
        match stat_in(&folder, tid) {
            Ok(stat) => keys.push(ThreadKey { tid, start: stat.start }),
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

/// Joins what QMP said with the threads that were listed *before* it was asked, and those scanned
/// after.
///
/// # Errors
/// [`TasksError`] where QEMU named a thread that is not its own, or one thread twice. A thread that
/// ended just now looks the same: ask once more before you believe it.
pub fn identify(
    process: ProcessKey,
    before: &[Tid],
    roles: &Roles,
    scan: &Scan,
) -> Result<Identified, TasksError> {
    let pid = process.pid;
    let vcpus = roles.vcpus.iter().map(|vcpu| (Role::Vcpu(vcpu.index), vcpu.tid));
    let iothreads = roles.iothreads.iter().map(|io| (Role::Iothread(io.id.clone()), io.tid));
    let mut by_tid: BTreeMap<Tid, Role> = BTreeMap::new();
    for (role, tid) in vcpus.chain(iothreads) {
        let what = in_words(&role);
        if tid == pid.main_thread() {
            return Err(TasksError::MainThread { what, tid });
        }
        if let Some(first) = by_tid.insert(tid, role) {
            return Err(TasksError::NamedTwice { first: in_words(&first), second: what, tid });
        }
    }
    let mut identified = Identified::default();
    for seen in &scan.threads {
        let role = by_tid.remove(&seen.key.tid);
        if role.is_none() && before.binary_search(&seen.key.tid).is_err() {
            continue;
        }
        identified.settled.insert(seen.key);
        if let Some(role) = role {
            identified.named.insert(seen.key, role);
        }
    }
    match by_tid.into_iter().next() {
        Some((tid, role)) => Err(TasksError::not_its_thread(&role, tid, pid)),
        None => Ok(identified),
    }
}

fn in_words(role: &Role) -> String {
    match role {
        Role::Vcpu(index) => format!("vCPU {index}"),
        Role::Iothread(id) => format!("iothread {id}"),
        other => other.name().to_owned(),
    }
}

/// Gives every scanned thread its role.
#[must_use]
pub fn observe(process: ProcessKey, scan: Scan, identified: &Identified) -> Observed {
    let mut observed = Observed::default();
    for Seen { key, stat, allowed } in scan.threads {
        if !identified.settled.contains(&key) {
            observed.unidentified.push(key);
        }
        let role = match identified.named.get(&key) {
            Some(role) => role.clone(),
            None => role_by_proc(&stat, process.pid, key.tid),
        };
        observed.threads.push(thread(key, role, stat, allowed));
    }
    observed
}

/// Whether the thread is still the one it was, and still of this process.
///
/// # Errors
/// [`ReadError`] where that could not be learnt.
pub fn is_thread_of(root: &SysRoot, process: Pid, key: ThreadKey) -> Result<bool, ReadError> {
    let stat = stat::read(root, &format!("proc/{process}/task/{}/stat", key.tid));
    or_gone(stat.map(|stat| stat.start == key.start))
}

/// Whether there is still this thread, whosever it is.
///
/// # Errors
/// [`ReadError`] where that could not be learnt.
pub fn is_thread(root: &SysRoot, key: ThreadKey) -> Result<bool, ReadError> {
    let stat = stat::of(root, key.tid);
    or_gone(stat.map(|stat| !stat.is_dead() && stat.start == key.start))
}

/// The thread's name, for display only; `None`: it has ended.
#[must_use]
pub fn name(root: &SysRoot, key: ThreadKey) -> Option<String> {
    let stat = stat::of(root, key.tid).ok()?;
    (stat.start == key.start).then_some(stat.comm)
}

pub(crate) fn or_gone(holds: Result<bool, ReadError>) -> Result<bool, ReadError> {
    match holds {
        Err(error) if error.is_gone() => Ok(false),
        holds => holds,
    }
}

fn task_folder(pid: Pid) -> String {
    format!("proc/{pid}/task")
}

fn stat_in(tasks: &Folder, tid: Tid) -> Result<Stat, ReadError> {
    stat::read_in(tasks, &format!("{tid}/stat"))
}

fn role_by_proc(stat: &Stat, pid: Pid, tid: Tid) -> Role {
    let comm = stat.comm.as_str();
    if tid == pid.main_thread() {
        Role::Emulator
    } else if stat.is_io_worker() {
        Role::Worker
    } else if comm.starts_with("vhost-") {
        Role::Vhost
    } else if stat.is_user_worker()
        || matches!(comm, "worker" | "kvm-nx-lpage-re")
        || comm.starts_with("iou-wrk-")
    {
        Role::Worker
    } else {
        Role::Emulator
    }
}

pub(crate) fn thread(key: ThreadKey, role: Role, stat: Stat, allowed: Mask) -> Thread {
    Thread { key, role, comm: stat.comm, allowed, last_cpu: stat.last_cpu }
}

/// Whether an error of this module only means that the process has ended.
#[must_use]
pub fn means_gone(error: &TasksError) -> bool {
    matches!(error, TasksError::List { source, .. } if source.is_gone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StartTicks;

    const QEMU: Pid = Pid(529);
    /// `PF_IO_WORKER`, `PF_USER_WORKER` (`include/linux/sched.h`).
    const IO_WORKER: u32 = 0x0000_0010;
    const USER_WORKER: u32 = 0x0000_4000;

    fn stat(comm: &str, flags: u32) -> Stat {
        let (comm, start) = (comm.to_owned(), StartTicks(1));
        Stat { comm, state: 'S', flags, start, last_cpu: None }
    }

    #[test]
    fn a_thread_of_the_process_is_what_the_kernel_says_and_else_what_its_name_says() {
        for (comm, flags, role) in [
            ("qemu-system-x86", 0, Role::Emulator),
            ("kvm", 0, Role::Emulator),
            ("call_rcu", 0, Role::Emulator),
            // Only QMP says who is a vCPU or an iothread.
            ("CPU 0/KVM", 0, Role::Emulator),
            ("IO iothread0", 0, Role::Emulator),
            // QEMU's own pool of threads.
            ("worker", 0, Role::Worker),
            ("workers", 0, Role::Emulator),
            ("my worker", 0, Role::Emulator),
            // io_uring: by the kernel's flag, whatever the name, or by the name.
            ("iou-wrk-529", 0, Role::Worker),
            ("iou-wrk-530", IO_WORKER, Role::Worker),
            ("vhost-529", IO_WORKER, Role::Worker),
            ("iou-sqp-529", IO_WORKER, Role::Worker),
            // vhost since Linux 6.4 is such a thread, KVM's page recovery since 6.13.
            ("vhost-529", USER_WORKER, Role::Vhost),
            ("vhost-7", USER_WORKER, Role::Vhost),
            ("kvm-nx-lpage-re", USER_WORKER, Role::Worker),
            ("anything", USER_WORKER, Role::Worker),
            ("vhost-529", 0, Role::Vhost),
            ("kvm-nx-lpage-re", 0, Role::Worker),
            ("kvm-nx-lpage-recovery-529", 0, Role::Emulator), // no thread's name is that long
            // A name of the kernel's that a thread has given itself is nothing.
            ("kvm-pit/7", 0, Role::Emulator),
            ("kvm-pit/529", 0, Role::Emulator),
            ("", 0, Role::Emulator),
        ] {
            assert_eq!(role_by_proc(&stat(comm, flags), QEMU, Tid(530)), role, "{comm} {flags:#x}");
            // The first thread of a process is QEMU's main loop, whatever it is called.
            let main = role_by_proc(&stat(comm, flags), QEMU, QEMU.main_thread());
            assert_eq!(main, Role::Emulator, "{comm} {flags:#x}");
        }
    }
}
