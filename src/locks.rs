//! The two locks over all VMs of this host: files in the state folder that only root can open.
//!
//! ```text
//!   .host.lock     the host's journal and what it is about: taken for one pass over the host, which is
//!                  tens of milliseconds, and never while another program is asked
//!   .leases.lock   leases: read, plan, write. Milliseconds, and no other lock is taken below it
//!
//!   .reload.lock   one reload of systemd at a time, which may take long. Never taken below another lock, and no
//!                  other lock is held while systemd works
//!
//!   .check.lock    one supervisor at a time checks the host for all VMs. Never waited for: the others ask again
//!
//!   order: .reload.lock, .check.lock, .host.lock, then .leases.lock
//! ```
//!
//! `flock(2)` needs no more than a descriptor, and any user can open a folder that others may read. A lock
//! on the folder itself could therefore be kept by anyone; these files have mode 0600. Waiting has a limit,
//! because a process that is stopped or hangs keeps its locks. A process that takes one sets the time of its file, so
//! that a process that waits can tell a lock that is kept from one that many need.
//!
//! qmpin 0.1.0 locks the folder. While there is a lease of it, that lock is taken as well, but a process that
//! keeps it for long is not waited for: it may be anyone's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::ids::Pid;
use crate::leases::{StateDir, StateError, io_error};
use crate::state_file::{self, FolderLink};

/// How long a lock is waited for while one process holds it, which is for milliseconds, or a few hundred on a busy host
/// …
const WAIT_LIMIT: Duration = Duration::from_secs(10);
/// … and in all, while it goes from one process to another: many VMs on a slow host are no fault.
const WAIT_LIMIT_IN_ALL: Duration = Duration::from_secs(60);
/// How long a reload of another qmpin is waited for: longer than one may take.
const RELOAD_WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How long the lock of qmpin 0.1.0 is waited for.
const OLDER_WAIT_LIMIT: Duration = Duration::from_secs(2);
/// Between two tries, at first; doubled for each further one.
const PAUSE: Duration = Duration::from_millis(1);
/// Between two tries, at most.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// Held while leases are read and changed together.
#[derive(Debug)]
pub struct LeasesLock {
    _lock: Flock<File>,
    _older: Option<Arc<Flock<File>>>,
}

/// Held while the host's journal, and what it is about, is read and changed.
#[derive(Debug)]
pub struct HostLock {
    /// The file that is locked. Its content is a [`HostPass`](crate::knobs::host::pass::HostPass).
    pub(crate) file: Flock<File>,
    _older: Option<Arc<Flock<File>>>,
}

/// Held while the host is checked on behalf of all VMs.
#[derive(Debug)]
pub struct CheckLock {
    _lock: Flock<File>,
}

/// Held while systemd reloads on behalf of all VMs.
#[derive(Debug)]
pub struct ReloadLock {
    _lock: Flock<File>,
}

/// The lock of qmpin 0.1.0. Both locks include it, and one process takes it once.
#[derive(Clone, Debug, Default)]
pub(crate) struct OlderLock(Arc<Mutex<Weak<Flock<File>>>>);

impl StateDir {
    /// Locks all leases. It blocks this thread for ten seconds at most while one process holds the lock, and for a
    /// minute in all.
    ///
    /// # Errors
    /// [`StateError::Busy`] where another process holds it for longer; [`StateError::Io`].
    pub fn lock_leases(&self) -> Result<LeasesLock, StateError> {
        let older = self.lock_older()?;
        let lock = self.lock_file(LEASES, Patience::WHILE_IT_CHANGES_HANDS)?;
        Ok(LeasesLock { _lock: lock, _older: older })
    }

    /// As [`StateDir::lock_leases`], while the host's lock is held.
    ///
    /// # Errors
    /// As there.
    pub fn lock_leases_below(&self, _host: &HostLock) -> Result<LeasesLock, StateError> {
        // The host's lock includes the lock of qmpin 0.1.0.
        Ok(LeasesLock {
            _lock: self.lock_file(LEASES, Patience::WHILE_IT_CHANGES_HANDS)?,
            _older: None,
        })
    }

    /// Locks the host's journal and what it is about. It blocks this thread as [`StateDir::lock_leases`] does.
    ///
    /// # Errors
    /// As [`StateDir::lock_leases`].
    pub fn lock_host(&self) -> Result<HostLock, StateError> {
        let file = self.lock_file(HOST, Patience::WHILE_IT_CHANGES_HANDS)?;
        Ok(HostLock { file, _older: self.lock_older()? })
    }

