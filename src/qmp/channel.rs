//! Which way to QEMU: a socket of our own, a monitor made at run time, or leases.
//!
//! ```text
//!   first(): own socket there, right peer, it answers?  --yes-->  Socket -------+
//!              | no                                                             | the session
//!              v                                                                | dies
//!            Lease <------------------------------------------------------------+
//!              | upgrade(): own socket now? QEMU knows monitor-qmp?             |
//!              +------------------------------> Socket or RuntimeMonitor -------+
//! ```
//!
//! Plain QEMU whose one socket no other program needs: give that path as both `shared` and `own`; it is
//! then held for good.

use std::fmt;
use std::future::pending;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::error::{CheckError, QmpError};
use super::event::QmpEvent;
use super::lease::{accept_peer, lease};
use super::roles::Roles;
use super::runtime_monitor::{RuntimeMonitor, add_runtime_monitor, remove_runtime_monitor};
use super::session::{Session, within};
use super::{Awaited, Limits, Tolerated};
use crate::ids::VmName;
use crate::peer::Peer;

/// How QEMU is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelKind {
    /// Short visits of a socket that others use too. No events.
    Lease,
    /// A live session on a socket of our own from the VM's command line.
    Socket,
    /// A live session on a monitor that we had QEMU make.
    RuntimeMonitor,
}

impl fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChannelKind::Lease => "lease",
            ChannelKind::Socket => "socket",
            ChannelKind::RuntimeMonitor => "runtime-monitor",
        })
    }
}

/// The sockets of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelPaths {
    /// The socket that others use too: `/run/qemu-server/<vmid>.qmp`.
    pub shared: PathBuf,
    /// Ours alone: `/run/qemu-server/<vmid>.qmpin`, `<PATH>.qmpin` for plain QEMU.
    pub own: PathBuf,
}

impl ChannelPaths {
    /// The sockets of a Proxmox VM: `<dir>/<vmid>.qmp`, and `<dir>/<vmid>.qmpin` for us.
    #[must_use]
    pub fn proxmox(dir: &Path, vm: &VmName) -> ChannelPaths {
        ChannelPaths { shared: dir.join(format!("{vm}.qmp")), own: dir.join(format!("{vm}.qmpin")) }
    }

    /// The sockets of a plain QEMU: the path given, and that path with `.qmpin` appended for us.
    #[must_use]
    pub fn plain(shared: &Path) -> ChannelPaths {
        let mut own = shared.as_os_str().to_owned();
        own.push(".qmpin");
        ChannelPaths { shared: shared.to_owned(), own: PathBuf::from(own) }
    }
}

/// Whether the process at the other end of a socket is the VM's QEMU. Asked on every connection,
/// before anything is sent.
pub type PeerCheck = Box<dyn Fn(&Peer) -> Result<(), CheckError>>;

/// What [`Channel::next_event`] reports.
#[derive(Debug)]
pub enum Happening {
    /// An event of QEMU's.
    Event(QmpEvent),
    /// The live session is gone; from now on there are only leases. QEMU may be gone, too.
    FellBack(QmpError),
}

/// What [`Channel::upgrade`] came to.
#[derive(Debug)]
pub enum Upgrade {
    /// The channel is live, of the kind it now says. Events that came before are lost: ask for the
    /// roles once more.
    Live,
    /// The channel was live already.
    NotNeeded,
    /// This QEMU cannot make monitors, and has no socket for us: leases it is.
    Unsupported,
    /// There is something at our own path that is not for us to touch.
    OwnPathTaken,
}

/// A way to QEMU that mends itself.
pub struct Channel {
    paths: ChannelPaths,
    limits: Limits,
    check: PeerCheck,
    live: Option<(Session, ChannelKind)>,
    own_refused: Option<QmpError>,
    tolerated: Tolerated,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("paths", &self.paths)
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// The fastest first answer: over our own socket where there is one, else by a lease. Nothing
    /// is probed.
    ///
    /// # Errors
    /// Those of [`lease()`].
    pub async fn first(
        paths: ChannelPaths,
        limits: Limits,
        check: PeerCheck,
    ) -> Result<(Channel, Roles), QmpError> {
        let mut channel = Channel::idle(paths, limits, check);
        let roles = match channel.connect_own().await {
            Ok((session, roles)) => {
                channel.live = Some((session, ChannelKind::Socket));
                roles
            }
            Err(error) => {
                channel.own_refused = Some(error).filter(|error| !error.is_nobody_there());
                channel.lease_roles().await?
            }
        };
        Ok((channel, roles))
    }

    /// A first answer by a lease, for when our own socket is another's to hold, or not wanted. Do not
    /// [`upgrade`](Channel::upgrade) it.
    ///
    /// # Errors
    /// Those of [`lease`].
    pub async fn first_by_lease(
        paths: ChannelPaths,
        limits: Limits,
        check: PeerCheck,
    ) -> Result<(Channel, Roles), QmpError> {
        let mut channel = Channel::idle(paths, limits, check);
        let roles = channel.lease_roles().await?;
        Ok((channel, roles))
    }

