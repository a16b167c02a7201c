//! Proves that the process of a peer's number is the one that called `listen`: see [`crate::peer`] for what each
//! kernel allows to prove.
//!
//! ```text
//!   connect ─▶ SO_PEERCRED, SO_PEERPIDFD ─▶ read /proc/PID/stat and status ─▶ the pidfd: it still lives
//! ```
//!
//! The pidfd is asked last. A process keeps its number while it lives, so the lines read before were its own.

use super::process::ProcessError;
use super::stat;
use crate::peer::Peer;
use crate::sysroot::{ReadError, SysRoot};
use crate::threads::ProcessKey;

/// Names the peer's process for good.
///
/// # Errors
/// [`ProcessError::PeerEnded`] where the listener has ended, also where another process has its number by now;
/// [`ProcessError::PeerUser`] where the process has more rights than the listener had; [`ProcessError::Gone`] where
/// there is no such process.
pub fn prove_peer(root: &SysRoot, peer: &Peer) -> Result<ProcessKey, ProcessError> {
    let pid = peer.pid();
    let gone = |source| ProcessError::Gone { pid, source: Box::new(source) };
    let stat = stat::of(root, pid).map_err(gone)?;
    // Whatever root has made can have become anything.
    let uids = if peer.is_root() { None } else { Some(uids(root, peer).map_err(gone)?) };
    let is_peer = peer.is_process_started_at(stat.start).unwrap_or(false);
    if !is_peer || stat.is_dead() {
        return Err(ProcessError::PeerEnded { pid });
    }
    match uids {
        Some(found) if !peer.can_have_become(found) => {
            Err(ProcessError::PeerUser { pid, listener: peer.uid(), found })
        }
        _ => Ok(ProcessKey { pid, start: stat.start }),
    }
}

/// The real, effective and saved user of the process.
fn uids(root: &SysRoot, peer: &Peer) -> Result<[u32; 3], ReadError> {
    let path = format!("proc/{}/status", peer.pid());
    let status = root.read_lossy(&path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or("");
    let numbers = line.split_ascii_whitespace().map_while(|number| number.parse().ok());
    let uids: Vec<u32> = numbers.take(3).collect();
    uids.try_into().map_err(|_| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "it has no users");
        ReadError { path: root.root().join(&path), source }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ids::{Pid, StartTicks};

    /// Proves a peer without a pidfd against a process 42 that started at 777.
    fn prove(listener: u32, connected_after: u64, uids: &str) -> Result<ProcessKey, ProcessError> {
        let dir = tempfile::tempdir().expect("a folder");
        let process = dir.path().join("proc/42");
        fs::create_dir_all(&process).expect("made");
        let zeros = "0 ".repeat(18);
        fs::write(process.join("stat"), format!("42 (kvm) S {zeros}777 0 0 0\n")).expect("stat");
        fs::write(process.join("status"), format!("Name:\tkvm\nUid:\t{uids}\n")).expect("status");
        let peer = Peer::without_pidfd(Pid(42), listener, StartTicks(connected_after));
        prove_peer(&SysRoot::at(dir.path()), &peer)
    }

    #[test]
    fn without_a_pidfd_neither_a_later_process_nor_one_with_more_rights_is_the_peer() {
        let key = ProcessKey { pid: Pid(42), start: StartTicks(777) };
        assert_eq!(prove(65534, 777, "65534 65534 65534 65534").expect("proved"), key);
        assert_eq!(prove(0, 1000, "64055 64055 64055 64055").expect("rights given up"), key);
        let error = prove(0, 776, "0 0 0 0").expect_err("it started after the connection");
        assert!(matches!(error, ProcessError::PeerEnded { .. }), "{error}");
        for uids in ["0 0 0 0", "1000 1000 1000 1000", "65534 0 0 0", "65534 65534 0 65534"] {
            let error = prove(65534, 1000, uids).expect_err(uids);
            assert!(matches!(error, ProcessError::PeerUser { .. }), "{uids}: {error}");
        }
        assert!(prove(1000, 1000, "x").is_err());
    }
}
