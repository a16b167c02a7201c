//! Connecting to a socket that serves one client.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use super::error::QmpError;
use crate::peer::{self, Peer};

/// The first and the longest pause between two tries to connect to a full backlog.
const CONNECT_PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Connects, and returns the process that listens beside the stream. Waits until `waited` after `asked` for a place in
/// the backlog.
///
/// A monitor serves one client; two more fit in its backlog (`listen(fd, 1)` in
/// util/qemu-sockets.c). A full backlog answers EAGAIN, which takes no place in it and which no
/// readiness event ends, so we try again.
pub(super) async fn connect(
    path: &Path,
    asked: Instant,
    waited: Duration,
) -> Result<(UnixStream, Peer), QmpError> {
    let (mut pause, pause_max) = CONNECT_PAUSES;
    let (stream, connected_after) = loop {
        let now = peer::now();
        match UnixStream::connect(path).await {
            Ok(stream) => break (stream, now),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if asked.elapsed() + pause > waited {
                    return Err(QmpError::Held { path: path.to_owned(), waited });
                }
                sleep(pause).await;
                pause = (pause * 2).min(pause_max);
            }
            Err(source) => {
                let source = too_long(path).or_else(|| not_a_socket(path)).unwrap_or(source);
                return Err(QmpError::Connect { path: path.to_owned(), source });
            }
        }
    };
    let peer = Peer::of(&stream, connected_after)
        .map_err(|source| QmpError::PeerUnknown { path: path.to_owned(), source })?;
    Ok((stream, peer))
}

/// Longer paths have no room in an address (`man 7 unix`).
const PATH_BYTES_MAX: usize = 107;

fn too_long(path: &Path) -> Option<io::Error> {
    let bytes = path.as_os_str().len();
    let text = format!("its path has {bytes} bytes, and a socket's has {PATH_BYTES_MAX} at most");
    (bytes > PATH_BYTES_MAX).then(|| io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// The kernel refuses a connection to a file that is no socket in the same words as to one that no process
/// serves.
fn not_a_socket(path: &Path) -> Option<io::Error> {
    let found = std::fs::metadata(path).ok()?;
    (!found.file_type().is_socket())
        .then(|| io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket"))
}
