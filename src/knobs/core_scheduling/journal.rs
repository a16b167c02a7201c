//! What the journal remembers of core-scheduling cookies: which of them qmpin made.

use serde::{Deserialize, Serialize};

use crate::scheduling::Cookie;

/// A line about a cookie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CookieRecord {
    /// One is about to be made. Before the first of these the VM had none.
    Intended,
    /// It is this one. Written after the fact.
    Made(Cookie),
    /// The kernel would not make it. Written after the fact.
    Refused,
}

/// The cookies that qmpin made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CookieMemory {
    made: Vec<Cookie>,
    /// Whether there may be one that was not recorded.
    is_pending: bool,
}

impl CookieMemory {
    pub(crate) fn add(&mut self, record: CookieRecord) {
        match record {
            CookieRecord::Intended => self.is_pending = true,
            CookieRecord::Refused => self.is_pending = false,
            CookieRecord::Made(cookie) => {
                self.is_pending = false;
                if !self.made.contains(&cookie) {
                    self.made.push(cookie);
                }
            }
        }
    }

    /// The records that come to this.
    pub(crate) fn records(&self) -> impl Iterator<Item = CookieRecord> + '_ {
        let pending = self.is_pending.then_some(CookieRecord::Intended);
        self.made.iter().copied().map(CookieRecord::Made).chain(pending)
    }

    /// Whether none was ever to be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.made.is_empty() && !self.is_pending
    }

    /// Whether there may be one that was not recorded.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.is_pending
    }

    /// Whether qmpin made this one. Killed right after the first was made, it was not recorded which it
    /// is; and before, there was none.
    #[must_use]
    pub fn is_ours(&self, cookie: Cookie) -> bool {
        self.is_pending || self.made.contains(&cookie)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    fn cookie(number: u64) -> Cookie {
        Cookie(NonZeroU64::new(number).expect("a number"))
    }

    #[test]
    fn ours_is_what_was_made_or_may_have_been() {
        let mut memory = CookieMemory::default();
        assert!(memory.is_empty() && !memory.is_ours(cookie(1)));
        memory.add(CookieRecord::Intended);
        assert!(!memory.is_empty() && memory.is_ours(cookie(1)));
        memory.add(CookieRecord::Made(cookie(1)));
        assert!(memory.is_ours(cookie(1)) && !memory.is_ours(cookie(2)));
        memory.add(CookieRecord::Intended);
        memory.add(CookieRecord::Refused);
        assert!(memory.is_ours(cookie(1)) && !memory.is_ours(cookie(2)));
    }
}
