//! What several integration tests share.

#![allow(dead_code)] // each test is a crate of its own and uses a part of this
#![allow(clippy::expect_used)] // helpers of tests say no as tests do

pub(crate) mod fake_host;
pub(crate) mod hosts;
pub(crate) mod spoilt;