    /// Becomes the process that checks the host for all VMs. It waits for no other process; `None`: one does so.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn try_lock_check(&self) -> Result<Option<CheckLock>, StateError> {
        let lock = self.try_lock_file(CHECK, Patience::NONE)?.ok();
        Ok(lock.map(|lock| CheckLock { _lock: lock }))
    }

    /// The file of the host's lock.
    pub(crate) fn host_lock_path(&self) -> PathBuf {
        self.path().join(HOST)
    }

    /// Locks systemd's reload. It blocks this thread for two minutes at most.
    ///
    /// # Errors
    /// As [`StateDir::lock_leases`].
    pub fn lock_reload(&self) -> Result<ReloadLock, StateError> {
        Ok(ReloadLock { _lock: self.lock_file(RELOAD, Patience::of(RELOAD_WAIT_LIMIT))? })
    }

    /// Removes the lock files, where they are all that is left in the folder. It waits for no other process: the
    /// last one to go removes them.
    pub fn tidy(&self) {
        if !self.has_only_locks() {
            return;
        }
        let at_once = |name| self.try_lock_file(name, Patience::NONE).ok()?.ok();
        let locks: Vec<_> = ALL.into_iter().map_while(at_once).collect();
        if locks.len() == ALL.len() && self.has_only_locks() {
            // A process that waits for one of them opens it anew at each try.
            for name in ALL {
                let _ = fs::remove_file(self.path().join(name));
            }
        }
    }

    fn has_only_locks(&self) -> bool {
        let Ok(entries) = fs::read_dir(self.path()) else { return false };
        let mut names = entries.flatten().map(|entry| entry.file_name()).peekable();
        names.peek().is_some() && names.all(|name| ALL.iter().any(|lock| name == **lock))
    }

    fn lock_file(&self, name: &str, patience: Patience) -> Result<Flock<File>, StateError> {
        let lock = self.try_lock_file(name, patience)?;
        lock.map_err(|waited| busy(&self.path().join(name), waited))
    }

    /// Locks a file, and notes in it when that was. Else how long it was waited for.
    fn try_lock_file(
        &self,
        name: &str,
        patience: Patience,
    ) -> Result<Result<Flock<File>, Duration>, StateError> {
        let path = self.path().join(name);
        let taken_at = || fs::symlink_metadata(&path).and_then(|file| file.modified()).ok();
        let locked = wait(patience, taken_at, || {
            let Some(lock) = try_lock(open(&path)?)? else { return Ok(None) };
            // The last of all VMs removes the file, so the one that is locked may have no name any more.
            if !state_file::has_name(&lock, &path)? {
                return Ok(None);
            }
            lock.set_modified(SystemTime::now())?;
            Ok(Some(lock))
        });
        locked.map_err(io_error("lock", &path))
    }

    /// The lock of qmpin 0.1.0, where there is a lease of it.
    fn lock_older(&self) -> Result<Option<Arc<Flock<File>>>, StateError> {
        let mut known = self.older_lock.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = known.upgrade() {
            return Ok(Some(lock));
        }
        let is_older = |vm| matches!(self.lease(&vm), Ok(Some(lease)) if lease.writer.is_none());
        if !self.vms()?.into_iter().any(is_older) {
            return Ok(None);
        }
        let attempt = || try_lock(File::open(self.path())?);
        let locked = wait(Patience::of(OLDER_WAIT_LIMIT), || None::<SystemTime>, attempt);
        let lock = match locked.map_err(io_error("lock", self.path()))? {
            Ok(lock) => lock,
            Err(waited) => {
                tracing::warn!("{}", busy(self.path(), waited));
                return Ok(None);
            }
        };
        let lock = Arc::new(lock);
        *known = Arc::downgrade(&lock);
        Ok(Some(lock))
    }
}

fn busy(path: &Path, waited: Duration) -> StateError {
    StateError::Busy { path: path.to_owned(), waited, holder: holder(path) }
}

const LEASES: &str = ".leases.lock";
const HOST: &str = ".host.lock";
const RELOAD: &str = ".reload.lock";
const CHECK: &str = ".check.lock";
/// The one that is held most often comes first: opening a lock makes its file.
const ALL: [&str; 4] = [HOST, LEASES, RELOAD, CHECK];

/// How long a lock is waited for.
#[derive(Clone, Copy)]
struct Patience {
    /// While one process holds it.
    of_one: Duration,
    /// While it goes from one process to another.
    in_all: Duration,
}

impl Patience {
    const NONE: Patience = Patience::of(Duration::ZERO);
    const WHILE_IT_CHANGES_HANDS: Patience =
        Patience { of_one: WAIT_LIMIT, in_all: WAIT_LIMIT_IN_ALL };

    const fn of(limit: Duration) -> Patience {
        Patience { of_one: limit, in_all: limit }
    }
}

