//! The QMP session, on transcripts, on scripted peers and on real QEMU.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod channel;
mod notes;
mod qemu;
mod replay;
mod roles;
mod session;
