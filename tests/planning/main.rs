//! What is planned for which host and VM, without a VM.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod exhaustive;
mod house;
mod one_policy_everywhere;
mod pictures;
mod plan_allowed;
mod plan_properties;
mod plans;
mod references;
mod topology;
mod topology_spoilt;
