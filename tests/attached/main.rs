//! The whole binary beside real and fake QEMUs.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod attach;
mod crash;
mod follow;
mod hostile;
mod inherited;
mod locks;
mod pid_namespace;
mod priority;
mod service;
mod status;
mod trust_cpu;
mod trust_files;
mod trust_memory;
mod trust_names;
mod trust_peer;
mod trust_vcpus;
mod versions;
mod visits;
mod whose;
