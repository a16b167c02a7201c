//! The knob *affinity*: one thread's mask, by `sched_setaffinity(2)`.

use std::io;

use crate::cgroups::CgroupTree;
use crate::discover::{cpusets, tasks};
use crate::knobs::affinity::apply::Bench;
use crate::knobs::affinity::diff::Step;
use crate::knobs::host::kernel_threads;
use crate::knobs::outcome::Outcome;
use crate::mask::Mask;
use crate::sched::is_gone;
use crate::sysroot::ReadError;
use crate::threads::{Role, ThreadKey};

/// Checks, writes, reads back.
pub(crate) fn write(bench: Bench<'_>, step: &Step) -> Outcome<Mask> {
    match is_still_there(bench, step.thread, &step.role) {
        Ok(true) => {}
        Ok(false) => return Outcome::Gone,
        Err(error) => return Outcome::Refused { error: error.source },
    }
    let tid = step.thread.tid;
    if let Err(error) = bench.sched.set_affinity(tid, &step.to) {
        return said_no(with_cause(bench, step, error));
    }
    match bench.sched.affinity(tid) {
        Ok(now) if step.to == now => Outcome::Done,
        Ok(now) => Outcome::Narrowed { to: now.into() },
        Err(error) => said_no(error),
    }
}

/// `EINVAL` says that the thread's cpuset has none of these CPUs: names the cgroup.
fn with_cause(bench: Bench<'_>, step: &Step, error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(nix::libc::EINVAL) {
        return error;
    }
    let (tree, pid) = (CgroupTree::of(bench.root), bench.process.pid);
    match cpusets::forbidden_by(bench.root, &tree, pid, step.thread.tid, &step.to) {
        Some(why) => io::Error::new(error.kind(), format!("{error}: {why}")),
        None => error,
    }
}

fn said_no(error: io::Error) -> Outcome<Mask> {
    if is_gone(&error) { Outcome::Gone } else { Outcome::Refused { error } }
}

/// The last check before the write: a thread number may belong to another thread by now.
pub(crate) fn is_still_there(
    bench: Bench<'_>,
    key: ThreadKey,
    role: &Role,
) -> Result<bool, ReadError> {
    // A grip was taken before the thread was seen to be of the process, so its word is enough.
    if let Some(lives) = bench.grips.lives(key) {
        return Ok(lives);
    }
    Ok(tasks::is_thread_of(bench.root, bench.process.pid, key)?
        || (matches!(role, Role::Kernel | Role::Vhost)
            && kernel_threads::is_kernel_thread(bench.root, key)?))
}
