//! `/run/qmpin`: one lease per attached VM, one lock per supervisor, and two locks over all (module
//! [`locks`](crate::locks)).
//!
//! ```text
//!   /run/qmpin/.host.lock, .leases.lock
//!   /run/qmpin/100.lock    flock: held by the supervisor of VM 100 for as long as it lives;
//!                          while it is held, its content says by whom
//!   /run/qmpin/100.lease   what VM 100 has; what everybody else plans around
//!   /run/qmpin/100.journal how to restore it (module `journal`)
//!   /run/qmpin/100.standing what its supervisor reports (module `standing`)
//!   /run/qmpin/.host.journal what the host was like before the first VM
//! ```
//!
//! The files are the truth; there is no daemon. A lease whose QEMU process is gone is dead, and
//! the next qmpin sweeps it.

mod lease;
mod reading;
mod supervisor_lock;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use lease::{Kept, Lease, SCHEMA};
pub use reading::Salvaged;
pub use supervisor_lock::{Heart, Pulse, SupervisorLock};

use crate::ids::{Pid, VmName};
use crate::locks::OlderLock;
use crate::state_file::{self, FolderLink};
use crate::threads::ProcessKey;

/// The longest lease that is read.
const BYTES_MAX: u64 = 4 << 20;

/// Why the state folder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file or folder could not be used.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process holds one of the locks over all for too long.
    #[error("{} is still locked after {} s{}", path.display(), waited.as_secs(), held_by(*holder))]
    Busy {
        /// Which lock.
        path: PathBuf,
        /// How long this process has waited.
        waited: Duration,
        /// The process that holds it, where the kernel shows that.
        holder: Option<Pid>,
    },
    /// A lease is not understood.
    #[error("{} is not a lease of qmpin: {reason}", path.display())]
    NotALease {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// The state folder.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The lock of qmpin 0.1.0, while this process holds it.
    pub(crate) older_lock: OlderLock,
    /// The unreadable leases that the log has, as they were then.
    reported: Arc<Mutex<BTreeMap<VmName, FileState>>>,
    /// The leases that were read, and their files then. Each VM's supervisor reads all of them, several times in a
    /// pass.
    known: Arc<Mutex<BTreeMap<VmName, (FileState, Lease)>>>,
}

fn held_by(holder: Option<Pid>) -> String {
    holder.map_or(" by another process".to_owned(), |pid| format!(" by process {pid}"))
}

/// What shows whether a file has changed: device, inode, size, and the times of the last change of its content and of
/// its owner or mode, in seconds and ns.
pub(crate) type FileState = Option<(u64, u64, u64, [i64; 4])>;

impl StateDir {
    /// The folder at this path; it need not exist yet.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> StateDir {
        let older_lock = OlderLock::default();
        StateDir { path: path.into(), older_lock, reported: Arc::default(), known: Arc::default() }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder, for root alone to write, if it is not there.
    ///
    /// # Errors
    /// [`StateError::Io`]; also where other users can change it.
    pub fn create(&self) -> Result<(), StateError> {
        let made = state_file::create_folder(&self.path).map(|_| ());
        made.map_err(io_error("create", &self.path))
    }

    /// Where a file of a VM is.
    pub(crate) fn vm_path(&self, vm: &VmName, suffix: &str) -> PathBuf {
        self.path.join(format!("{vm}.{suffix}"))
    }

    /// Where a VM's journal is.
    #[must_use]
    pub fn journal_path(&self, vm: &VmName) -> PathBuf {
        self.vm_path(vm, "journal")
    }

    /// Where the host's journal is. No VM can have that name.
    #[must_use]
    pub fn host_journal_path(&self) -> PathBuf {
        self.path.join(".host.journal")
    }

    /// Where a VM's lease is.
    #[must_use]
    pub fn lease_path(&self, vm: &VmName) -> PathBuf {
        self.vm_path(vm, "lease")
    }

    /// The lease of a VM, where it is that of this very process; one that cannot be read is none.
    #[must_use]
    pub fn lease_of(&self, vm: &VmName, boot_id: &str, qemu: ProcessKey) -> Option<Lease> {
        let lease = self.lease(vm).ok().flatten();
        lease.filter(|lease| lease.boot_id == boot_id && lease.qemu == qemu)
    }

