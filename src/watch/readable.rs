//! A file descriptor that can be awaited. The one place with `unsafe`.

#![allow(unsafe_code)] // tokio's `AsyncFd` asks for a promise that only an owned descriptor can keep

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An owned descriptor, awaited for reading.
#[derive(Debug)]
pub(super) struct Readable {
    fd: AsyncFd<OwnedFd>,
}

impl Readable {
    /// Takes a non-blocking descriptor. It must be called within a tokio runtime.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Readable> {
        // SAFETY: the descriptor is owned by the `AsyncFd`, which is private and never taken apart or
        // forgotten here, so it stays open, the same, and ours until the `AsyncFd` is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Readable { fd: fd.map_err(io::Error::from)? })
    }

    /// Awaits readability, then reads; again while the read would block. Cancel safe.
    pub(super) async fn read<T>(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.fd.async_io(Interest::READABLE, |fd| read(fd.as_fd())).await
    }

    /// The descriptor, for what is not reading.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Awaits readability alone. Cancel safe.
    pub(super) async fn ready(&self) -> io::Result<()> {
        self.fd.readable().await.map(|_| ())
    }
}