/// Tries again and again, until there is something or the patience is over: then how long that was. `taken_at`
/// changes each time that another process has got it.
fn wait<T, S: PartialEq>(
    patience: Patience,
    taken_at: impl Fn() -> Option<S>,
    mut attempt: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Result<T, Duration>> {
    let begun = Instant::now();
    let (mut since, mut taken) = (begun, None);
    let mut pause = PAUSE;
    loop {
        if let Some(done) = attempt()? {
            return Ok(Ok(done));
        }
        let now = taken_at();
        if now != taken {
            (since, taken) = (Instant::now(), now);
        }
        if since.elapsed() >= patience.of_one || begun.elapsed() >= patience.in_all {
            return Ok(Err(begun.elapsed()));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Opens the file of a lock, or makes it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let (folder, name) = state_file::folder_of(path, FolderLink::Refuse)?;
    folder.open_or_create(name)
}

/// Locks a file; `None`: another process holds the lock.
pub(crate) fn try_lock(file: File) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// The process that holds a lock on this file, by `/proc/locks` (`Documentation/filesystems/proc.rst`):
/// `1: FLOCK  ADVISORY  WRITE 712 00:19:1234 0 EOF`, which ends with the number of the inode. Only for an error: to
/// read that file stops all locking on the host for a moment.
fn holder(path: &Path) -> Option<Pid> {
    let inode = fs::symlink_metadata(path).ok()?.ino().to_string();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let holder = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = words.as_slice() else { return None };
        (place.rsplit(':').next() == Some(&inode)).then(|| pid.parse().ok())?
    };
    locks.lines().find_map(holder).filter(|pid| *pid > 0).map(Pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::at(dir.path().join("qmpin"));
        state.create().expect("create");
        (dir, state)
    }

    #[test]
    fn a_lock_that_is_held_is_waited_for_and_its_holder_is_named() {
        let (_dir, state) = state();
        let held = state.lock_leases().expect("locked");
        let again = StateDir::at(state.path());
        let error = again.lock_file(LEASES, Patience::of(Duration::from_millis(50)));
        let error = error.expect_err("it is held");
        let StateError::Busy { holder, .. } = &error else { panic!("{error}") };
        let me = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!(*holder, Some(Pid(me)), "{error}");
        assert!(error.to_string().contains(".leases.lock is still locked after 0 s"), "{error}");
        let waiting = thread::spawn(move || again.lock_leases().map(drop));
        drop(held);
        waiting.join().expect("no panic").expect("locked");
    }

    #[test]
    fn lock_that_changes_hands_is_waited_for_longer_and_not_for_ever() {
        let of_one = Duration::from_millis(5);
        let patient = Patience { of_one, in_all: Duration::from_secs(3600) };
        let begun = Instant::now();
        let is_late = || Ok((begun.elapsed() > of_one * 6).then_some(()));
        let hands = std::cell::Cell::new(0);
        let taken_anew = || Some(hands.replace(hands.get() + 1));
        let waited = |waited: Result<(), Duration>| waited.expect_err("it is held");
        wait(patient, taken_anew, is_late).expect("no error").expect("it is free by then");
        let by_one = waited(wait(patient, || Some(1), || Ok(None)).expect("no error"));
        assert!(by_one >= of_one && by_one < patient.in_all, "{by_one:?}");
        let limited = Patience { of_one, in_all: of_one * 6 };
        let by_many = waited(wait(limited, taken_anew, || Ok(None)).expect("no error"));
        assert!(by_many >= limited.in_all, "{by_many:?}");
    }

    #[test]
    fn file_of_a_lock_says_that_it_was_taken_anew() {
        let (_dir, state) = state();
        let taken_at = || fs::metadata(state.host_lock_path()).expect("a file").modified();
        drop(state.lock_host().expect("locked"));
        let first = taken_at().expect("a time");
        drop(state.lock_host().expect("locked"));
        assert_ne!(taken_at().expect("a time"), first);
    }

    #[test]
    fn an_unprivileged_user_cannot_open_a_lock() {
        let (_dir, state) = state();
        let _host = state.lock_host().expect("locked");
        let _leases = state.lock_leases().expect("both, in this order");
        for name in [LEASES, HOST] {
            let mode = fs::metadata(state.path().join(name)).expect("made").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn lock_on_the_folder_delays_no_process() {
        let (_dir, state) = state();
        let _held =
            try_lock(File::open(state.path()).expect("open")).expect("flock").expect("free");
        let begun = Instant::now();
        state.lock_host().and_then(|_| state.lock_leases()).expect("locked");
        assert!(begun.elapsed() < OLDER_WAIT_LIMIT, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_link_or_a_fifo_in_place_of_a_lock_is_refused_at_once() {
        let (dir, state) = state();
        let other = dir.path().join("other");
        fs::write(&other, "").expect("written");
        let lock = state.path().join(LEASES);
        std::os::unix::fs::symlink(&other, &lock).expect("linked");
        let error = state.lock_leases().expect_err("a link").to_string();
        assert!(error.contains(".leases.lock"), "{error}");
        fs::remove_file(&lock).expect("removed");
        nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        state.lock_leases().expect_err("a fifo");
    }

    #[test]
    fn lock_files_go_with_the_last_file_and_not_before() {
        let (_dir, state) = state();
        let left = || fs::read_dir(state.path()).expect("list").count();
        let lock = state.lock_host().expect("locked");
        drop(state.lock_leases().expect("locked"));
        fs::write(state.path().join("100.journal"), "").expect("written");
        state.tidy();
        fs::remove_file(state.path().join("100.journal")).expect("removed");
        state.tidy();
        assert_eq!(left(), 2, "one is held");
        drop(lock);
        state.tidy();
        assert_eq!(left(), 0);
        // A process that waits for the removed one finds the next.
        let again = StateDir::at(state.path());
        again.lock_host().expect("locked");
    }
}
