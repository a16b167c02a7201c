//! A QMP monitor of our own, made at run time: QEMU 11.1 and later.
//!
//! `chardev-add` makes a listening socket, `object-add monitor-qmp` puts a monitor on it. With
//! `close-action=delete` QEMU takes both away when we disconnect (monitor/qmp.c). The socket's file
//! goes as soon as we are connected.
//!
//! *The probe* is the `object-add` itself, on a chardev that is not there. A QEMU without the type
//! refuses the type and one with it refuses the chardev; neither changes anything. The two commands
//! made for asking are worse: `qom-list-types` loads every module of QEMU from the disk, and aborts
//! a QEMU whose package was upgraded since it started; `query-qmp-schema` keeps the VM's main loop
//! busy for tens of milliseconds (`proto-notes/quirks.md`).

use std::path::Path;
use std::time::Duration;

use qapi::qmp;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;

use super::error::{CheckError, QmpError};
use super::lease::{accept_peer, take_turn};
use super::session::{Session, within};
use super::wire::{Batch, CAPABILITIES, all};
use super::{Limits, Tolerated};
use crate::peer::Peer;

/// The id of the chardev we make.
pub const MONITOR_CHARDEV_ID: &str = "qmpin-chr";
/// The id of the monitor object we make.
pub const MONITOR_OBJECT_ID: &str = "qmpin-mon";

/// The QOM type that QEMU must know.
const MONITOR_TYPE: &str = "monitor-qmp";

/// What came of the attempt to get a monitor of our own.
#[derive(Debug)]
pub enum RuntimeMonitor {
    /// We have it: an open session on it. It goes when the session goes.
    Added(Box<Session>),
    /// This QEMU cannot make one.
    Unsupported,
}

/// The argument that a QEMU names when it does not know the type.
const TYPE_ARGUMENT: &str = "qom-type";

/// The `object-add` of a monitor; newer than the `qapi` crate's schema.
#[derive(Serialize)]
struct AddMonitor<'a> {
    #[serde(rename = "qom-type")]
    qom_type: &'a str,
    id: &'a str,
    chardev: &'a str,
    #[serde(rename = "close-action")]
    close_action: &'a str,
}

/// Visits the shared socket, makes a monitor on `own_socket` if QEMU can, and connects to it. If
/// anything fails half-way, what was made is taken away again.
///
/// The file `own_socket` must not be a socket that a process serves: QEMU would unlink it
/// (`unix_listen_saddr` in util/qemu-sockets.c). [`Channel`](super::Channel) sees to that.
///
/// # Errors
/// Any [`QmpError`] of the visit; [`QmpError::Refused`] where QEMU knows the type and said no;
/// whatever kept us from connecting to `own_socket`.
pub async fn add_runtime_monitor<E: Into<CheckError>>(
    shared: &Path,
    own_socket: &Path,
    check: impl Fn(&Peer) -> Result<(), E>,
    limits: &Limits,
    tolerated: &mut Tolerated,
) -> Result<RuntimeMonitor, QmpError> {
    let (mut visit, _) = take_turn(shared, &check, limits, Instant::now()).await?;
    let hold = Hold::new(limits);
    let result = add_and_connect(&mut visit, own_socket, &check, &hold).await;
    tolerated.add(&visit.tolerated());
    match result {
        Ok(monitor) => Ok(monitor),
        Err(Step::NothingMade(error)) => Err(error),
        Err(Step::Made(error)) => {
            if remove_monitor(&mut visit, &hold).await.is_err() {
                // The visit broke off: once more over another.
                drop(visit);
                if let Err(left) = remove_runtime_monitor(shared, &check, limits).await {
                    tracing::warn!(
                        "QEMU keeps the monitor {MONITOR_OBJECT_ID}, which could not be removed: {left}; the next attach removes it"
                    );
                }
            }
            Err(error)
        }
    }
}

/// Visits the shared socket and takes away the monitor that we, or a qmpin before us, made there.
/// None being there is fine.
///
/// # Errors
/// Any [`QmpError`] of the visit.
pub(super) async fn remove_runtime_monitor<E: Into<CheckError>>(
    shared: &Path,
    check: impl Fn(&Peer) -> Result<(), E>,
    limits: &Limits,
) -> Result<(), QmpError> {
    let (mut visit, _) = take_turn(shared, check, limits, Instant::now()).await?;
    let hold = Hold::new(limits);
    let [capabilities] = all(visit.exchange(negotiation()?, hold.left()).await?)?;
    visit.negotiated(Some(capabilities))?;
    remove_monitor(&mut visit, &hold).await
}

/// Where it failed: before or after QEMU may have made something.
enum Step {
    NothingMade(QmpError),
    Made(QmpError),
}

/// How long the visit may go on.
struct Hold<'a> {
    limits: &'a Limits,
    since: Instant,
}

