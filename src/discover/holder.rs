//! Finds the supervisor of a VM whose files were removed: it lives, and the new lock file says nothing of it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::process_key;
use crate::ids::{Pid, VmName};
use crate::leases::StateDir;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// The beginning of the name of every process of qmpin's.
const COMM: &str = "qmpin";

/// Returns another process that holds the lock file of this VM that has no name any more. The kernel says so of its
/// open files (`proc_pid_fd(5)`), for any version of qmpin. Only a process of root, or of the user who runs this one,
/// counts: others cannot have opened the file.
///
/// It reads the name of every process. `/proc/locks` would be one file, but to read it stops all locking on the host
/// for a grace period of RCU, which is up to 20 ms (`locks_start` in `fs/locks.c`).
#[must_use]
pub fn unlinked_holder(state: &StateDir, vm: &VmName) -> Option<ProcessKey> {
    let name = deleted_name(state, vm)?;
    let own = std::process::id();
    let euid = rustix::process::geteuid().as_raw();
    let processes = fs::read_dir("/proc").ok()?;
    processes.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let is_of_qmpin = || {
            fs::read(entry.path().join("comm")).is_ok_and(|comm| comm.starts_with(COMM.as_bytes()))
        };
        let is_trusted = || entry.metadata().is_ok_and(|of| of.uid() == 0 || of.uid() == euid);
        let holds = || holds(&entry.path().join("fd"), &name);
        let is_it = u32::try_from(pid).ok()? != own && is_of_qmpin() && is_trusted() && holds();
        if is_it { process_key(&SysRoot::live(), Pid(pid)).ok() } else { None }
    })
}

/// What the kernel calls the VM's lock file in `/proc/PID/fd` once it has no name.
fn deleted_name(state: &StateDir, vm: &VmName) -> Option<OsString> {
    let folder = fs::canonicalize(state.path()).or_else(|_| {
        let (above, name) = (state.path().parent(), state.path().file_name());
        let above = fs::canonicalize(above.unwrap_or(Path::new("/")));
        above.map(|above| above.join(name.unwrap_or_default()))
    });
    let mut name = folder.ok()?.join(format!("{vm}.lock")).into_os_string().into_vec();
    name.extend(b" (deleted)");
    Some(OsString::from_vec(name))
}

fn holds(descriptors: &Path, name: &OsString) -> bool {
    let Ok(entries) = fs::read_dir(descriptors) else { return false };
    entries
        .flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == name))
}
