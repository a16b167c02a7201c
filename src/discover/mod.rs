//! *discover* reads host and VM. What it could not read is *unknown, with the reason*.

mod policy;
mod process;
mod stat;
pub mod tasks;

pub use policy::{PolicyFileError, load_policy};
pub use process::{ProcessError, VmLocation, is_alive, process_key, proxmox_process};
