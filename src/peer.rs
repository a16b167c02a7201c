//! The process at the other end of a Unix socket, as the kernel recorded it when that process called `listen(2)`.
//!
//! The number alone proves little: the listener may have ended, another process may serve its socket, and the number
//! may be a third one's. What can be proved depends on the kernel:
//!
//! | kernel | the peer is | proved |
//! |---|---|---|
//! | Linux >= 6.5 | a pidfd (`SO_PEERPIDFD`) | it is the very process that called `listen`, and it lives |
//! | older | number and user (`SO_PEERCRED`) | the process of that number was there before the connection, and its user could have called `listen` |
//!
//! On older kernels the process may thus be another than the listener, but never one of a user with more rights than
//! the listener had. `discover::prove_peer` does both checks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use crate::ids::{Pid, StartTicks};

/// How many ticks of `/proc/PID/stat` make a second (`USER_HZ`).
const TICKS_PER_S: i64 = 100;
const NS_PER_TICK: i64 = 1_000_000_000 / TICKS_PER_S;

/// The root user.
const ROOT: u32 = 0;

/// The process that called `listen` on the socket that a connection was made to.
#[derive(Debug)]
pub struct Peer {
    pid: Pid,
    uid: u32,
    hold: Hold,
}

/// What the kernel gives to recognise the process by.
#[derive(Debug)]
enum Hold {
    /// A pidfd of it.
    Pidfd(OwnedFd),
    /// The process has ended: there is no pidfd of it any more.
    Ended,
    /// The kernel has no `SO_PEERPIDFD`. A process that started later than this is another one.
    Before(StartTicks),
}

/// The present, as `/proc/PID/stat` counts it.
#[must_use]
pub fn now() -> StartTicks {
    let now = clock_gettime(ClockId::Boottime);
    let ticks = now.tv_sec * TICKS_PER_S + now.tv_nsec / NS_PER_TICK;
    StartTicks(u64::try_from(ticks).unwrap_or(0))
}

impl Peer {
    /// Returns the peer of a connected socket. `connected_after` is the time before `connect` was called.
    ///
    /// # Errors
    /// The kernel's answer; also where the process is not in qmpin's PID namespace, so that it has no number here.
    pub fn of(socket: &impl AsFd, connected_after: StartTicks) -> io::Result<Peer> {
        let credentials = getsockopt(&socket.as_fd(), PeerCredentials)?;
        if credentials.pid() <= 0 {
            return Err(io::Error::other("it is not in our PID namespace"));
        }
        let hold = match getsockopt(&socket.as_fd(), PeerPidfd) {
            Ok(pidfd) => Hold::Pidfd(pidfd),
            Err(Errno::ENOPROTOOPT) => Hold::Before(connected_after),
            // ESRCH, EINVAL and ENODATA, each from some kernels.
            Err(errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => {
                return Err(errno.into());
            }
            Err(_) => Hold::Ended,
        };
        Ok(Peer { pid: Pid(credentials.pid()), uid: credentials.uid(), hold })
    }

    /// Its number. Without proof it may be another process's by now.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The user it ran as when it called `listen`.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether root called `listen`.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid == ROOT
    }

    /// Whether a process of the peer's number that started at `start`, and whose line was read after the connection
    /// was made, is the peer. See the table above.
    ///
    /// # Errors
    /// Those of `poll(2)`.
    pub fn is_process_started_at(&self, start: StartTicks) -> io::Result<bool> {
        match &self.hold {
            // It lives now, so its number was not given to another process before, when the line was read.
            Hold::Pidfd(pidfd) => lives(pidfd),
            Hold::Ended => Ok(false),
            Hold::Before(connected_after) => Ok(start <= *connected_after),
        }
    }

    /// Whether a process with these users (real, effective, saved) can be the one that called `listen`. Root may have
    /// given up its rights since, as with QEMU's `-run-with user=`; no program may have gained any.
    #[must_use]
    pub fn can_have_become(&self, uids: [u32; 3]) -> bool {
        self.is_root() || uids == [self.uid; 3]
    }
}

/// Whether the process or thread of a pidfd lives.
///
/// # Errors
/// Those of `poll(2)`.
pub(crate) fn lives(pidfd: &OwnedFd) -> io::Result<bool> {
    // It becomes readable when that ends (`man 2 pidfd_open`).
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut fds, Some(&at_once))? == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    impl Peer {
        /// A peer of a kernel without pidfds of peers.
        pub(crate) fn without_pidfd(pid: Pid, uid: u32, connected_after: StartTicks) -> Peer {
            Peer { pid, uid, hold: Hold::Before(connected_after) }
        }
    }

    #[test]
    fn listener_is_proved_by_number_user_and_life() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).expect("bound");
        let asked = now();
        let stream = UnixStream::connect(&path).expect("connected");
        let peer = Peer::of(&stream, asked).expect("a peer");
        assert_eq!(u32::try_from(peer.pid().0), Ok(std::process::id()));
        assert_eq!(peer.uid(), rustix::process::geteuid().as_raw());
        assert!(peer.is_process_started_at(StartTicks(0)).expect("asked"));
    }

    #[test]
    fn without_a_pidfd_a_later_process_is_another_one() {
        let peer = Peer::without_pidfd(Pid(7), 1000, StartTicks(500));
        assert!(peer.is_process_started_at(StartTicks(500)).expect("asked"));
        assert!(!peer.is_process_started_at(StartTicks(501)).expect("asked"));
    }

    #[test]
    fn rights_can_be_given_up_and_not_gained() {
        let of = |uid| Peer::without_pidfd(Pid(7), uid, StartTicks(0));
        assert!(of(0).can_have_become([0; 3]) && of(0).can_have_become([64055; 3]));
        assert!(of(1000).can_have_become([1000; 3]));
        for uids in [[0; 3], [1001; 3], [1000, 0, 0], [1000, 1000, 0]] {
            assert!(!of(1000).can_have_become(uids), "{uids:?}");
        }
    }
}