impl Hold<'_> {
    fn new(limits: &Limits) -> Hold<'_> {
        Hold { limits, since: Instant::now() }
    }

    fn left(&self) -> Duration {
        self.limits.hold_max.saturating_sub(self.since.elapsed())
    }
}

fn negotiation() -> Result<Batch, QmpError> {
    let mut batch = Batch::default();
    batch.add::<()>(CAPABILITIES, None)?;
    Ok(batch)
}

async fn add_and_connect<E: Into<CheckError>>(
    visit: &mut Session,
    own_socket: &Path,
    check: impl Fn(&Peer) -> Result<(), E>,
    hold: &Hold<'_>,
) -> Result<RuntimeMonitor, Step> {
    if !knows_monitors(visit, hold).await.map_err(Step::NothingMade)? {
        return Ok(RuntimeMonitor::Unsupported);
    }
    let batch = creation(own_socket).map_err(Step::NothingMade)?;
    let answers = visit.exchange(batch, hold.left()).await.map_err(Step::Made)?;
    let [chardev, monitor] = all(answers).map_err(Step::Made)?;
    chardev.read::<Value>().map_err(Step::Made)?;
    monitor.read::<Value>().map_err(Step::Made)?;

    let own = within(hold.left(), async {
        let mut own = Session::connect(own_socket, hold.limits).await?;
        accept_peer(&own, check)?;
        own.open().await?;
        Ok(own)
    });
    match own.await {
        Ok(Ok(own)) => {
            // A QEMU that is killed leaves its sockets' files behind. No other program is to come here, so
            // the file has done its service; that it is gone already is fine with QEMU.
            if let Err(error) = std::fs::remove_file(own_socket) {
                tracing::debug!("could not remove {}: {error}", own_socket.display());
            }
            Ok(RuntimeMonitor::Added(Box::new(own)))
        }
        Ok(Err(error)) => Err(Step::Made(error)),
        Err(_) => Err(Step::Made(QmpError::Timeout {
            awaited: super::Awaited::Greeting,
            limit: hold.limits.hold_max,
            strays: 0,
        })),
    }
}

const ADD_MONITOR: AddMonitor<'_> = AddMonitor {
    qom_type: MONITOR_TYPE,
    id: MONITOR_OBJECT_ID,
    chardev: MONITOR_CHARDEV_ID,
    close_action: "delete",
};

/// Negotiates, and tries whether QEMU has the type.
async fn knows_monitors(visit: &mut Session, hold: &Hold<'_>) -> Result<bool, QmpError> {
    let mut batch = negotiation()?;
    batch.add("object-add".into(), Some(&ADD_MONITOR))?;
    let [capabilities, monitor] = all(visit.exchange(batch, hold.left()).await?)?;
    visit.negotiated(Some(capabilities))?;
    match monitor.read::<Value>() {
        // The text only saves a detour: taken wrongly, the real `object-add` is refused in turn.
        Err(QmpError::Refused { desc, .. }) => Ok(!desc.contains(TYPE_ARGUMENT)),
        // A qmpin that was killed had left its chardev behind, and now it has a monitor.
        Ok(_) => remove_monitor(visit, hold).await.map(|()| true),
        Err(error) => Err(error),
    }
}

fn creation(own_socket: &Path) -> Result<Batch, QmpError> {
    let Some(path) = own_socket.to_str() else {
        let source = serde::ser::Error::custom("the path is not UTF-8");
        return Err(QmpError::Encode { command: "chardev-add".into(), source });
    };
    let mut batch = Batch::default();
    let socket = qmp::UnixSocketAddress { path: path.to_owned(), abstract_: None, tight: None };
    batch.add_command(&qmp::chardev_add {
        id: MONITOR_CHARDEV_ID.to_owned(),
        backend: qmp::ChardevBackend::socket(qmp::ChardevSocketWrapper {
            data: qmp::ChardevSocket {
                base: qmp::ChardevCommon { logappend: None, logfile: None },
                addr: qmp::SocketAddressLegacy::unix(qmp::UnixSocketAddressWrapper {
                    data: socket,
                }),
                server: Some(true),
                wait: Some(false),
                nodelay: None,
                reconnect: None,
                telnet: None,
                tls_authz: None,
                tls_creds: None,
                tn3270: None,
                websocket: None,
            },
        }),
    })?;
    batch.add("object-add".into(), Some(&ADD_MONITOR))?;
    Ok(batch)
}

/// Takes the monitor and its chardev away. QEMU's "no" is fine: then they were not there.
async fn remove_monitor(visit: &mut Session, hold: &Hold<'_>) -> Result<(), QmpError> {
    let mut batch = Batch::default();
    batch.add_command(&qmp::object_del { id: MONITOR_OBJECT_ID.to_owned() })?;
    batch.add_command(&qmp::chardev_remove { id: MONITOR_CHARDEV_ID.to_owned() })?;
    let left = hold.left().max(hold.limits.hold_max / 4);
    visit.exchange(batch, left).await.map(drop)
}