    fn idle(paths: ChannelPaths, limits: Limits, check: PeerCheck) -> Channel {
        let tolerated = Tolerated::default();
        Channel { paths, limits, check, live: None, own_refused: None, tolerated }
    }

    /// How QEMU is reached now.
    #[must_use]
    pub fn kind(&self) -> ChannelKind {
        self.live.as_ref().map_or(ChannelKind::Lease, |(_, kind)| *kind)
    }

    /// Why our own socket, although there, was not taken at the last try.
    #[must_use]
    pub fn own_socket_refused(&self) -> Option<&QmpError> {
        self.own_refused.as_ref()
    }

    /// What was let pass, over all sessions and leases so far.
    #[must_use]
    pub fn tolerated(&self) -> Tolerated {
        let mut sum = self.tolerated;
        if let Some((session, _)) = &self.live {
            sum.add(&session.tolerated());
        }
        sum
    }

    /// Asks for the roles, over the live session or by a lease. A live session that fails is given
    /// up for a lease; [`kind`](Channel::kind) says which.
    ///
    /// # Errors
    /// Those of [`lease()`], and what is wrong with an answer that came over the live session.
    pub async fn roles(&mut self) -> Result<Roles, QmpError> {
        if let Some((session, _)) = &mut self.live {
            match session.query_roles().await {
                Err(_) if session.has_ended() => self.give_up_live(),
                settled => return settled,
            }
        }
        self.lease_roles().await
    }

    /// The next event. Pends for ever on leases. Cancel safe.
    ///
    /// A live channel must be polled here whenever nothing else is asked of it, or QEMU's memory
    /// fills with what we do not read.
    pub async fn next_event(&mut self) -> Happening {
        let Some((session, _)) = &mut self.live else { return pending().await };
        match session.next_event().await {
            Ok(event) => Happening::Event(event),
            Err(error) => {
                self.give_up_live();
                Happening::FellBack(error)
            }
        }
    }

    /// Tries for a live session: our own socket, else a monitor made at run time. Call it after the
    /// first snapshot is dealt with, and again after a [`Happening::FellBack`] with QEMU alive.
    ///
    /// # Errors
    /// Those of [`add_runtime_monitor`]. The channel still works, by leases.
    pub async fn upgrade(&mut self) -> Result<Upgrade, QmpError> {
        if self.live.is_some() {
            return Ok(Upgrade::NotNeeded);
        }
        match self.connect_own().await {
            Ok((session, _)) => {
                self.own_refused = None;
                self.live = Some((session, ChannelKind::Socket));
                return Ok(Upgrade::Live);
            }
            Err(error) if error.is_nobody_there() => self.own_refused = None,
            Err(error) => {
                // The right process listens and does not greet: it may be a monitor that a qmpin,
                // killed while it made it, has left behind half done.
                if matches!(error, QmpError::Timeout { .. }) {
                    remove_runtime_monitor(&self.paths.shared, &self.check, &self.limits).await?;
                }
                self.own_refused = Some(error);
            }
        }
        // QEMU would unlink whatever is there.
        if !is_free_for_a_socket(&self.paths.own).await {
            return Ok(Upgrade::OwnPathTaken);
        }
        let ChannelPaths { shared, own } = &self.paths;
        let made = add_runtime_monitor(shared, own, &self.check, &self.limits, &mut self.tolerated)
            .await?;
        Ok(match made {
            RuntimeMonitor::Added(session) => {
                self.live = Some((*session, ChannelKind::RuntimeMonitor));
                Upgrade::Live
            }
            RuntimeMonitor::Unsupported => Upgrade::Unsupported,
        })
    }

    /// Opens our own socket and asks for the roles, all within the greeting's time limit.
    async fn connect_own(&mut self) -> Result<(Session, Roles), QmpError> {
        let limit = self.limits.greeting_timeout;
        let work = async {
            let mut session = Session::connect(&self.paths.own, &self.limits).await?;
            accept_peer(&session, &self.check)?;
            let roles = session.open_and_query_roles().await?;
            Ok((session, roles))
        };
        within(limit, work).await.unwrap_or_else(|_| {
            Err(QmpError::Timeout { awaited: Awaited::Greeting, limit, strays: 0 })
        })
    }

    async fn lease_roles(&mut self) -> Result<Roles, QmpError> {
        let report = lease(&self.paths.shared, &self.check, &self.limits).await?;
        self.tolerated.add(&report.tolerated);
        Ok(report.roles)
    }

    fn give_up_live(&mut self) {
        if let Some((session, _)) = self.live.take() {
            self.tolerated.add(&session.tolerated());
        }
    }
}

/// Whether a socket may be bound there: nothing is there, or a socket that no process serves.
async fn is_free_for_a_socket(path: &Path) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => UnixStream::connect(path)
            .await
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused),
        Ok(_) => false,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
