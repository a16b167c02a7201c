//! Where a supervisor reads its policy.

use std::path::PathBuf;

use crate::error::{Failure, chain};
use crate::policy::Policy;

/// Where the VM's policy is from, so that it can be read again.
#[derive(Clone, Copy)]
pub struct PolicySource<'a> {
    /// The files that have a say. They need not exist.
    pub files: &'a [PathBuf],
    /// Reads them.
    pub read: &'a (dyn Fn() -> Result<Policy, Failure> + Sync),
}

impl PolicySource<'_> {
    /// Reads the policy again.
    ///
    /// # Errors
    /// Why the policy before stays in force, in words. A source that goes on with what was good the last time says why;
    /// then nothing is new.
    pub(super) fn read_again(&self) -> Result<Policy, String> {
        let policy = (self.read)().map_err(|error| chain(&error))?;
        match &policy.instead_of {
            Some(why) => Err(why.clone()),
            None => Ok(policy),
        }
    }
}
