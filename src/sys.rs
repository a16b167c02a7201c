//! System calls that no crate of this program has without `unsafe`, and a descriptor that can be awaited. This is the
//! one place with `unsafe`.

#![allow(unsafe_code)] // each use has its reason beside it

use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns a thread's policy, with `SCHED_RESET_ON_FORK` where it is set, and its priority (`sched_getscheduler(2)`).
/// 0 is the calling thread.
///
/// # Errors
/// The kernel's answer; `ESRCH` where there is no such thread.
pub(crate) fn scheduler(tid: i32) -> io::Result<(i32, i32)> {
    // SAFETY: it takes a number.
    let policy = checked(unsafe { libc::sched_getscheduler(tid) })?;
    let mut param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a structure of its kind, for the time of the call.
    checked(unsafe { libc::sched_getparam(tid, &raw mut param) })?;
    Ok((policy, param.sched_priority))
}

/// Sets a thread's policy and priority (`sched_setscheduler(2)`). 0 is the calling thread.
///
/// # Errors
/// The kernel's answer; `EPERM` without the right, `EINVAL` where the two do not fit together.
pub(crate) fn set_scheduler(tid: i32, policy: i32, priority: i32) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the pointer is to a structure of its kind, for the time of the call.
    checked(unsafe { libc::sched_setscheduler(tid, policy, &raw const param) }).map(drop)
}

/// Has the kernel drop messages before they are queued: a program of classic BPF (`SO_ATTACH_FILTER`, `socket(7)`).
///
/// # Errors
/// The kernel's answer; `EINVAL` where the program is not valid.
pub(crate) fn attach_filter(
    socket: BorrowedFd<'_>,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    let size = libc::socklen_t::try_from(size_of_val(&program)).unwrap_or_default();
    // SAFETY: the kernel copies the structure and the `len` instructions that it points to, and changes neither; both
    // live until the call returns.
    checked(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    })
    .map(drop)
}

fn checked(answer: i32) -> io::Result<i32> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// An owned descriptor, awaited for reading.
#[derive(Debug)]
pub(crate) struct Readable {
    fd: AsyncFd<OwnedFd>,
}

impl Readable {
    /// Takes a non-blocking descriptor. It must be called within a tokio runtime.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Readable> {
        // SAFETY: the descriptor is owned by the `AsyncFd`, which is private and never taken apart or
        // forgotten here, so it stays open, the same, and ours until the `AsyncFd` is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Readable { fd: fd.map_err(io::Error::from)? })
    }

    /// Awaits readability, then reads; again while the read would block. Cancel safe.
    pub(crate) async fn read<T>(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.fd.async_io(Interest::READABLE, |fd| read(fd.as_fd())).await
    }

    /// The descriptor, for what is not reading.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Awaits readability alone. Cancel safe.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        self.fd.readable().await.map(|_| ())
    }
}
