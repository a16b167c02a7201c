//! qmpin gives one QEMU VM the CPUs it was promised, and proves it.
//!
//! The way through the house is *discover → plan → apply → watch → restore*; ARCHITECTURE.md is the map. Each knob has
//! a folder below [`knobs`], and knowledge flows one way: words ← instruments ← discover, plan ← knobs ← attachment ←
//! supervise ← cli.

// Words: no I/O.
pub mod check;
pub mod cli;
pub mod cpuset;
pub mod devices;
pub mod error;
pub mod guest;
pub mod ids;
pub mod policy;
pub mod promises;
pub mod render;
pub mod scheduling;
pub mod shown;
pub mod site;
pub mod threads;
pub mod topology;
pub mod wording;

// Instruments: thin I/O, no decisions.
pub mod cgroups;
pub mod journal;
pub mod leases;
pub mod locks;
pub mod marks;
pub mod mask;
pub mod peer;
pub mod qmp;
pub mod runtime;
pub mod sched;
pub mod services;
pub mod standing;
pub mod state_file;
mod sys;
pub mod sysroot;
pub mod systemd;

// What there is, and what should be.
pub mod discover;
pub mod plan;

// What is changed, and one VM's share of it.
pub mod attachment;
pub mod knobs;

// The loop, and what wakes it.
pub mod supervise;
pub mod watch;

// Judges, and how all of it is shown.
