//! The kernel's own threads: which there are, which may be moved, and which work for a VM.

use std::collections::BTreeMap;

use crate::discover::stat::Stat;
use crate::discover::tasks::{or_gone, thread};
use crate::discover::{children_of, stat};
use crate::ids::{KTHREADD, Pid, Tid};
use crate::sched::Sched;
use crate::shown;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::{Role, Thread, ThreadKey};

/// Where kernel threads are looked for. What is found by either is one only by its flag (`PF_KTHREAD`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KthreadScan {
    /// All numbers of `/proc`: a thread that exists all the while is found. It costs a line, some 2 µs, for each
    /// process of the host that is none of the kernel's.
    All,
    /// The children of their parent: one short file. As threads end while it is read, the kernel may leave out
    /// others (`fs/proc/array.c: get_children_pid`), so it is for who looks again and can wait.
    Children,
}

/// The numbers of all that may be kernel threads, but for their parent: its `stat` says what it is. On
/// a kernel without `CONFIG_PROC_CHILDREN`, all processes.
pub(crate) fn all_kernel_threads(root: &SysRoot, scan: KthreadScan) -> Vec<Tid> {
    if scan == KthreadScan::Children
        && let Some(children) = children_of(root, KTHREADD)
    {
        return children;
    }
    let numbers = root.folder("proc").and_then(|folder| folder.numbers()).unwrap_or_default();
    numbers.into_iter().map(Tid).filter(|tid| *tid != KTHREADD).collect()
}

/// Finds kernel threads that work for this VM outside its process: `kvm-pit/PID`, and on older
/// kernels `vhost-PID` and `kvm-nx-lpage-recovery-PID`. Their names are the kernel's, and
/// `PF_KTHREAD` cannot be forged. This reads a line per kernel thread of the host, so it is not for
/// the hot path.
#[must_use]
pub fn kernel_threads(
    root: &SysRoot,
    sched: &dyn Sched,
    process: Pid,
    scan: KthreadScan,
) -> Vec<Thread> {
    let mut found = Vec::new();
    for tid in all_kernel_threads(root, scan) {
        let Ok(stat) = stat::of(root, tid) else { continue };
        let Some(role) = kernel_role(&stat, process) else { continue };
        let Ok(allowed) = sched.affinity(tid) else { continue };
        found.push(thread(ThreadKey { tid, start: stat.start }, role, stat, allowed.into()));
    }
    found
}

fn kernel_role(stat: &Stat, process: Pid) -> Option<Role> {
    let (role, served) = stat.is_kernel_thread().then(|| serves(&stat.comm))??;
    (served == process).then_some(role)
}

/// The process that a kernel thread works for, by the name that the kernel gave it.
pub(crate) fn serves(comm: &str) -> Option<(Role, Pid)> {
    let names = [
        ("vhost-", Role::Vhost),
        ("kvm-pit/", Role::Kernel),
        ("kvm-nx-lpage-recovery-", Role::Kernel),
    ];
    names.into_iter().find_map(|(prefix, role)| {
        let pid = comm.strip_prefix(prefix)?.parse().ok()?;
        Some((role, Pid(pid)))
    })
}

/// How many there are of each name: `ksoftirqd/12` is one of the ksoftirqd.
#[must_use]
pub fn by_name<'a>(comms: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for comm in comms {
        *names.entry(comm.split(['/', ':']).next().unwrap_or(comm).to_owned()).or_default() += 1;
    }
    names
}

/// Kernel threads that are bound to their CPUs, by name: `the kernel binds them to their CPUs: 8 ksoftirqd`.
#[must_use]
pub fn bound_in_words<'a>(names: impl Iterator<Item = (&'a String, &'a usize)>) -> String {
    let names: Vec<String> =
        names.map(|(name, number)| format!("{number} {}", shown::line(name))).collect();
    format!("the kernel binds them to their CPUs: {}", names.join(", "))
}

/// Whether it is known to be a kernel thread that cannot be moved.
pub(crate) fn is_bound_kernel_thread(root: &SysRoot, key: ThreadKey) -> bool {
    let stat = stat::of(root, key.tid);
    stat.is_ok_and(|stat| stat.is_kernel_thread() && stat.is_bound() && stat.start == key.start)
}

/// Whether the kernel thread is still the one it was.
///
/// # Errors
/// [`ReadError`] where that could not be learnt.
pub fn is_kernel_thread(root: &SysRoot, key: ThreadKey) -> Result<bool, ReadError> {
    let stat = stat::of(root, key.tid);
    or_gone(stat.map(|stat| stat.is_kernel_thread() && stat.start == key.start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StartTicks;

    const QEMU: Pid = Pid(529);
    /// `PF_KTHREAD`, `PF_IO_WORKER`, `PF_USER_WORKER` (`include/linux/sched.h`).
    const KTHREAD: u32 = 0x0020_0000;
    const IO_WORKER: u32 = 0x0000_0010;
    const USER_WORKER: u32 = 0x0000_4000;

    fn stat(comm: &str, flags: u32) -> Stat {
        let (comm, start) = (comm.to_owned(), StartTicks(1));
        Stat { comm, state: 'S', flags, start, last_cpu: None }
    }

    #[test]
    fn a_kernel_thread_works_for_the_process_in_its_name_and_only_if_it_is_one() {
        for (comm, role) in [
            ("vhost-529", Some(Role::Vhost)),
            ("kvm-pit/529", Some(Role::Kernel)),
            ("kvm-nx-lpage-recovery-529", Some(Role::Kernel)),
            // Another VM's, or no VM's.
            ("vhost-52", None),
            ("vhost-5290", None),
            ("kvm-pit/7", None),
            ("vhost-", None),
            ("vhost-529x", None),
            ("vhost-99999999999999999999", None),
            ("kvm-pit-529", None),
            ("kvm-nx-lpage-re", None),
            ("kthreadd", None),
        ] {
            assert_eq!(kernel_role(&stat(comm, KTHREAD), QEMU), role, "{comm}");
            // Any process may call itself so.
            for flags in [0, IO_WORKER, USER_WORKER] {
                assert_eq!(kernel_role(&stat(comm, flags), QEMU), None, "{comm} {flags:#x}");
            }
        }
        assert_eq!(serves("vhost-7"), Some((Role::Vhost, Pid(7))));
        assert_eq!(serves("kvm-pit/8"), Some((Role::Kernel, Pid(8))));
    }
}
