//! Other VMs' comings and goings, by inotify on the state folder.

use std::io;
use std::os::fd::AsFd;

use inotify::{Inotify, WatchMask};

use super::readable::Readable;
use crate::ids::VmName;
use crate::leases::StateDir;

/// Tells when another VM's lease is written or removed.
#[derive(Debug)]
pub struct LeaseChanges {
    inotify: Inotify,
    readable: Readable,
    own: String,
}

impl LeaseChanges {
    /// Watches the folder for leases that are not `vm`'s. It must be called within a tokio runtime.
    ///
    /// # Errors
    /// Those of `inotify_add_watch(2)`.
    pub fn of(state: &StateDir, vm: &VmName) -> io::Result<LeaseChanges> {
        let inotify = Inotify::init()?;
        // A lease is renamed into place, so a write is seen once and whole.
        inotify.watches().add(state.path(), WatchMask::MOVED_TO | WatchMask::DELETE)?;
        // A second descriptor of the same queue, to wait on while the first is read.
        let readable = Readable::new(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(LeaseChanges { inotify, readable, own: format!("{vm}.lease") })
    }

    /// Returns when a lease of another VM has changed. Cancel safe.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn next(&mut self) -> io::Result<()> {
        loop {
            let (own, inotify) = (&self.own, &mut self.inotify);
            let mut buffer = [0; 4096];
            let read = self.readable.read(|_| {
                let mut events = inotify.read_events(&mut buffer)?;
                Ok(events.any(|event| {
                    // An event without a name says that some were lost.
                    event.name.is_none_or(|name| {
                        let name = name.to_string_lossy();
                        name.ends_with(".lease") && *name != **own
                    })
                }))
            });
            if read.await? {
                return Ok(());
            }
        }
    }
}