    /// A VM's lease, if it has one. A file that has not changed is not read again.
    ///
    /// # Errors
    /// [`StateError`] where it cannot be read or understood.
    pub fn lease(&self, vm: &VmName) -> Result<Option<Lease>, StateError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the file is read: one that is replaced meanwhile is read again the next time.
        let now = self.lease_state(vm);
        if let Some((then, lease)) = known().get(vm)
            && now.is_some()
            && *then == now
        {
            return Ok(Some(lease.clone()));
        }
        let lease = self.read_lease(vm)?;
        match &lease {
            Some(lease) => known().insert(vm.clone(), (now, lease.clone())),
            None => known().remove(vm),
        };
        Ok(lease)
    }

    fn read_lease(&self, vm: &VmName) -> Result<Option<Lease>, StateError> {
        let path = self.lease_path(vm);
        let text = match state_file::read_state(&path, BYTES_MAX) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        reading::parse(&text, vm).map(Some).map_err(|reason| StateError::NotALease { path, reason })
    }

    /// What is known of a lease that [`lease`](StateDir::lease) cannot read.
    #[must_use]
    pub fn salvage_lease(&self, vm: &VmName) -> Salvaged {
        let text = state_file::read_state(&self.lease_path(vm), BYTES_MAX);
        text.map(|text| reading::salvage(&text)).unwrap_or_default()
    }

    /// What shows whether a VM's lease has changed; `None`: there is none.
    pub(crate) fn lease_state(&self, vm: &VmName) -> FileState {
        let file = fs::symlink_metadata(self.lease_path(vm)).ok()?;
        let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
        Some((file.dev(), file.ino(), file.len(), times))
    }

    /// Whether an unreadable lease was not reported yet as it is now. It is from now on.
    #[must_use]
    pub fn is_news(&self, vm: &VmName) -> bool {
        let now = self.lease_state(vm);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        reported.insert(vm.clone(), now) != Some(now)
    }

    /// Every VM that has any file here, in order of name.
    ///
    /// # Errors
    /// [`StateError::Io`]; a folder that is not there has none.
    pub fn vms(&self) -> Result<Vec<VmName>, StateError> {
        self.vms_with(&[
            "lease",
            "journal",
            "lock",
            "lease.new",
            "standing",
            "standing.new",
            "waiting",
        ])
    }

    /// Every VM that has a file with one of these suffixes, in order of name.
    ///
    /// # Errors
    /// As [`StateDir::vms`].
    pub(crate) fn vms_with(&self, suffixes: &[&str]) -> Result<Vec<VmName>, StateError> {
        let folder = state_file::Folder::open(&self.path, FolderLink::Refuse);
        let names = match folder.and_then(|folder| folder.names()) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("list", &self.path)(error)),
        };
        let vm_of = |name: &String| {
            suffixes
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix)?.strip_suffix('.')?.parse().ok())
        };
        let vms: BTreeSet<VmName> = names.iter().filter_map(vm_of).collect();
        Ok(vms.into_iter().collect())
    }

    /// Writes a VM's lease: whole, or not at all.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn write_lease(&self, lease: &Lease) -> Result<(), StateError> {
        let path = self.lease_path(&lease.vm);
        let fail = io_error("write", &path);
        let text = reading::text(lease).map_err(|error| fail(error.into()))?;
        state_file::write_state(&path, &text).map_err(fail)
    }

    /// Forgets a VM: its lease and journal. The journal goes first, so that a crash in between leaves
    /// a lease without undo and not an undo without a lease.
    ///
    /// # Errors
    /// [`StateError::Io`]; a file that is not there is no error.
    pub fn forget(&self, vm: &VmName) -> Result<(), StateError> {
        let in_order = ["journal", "lease.new", "standing.new", "standing", "lease"];
        in_order.into_iter().try_for_each(|suffix| remove(&self.vm_path(vm, suffix)))
    }

    /// Removes a VM's lease alone: what is to be restored is still known.
    ///
    /// # Errors
    /// [`StateError::Io`]; a file that is not there is no error.
    pub fn drop_lease(&self, vm: &VmName) -> Result<(), StateError> {
        remove(&self.lease_path(vm))
    }
}

fn remove(path: &Path) -> Result<(), StateError> {
    state_file::remove_state(path).map(drop).map_err(io_error("remove", path))
}

pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl Fn(io::Error) -> StateError + Copy {
    move |source| StateError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StartTicks;
    use crate::policy::VfioIrqs;
    use crate::threads::ProcessKey;

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::at(dir.path().join("qmpin"));
        state.create().expect("create");
        (dir, state)
    }

    fn vm(name: &str) -> VmName {
        name.parse().expect("a name")
    }

    fn lease(name: &str) -> Lease {
        let qemu = ProcessKey { pid: Pid(1), start: StartTicks(2) };
        Lease {
            since_unix_s: 3,
            exclusive: "1-2".parse().expect("cpus"),
            emulator: "0".parse().expect("cpus"),
            iothreads: "0".parse().expect("cpus"),
            vfio_irqs: VfioIrqs::Vcpus,
            ..Lease::new(vm(name), "b".to_owned(), qemu)
        }
    }

    #[test]
    fn one_supervisor_at_a_time_and_no_lock_file_left() {
        let (_dir, state) = state();
        let first = state.lock_supervisor(&vm("100")).expect("lock");
        assert!(first.is_some());
        assert!(state.lock_supervisor(&vm("100")).expect("lock").is_none());
        assert!(state.lock_supervisor(&vm("101")).expect("lock").is_some());
        drop(first);
        assert_eq!(fs::read_dir(state.path()).expect("list").count(), 0);
        assert!(state.lock_supervisor(&vm("100")).expect("lock").is_some());
    }

    #[test]
    fn lease_is_read_back_and_removed() {
        let (_dir, state) = state();
        state.write_lease(&lease("100")).expect("write");
        assert_eq!(state.lease(&vm("100")).expect("read"), Some(lease("100")));
        assert_eq!(state.vms().expect("list"), [vm("100")]);
        state.forget(&vm("100")).expect("forget");
        state.forget(&vm("100")).expect("forget twice");
        assert_eq!(state.lease(&vm("100")).expect("read"), None);
    }

    #[test]
    fn lease_is_read_again_where_another_program_changed_it_in_place_and_hid_that() {
        let (_dir, state) = state();
        state.write_lease(&lease("100")).expect("write");
        assert_eq!(state.lease(&vm("100")).expect("read"), Some(lease("100")));
        let path = state.lease_path(&vm("100"));
        let then = fs::metadata(&path).expect("there").modified().expect("a time");
        let text = fs::read_to_string(&path).expect("text").replace("\"1-2\"", "\"1-3\"");
        let before = state.lease_state(&vm("100"));
        // The kernel's clock for files has ticks of some milliseconds.
        while state.lease_state(&vm("100")) == before {
            let mut file = fs::OpenOptions::new().write(true).open(&path).expect("open");
            io::Write::write_all(&mut file, text.as_bytes()).expect("written");
            file.set_modified(then).expect("hidden");
        }
        let read = state.lease(&vm("100")).expect("read").expect("a lease");
        assert_eq!(read.exclusive, "1-3".parse().expect("cpus"));
        fs::remove_file(&path).expect("removed");
        assert_eq!(state.lease(&vm("100")).expect("read"), None);
    }

    #[test]
    fn file_that_others_may_write_is_refused_also_after_it_was_read() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_dir, state) = state();
        state.write_lease(&lease("100")).expect("write");
        state.lease(&vm("100")).expect("read");
        let path = state.lease_path(&vm("100"));
        let before = state.lease_state(&vm("100"));
        while state.lease_state(&vm("100")) == before {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("changed");
        }
        state.lease(&vm("100")).expect_err("anyone's");
    }

    #[test]
    fn a_lease_of_before_there_was_a_choice_is_read() {
        let (_dir, state) = state();
        let text = serde_json::to_string(&lease("100")).expect("text");
        let older = text.replace(",\"vfio_irqs\":\"vcpus\"", "");
        assert_ne!(text, older);
        fs::write(state.lease_path(&vm("100")), older).expect("write");
        let read = state.lease(&vm("100")).expect("read").expect("a lease");
        assert_eq!(read, Lease { vfio_irqs: VfioIrqs::Iothreads, ..lease("100") });
    }

    #[test]
    fn a_bad_lease_is_named_with_its_path() {
        let (_dir, state) = state();
        for text in ["", "{", "{\"schema\":\"other/1\"}", "[]"] {
            fs::write(state.lease_path(&vm("100")), text).expect("write");
            let error = state.lease(&vm("100")).expect_err(text).to_string();
            assert!(error.contains("100.lease"), "{error}");
        }
        state.write_lease(&lease("100")).expect("write");
        fs::rename(state.lease_path(&vm("100")), state.lease_path(&vm("101"))).expect("rename");
        assert!(state.lease(&vm("101")).is_err());
    }
}
