//! Where a supervisor reads its policy.

use std::path::PathBuf;

use crate::error::Failure;
use crate::policy::Policy;

/// Where the VM's policy is from, so that it can be read again.
#[derive(Clone, Copy)]
pub struct PolicySource<'a> {
    /// The files that have a say. They need not exist.
    pub files: &'a [PathBuf],
    /// Reads them.
    pub read: &'a (dyn Fn() -> Result<Policy, Failure> + Sync),
}
