//! Finds the supervisor of a VM whose files were removed: it lives, and the new lock file says nothing of it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::process_key;
use crate::ids::{Pid, VmName};
use crate::leases::StateDir;
use crate::locks::flock_holders;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// The beginning of the name of every process of qmpin's.
const COMM: &str = "qmpin";

/// Returns another process that holds the lock file of this VM that has no name any more. The kernel says so of
/// locks and of open files (`proc_locks(5)`, `proc_pid_fd(5)`), for any version of qmpin. Only a process of root, or of
/// the user who runs this one, counts: others cannot have opened the file.
#[must_use]
pub fn unlinked_holder(state: &StateDir, vm: &VmName) -> Option<ProcessKey> {
    let name = deleted_name(state, vm)?;
    let mut holders: Vec<Pid> = flock_holders().ok()?.into_iter().map(|(pid, _)| pid).collect();
    holders.sort_unstable();
    holders.dedup();
    let own = i32::try_from(std::process::id()).ok().map(Pid);
    let euid = rustix::process::geteuid().as_raw();
    holders.into_iter().filter(|pid| Some(*pid) != own).find_map(|pid| {
        let process = Path::new("/proc").join(pid.0.to_string());
        let is_of_qmpin =
            || fs::read(process.join("comm")).is_ok_and(|comm| comm.starts_with(COMM.as_bytes()));
        let is_trusted = || process.metadata().is_ok_and(|of| of.uid() == 0 || of.uid() == euid);
        let is_it = is_of_qmpin() && is_trusted() && holds(&process.join("fd"), &name);
        if is_it { process_key(&SysRoot::live(), pid).ok() } else { None }
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
