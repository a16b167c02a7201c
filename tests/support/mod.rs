//! What several integration tests share.

#![allow(dead_code)] // each group of tests uses a part of this
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests say no as tests do

pub(crate) mod captured;
pub(crate) mod clean;
pub(crate) mod fake_host;
pub(crate) mod fake_qemu;
pub(crate) mod guests;
pub(crate) mod host_world;
pub(crate) mod hosts;
pub(crate) mod made_up;
pub(crate) mod made_up_units;
pub(crate) mod ordered;
pub(crate) mod qemu;
pub(crate) mod qmp_peer;
pub(crate) mod run;
pub(crate) mod spoilt;
pub(crate) mod transcript;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Says that a test was skipped, past the capture of the test harness, so that it can be counted: on a line of its own,
/// since
/// `cargo test --quiet` is in the middle of one, of dots. `tests/run` counts those that begin so.
pub(crate) fn skipped(test: &str, reason: &str) {
    // One write: lines of tests that run side by side must not get into each other.
    let _ = std::io::stderr().write_all(format!("\nskipped: {test}: {reason}\n").as_bytes());
}

/// Connects without waiting, as Proxmox does: `WouldBlock` where the backlog is full. The stream does not block either.
pub(crate) fn connect_at_once(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// What a test of both is run with; where there is no KVM, it says so.
pub(crate) fn accels(test: &str) -> Vec<qemu::Accel> {
    if qemu::has_kvm() {
        vec![qemu::Accel::Tcg, qemu::Accel::Kvm]
    } else {
        skipped(test, "half of it, for there is no KVM");
        vec![qemu::Accel::Tcg]
    }
}

/// Asserts that a result is an error of a pattern, and shows it where it is not.
#[allow(unused_macros)] // not every group needs it
macro_rules! assert_error {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result {
            Err($pattern) $(if $guard)? => {}
            other => panic!("not as awaited: {other:?}"),
        }
    };
}
