//! A visit of a socket that others need: wait until the monitor is free, ask, close. A few milliseconds.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::error::{CheckError, QmpError};
use super::roles::Roles;
use super::session::Session;
use super::wire::Batch;
use super::{Limits, Tolerated};
use crate::peer::Peer;

/// What a lease brought home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseReport {
    /// Who is which thread.
    pub roles: Roles,
    /// How long the socket was ours: from the greeting to the close.
    pub held: Duration,
    /// How long the wait was: from the call to the greeting.
    pub waited: Duration,
    /// What was odd and let pass.
    pub tolerated: Tolerated,
}

/// Asks for the roles in one visit. Connects once and waits until the monitor is free, at most
/// `limits.wait_turn_max`; then holds the socket at most `limits.hold_max`. The replies are read
/// after the socket is closed.
///
/// `check` is given the process that listens, before anything is sent to it.
///
/// Not cancel safe in one respect: dropped while it waits, it leaves a dead entry in
/// the socket's backlog of two until QEMU comes to it. Let it run.
///
/// # Errors
/// [`QmpError::WrongPeer`] where `check` refused, [`QmpError::Held`] where the monitor did not become free,
/// else any [`QmpError`] of the wire or of the roles.
pub async fn lease<E: Into<CheckError>>(
    path: &Path,
    check: impl Fn(&Peer) -> Result<(), E>,
    limits: &Limits,
) -> Result<LeaseReport, QmpError> {
    let asked = Instant::now();
    let batch = Batch::first_roles(limits)?;
    let (mut session, waited) = take_turn(path, check, limits, asked).await?;
    let turn = Instant::now();
    let answers = session.negotiate_and_ask_roles(batch, limits.hold_max).await;
    let tolerated = session.tolerated();
    drop(session);
    let held = turn.elapsed();
    Ok(LeaseReport { roles: Roles::read(answers?, limits)?, held, waited, tolerated })
}

/// Connects, has the peer checked and waits for the greeting, all within `limits.wait_turn_max`.
pub(super) async fn take_turn<E: Into<CheckError>>(
    path: &Path,
    check: impl Fn(&Peer) -> Result<(), E>,
    limits: &Limits,
    asked: Instant,
) -> Result<(Session, Duration), QmpError> {
    let mut session = Session::connect_until(path, limits, asked, limits.wait_turn_max).await?;
    accept_peer(&session, check)?;
    let left = limits.wait_turn_max.saturating_sub(asked.elapsed());
    match session.greeting(left).await {
        Ok(_) => Ok((session, asked.elapsed())),
        // A connected client is greeted when the one before it has gone.
        Err(QmpError::Timeout { .. }) => {
            Err(QmpError::Held { path: path.to_owned(), waited: limits.wait_turn_max })
        }
        Err(error) => Err(error),
    }
}

/// Asks the caller whether the process at the other end is the right one.
pub(super) fn accept_peer<E: Into<CheckError>>(
    session: &Session,
    check: impl Fn(&Peer) -> Result<(), E>,
) -> Result<(), QmpError> {
    check(session.peer()).map_err(|refusal| QmpError::WrongPeer {
        path: session.path().to_owned(),
        pid: session.peer().pid(),
        source: refusal.into(),
    })
}
