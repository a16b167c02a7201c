//! Other VMs' comings and goings, by inotify on the state folder.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchMask};

use crate::ids::VmName;
use crate::leases::StateDir;
use crate::sys::Readable;

/// Between two tries to watch a folder that was removed.
const BLIND_PAUSE: Duration = Duration::from_millis(500);

const MASK: WatchMask = WatchMask::MOVED_TO.union(WatchMask::DELETE);

/// Tells when another VM's lease is written or removed.
#[derive(Debug)]
pub struct LeaseChanges {
    inotify: Inotify,
    readable: Readable,
    /// The file that does not count.
    own: Option<String>,
    folder: PathBuf,
    /// The folder was removed, and one of its name is not watched yet.
    is_blind: bool,
}

impl LeaseChanges {
    /// Watches the folder for leases that are not `own`'s. It must be called within a tokio runtime.
    ///
    /// # Errors
    /// Those of `inotify_add_watch(2)`.
    pub fn of(state: &StateDir, own: Option<&VmName>) -> io::Result<LeaseChanges> {
        let inotify = Inotify::init()?;
        // A lease is renamed into place, so a write is seen once and whole.
        inotify.watches().add(state.path(), MASK)?;
        // A second descriptor of the same queue, to wait on while the first is read.
        let readable = Readable::new(inotify.as_fd().try_clone_to_owned()?)?;
        let own = own.map(|vm| format!("{vm}.lease"));
        let folder = state.path().to_owned();
        Ok(LeaseChanges { inotify, readable, own, folder, is_blind: false })
    }

    /// Returns when a lease of another VM has changed, or the folder was removed. Cancel safe.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn next(&mut self) -> io::Result<()> {
        loop {
            while self.is_blind {
                match self.inotify.watches().add(&self.folder, MASK) {
                    Ok(_) => self.is_blind = false,
                    Err(_) => tokio::time::sleep(BLIND_PAUSE).await,
                }
            }
            let (own, inotify, is_blind) = (&self.own, &mut self.inotify, &mut self.is_blind);
            let mut buffer = [0; 4096];
            let read = self.readable.read(|_| {
                let mut events = inotify.read_events(&mut buffer)?;
                Ok(events.any(|event| {
                    *is_blind |= event.mask.contains(EventMask::IGNORED);
                    // An event without a name says that some were lost.
                    event.name.is_none_or(|name| {
                        let name = name.to_string_lossy();
                        name.ends_with(".lease") && own.as_deref() != Some(&*name)
                    })
                }))
            });
            if read.await? {
                return Ok(());
            }
        }
    }
}
