//! What several integration tests share.

#![allow(dead_code)] // each test is a crate of its own and uses a part of this
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests say no as tests do

pub(crate) mod fake_host;
pub(crate) mod guests;
pub(crate) mod hosts;
pub(crate) mod qemu;
pub(crate) mod qmp_peer;
pub(crate) mod spoilt;
pub(crate) mod transcript;

use std::io::Write;

/// Says that a test was skipped, past the capture of the test harness, so that it can be counted.
pub(crate) fn skipped(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}
