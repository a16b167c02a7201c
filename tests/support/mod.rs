//! What several integration tests share.

#![allow(dead_code)] // each test is a crate of its own and uses a part of this

pub(crate) mod fake_host;
pub(crate) mod hosts;
