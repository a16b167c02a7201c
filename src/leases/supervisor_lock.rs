//! The lock of one VM's supervisor, `/run/qmpin/100.lock`, and the sign that the supervisor makes progress.
//!
//! ```text
//!   flock held   ─▶ the supervisor lives; the content names its process
//!   time of file ─▶ when it last made progress (Heart)
//! ```

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::Flock;

use super::{BYTES_MAX, StateDir, StateError, io_error};
use crate::ids::VmName;
use crate::locks;
use crate::state_file;
use crate::threads::ProcessKey;

/// Held by a VM's supervisor. Dropping it removes the lock file and releases the lock.
#[derive(Debug)]
pub struct SupervisorLock {
    state: StateDir,
    path: PathBuf,
    lock: Option<Flock<File>>,
    heart: Arc<Mutex<Option<File>>>,
    /// A lock on the folder of the QEMU process in /proc.
    claim: Option<Flock<File>>,
}

impl StateDir {
    fn lock_path(&self, vm: &VmName) -> PathBuf {
        self.vm_path(vm, "lock")
    }

    /// Becomes the VM's supervisor. `None`: another process is.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn lock_supervisor(&self, vm: &VmName) -> Result<Option<SupervisorLock>, StateError> {
        let path = self.lock_path(vm);
        let fail = io_error("lock", &path);
        loop {
            let lock = locks::open(&path).and_then(locks::try_lock).map_err(fail)?;
            let Some(lock) = lock else { return Ok(None) };
            // The last holder removes the file, so what we locked may have no name any
            // more, and another may lock a new file of that name. Then try again.
            if !state_file::has_name(&lock, &path).map_err(fail)? {
                continue;
            }
            // The process that had it before was killed.
            lock.set_len(0).map_err(fail)?;
            let state = self.clone();
            let heart = Arc::new(Mutex::new(lock.try_clone().ok()));
            let (lock, claim) = (Some(lock), None);
            return Ok(Some(SupervisorLock { state, path, lock, heart, claim }));
        }
    }

    /// Returns the process that holds the VM's lock, where the file names it. It has a meaning only while
    /// [`lock_supervisor`](StateDir::lock_supervisor) returns `None`.
    #[must_use]
    pub fn supervisor(&self, vm: &VmName) -> Option<ProcessKey> {
        let text = state_file::read_state(&self.lock_path(vm), BYTES_MAX).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// When the supervisor of the VM has last shown that it makes progress; `None`: there is no lock file.
    #[must_use]
    pub fn last_heartbeat(&self, vm: &VmName) -> Option<SystemTime> {
        fs::metadata(self.lock_path(vm)).and_then(|file| file.modified()).ok()
    }
}

impl SupervisorLock {
    /// Returns what shows others that this supervisor makes progress.
    #[must_use]
    pub fn heart(&self) -> Heart {
        Heart(Arc::clone(&self.heart))
    }

    /// Claims the QEMU process by a lock on its folder in /proc. Unlike the lock file that folder cannot be removed, so
    /// two supervisors of one process find out about each other in any case. Returns whether the lock was free. Any
    /// user can lock it, so that it is not says that one has to look, and no more.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn claim(&mut self, folder: &Path) -> io::Result<bool> {
        self.claim = locks::try_lock(File::open(folder)?)?;
        Ok(self.claim.is_some())
    }

    /// Whether the file that is locked still has its name.
    fn has_name(&self) -> bool {
        let lock = self.lock.as_ref();
        lock.is_some_and(|lock| state_file::has_name(lock, &self.path).unwrap_or(false))
    }

    /// Locks a new file where the one that is locked was removed, so that others find this supervisor again.
    /// Where another process holds a new one already, that is tried again the next time: it finds out that this
    /// supervisor lives, and lets go.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn renew(&mut self, process: Option<ProcessKey>) -> Result<(), StateError> {
        if self.has_name() {
            return Ok(());
        }
        let fail = io_error("lock", &self.path);
        let lock = locks::open(&self.path).and_then(locks::try_lock).map_err(fail)?;
        let Some(lock) = lock else { return Ok(()) };
        let heart = lock.try_clone().ok();
        *self.heart.lock().unwrap_or_else(PoisonError::into_inner) = heart;
        lock.set_len(0).map_err(fail)?;
        self.lock = Some(lock);
        if let Some(process) = process {
            self.sign(process);
        }
        tracing::warn!("{} was removed: it is locked again", self.path.display());
        Ok(())
    }

    /// Writes which process holds it, so that the process can be stopped. Nothing depends on it before there is a
    /// lease, which names it too, so a failed write is no error.
    pub fn sign(&mut self, process: ProcessKey) {
        if let (Some(lock), Ok(text)) = (&mut self.lock, serde_json::to_vec(&process)) {
            let _ = lock.write_all(&text);
        }
    }
}

/// Shows other processes that a supervisor makes progress, by the time of its lock file.
#[derive(Debug)]
pub struct Heart(Arc<Mutex<Option<File>>>);

impl Heart {
    /// Shows it now. A state folder that is gone or full has no reader either, so an error is ignored.
    pub fn beat(&self) {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let beat = file.as_ref().map(|file| file.set_modified(SystemTime::now()));
        if let Some(Err(error)) = beat {
            tracing::trace!("no sign of life: {error}");
        }
    }

    /// Beats for so long at most.
    #[must_use]
    pub fn pulse(self, limit: Duration) -> Pulse {
        let (stop, stopped) = mpsc::channel();
        let deadline = Instant::now() + limit;
        let beat = move || {
            self.beat();
            let every = Duration::from_secs(1);
            while stopped.recv_timeout(every) == Err(mpsc::RecvTimeoutError::Timeout)
                && Instant::now() < deadline
            {
                self.beat();
            }
        };
        // Without it, a process that waits does so for a shorter time.
        let _ = thread::Builder::new().name("pulse".to_owned()).spawn(beat);
        Pulse { _stop: stop }
    }
}

/// Shows progress once a second, from a thread of its own, until it is dropped or a limit is over.
#[derive(Debug)]
pub struct Pulse {
    _stop: mpsc::Sender<()>,
}

impl Drop for SupervisorLock {
    fn drop(&mut self) {
        // Removed while still locked: a process that opens the name after this makes a new file. One that has another
        // file by now is another supervisor's.
        if self.has_name()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!("{} stays: {error}", self.path.display());
        }
        drop(self.lock.take());
        self.state.tidy();
    }
}
