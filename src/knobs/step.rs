//! A change of one thread: the word that all knobs of a VM's threads plan in. No I/O.

use crate::threads::{Role, ThreadKey, thread_in_words};

/// One change of one thread.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ThreadStep<V> {
    /// Which thread.
    pub thread: ThreadKey,
    /// What it is for.
    pub role: Role,
    /// Its name, for display only.
    pub comm: String,
    /// What was seen.
    pub from: V,
    /// What it is to be.
    pub to: V,
}

impl<V> ThreadStep<V> {
    /// The thread in words: `vCPU 3 (thread 595)`.
    #[must_use]
    pub fn who(&self) -> String {
        thread_in_words(self.thread.tid, &self.role, &self.comm)
    }
}
