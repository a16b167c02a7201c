//! qmpin gives one QEMU VM the CPUs it was promised, and proves it.
//!
//! The way through the house is *discover → plan → apply → watch → restore*; ARCHITECTURE.md is the
//! map. Knowledge flows one way: words ← instruments ← stages ← supervise ← cli.

// Words: no I/O.
pub mod cpuset;
pub mod drop_ins;
pub mod error;
pub mod host_pass;
pub mod ids;
pub mod places;
pub mod policy;
pub mod scheduling;
pub mod shown;
pub mod threads;
pub mod topology;

// Instruments: thin I/O, no decisions.
pub mod cgroups;
pub mod irqbalance;
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
pub mod sysroot;
pub mod systemd;

// Stages: discover → plan → apply → watch → restore.
pub mod apply;
pub mod discover;
pub mod plan;
pub mod restore;
pub mod watch;

// The loop.
pub mod supervise;

// Faces: who draws, who answers the door.
pub mod cli;
pub mod render;
