//! How the kernel's scheduler treats a thread: policy and priority (`man 7 sched`), and with whom it
//! may share a core. A word: no I/O.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// A scheduling policy, with the kernel's number (`include/uapi/linux/sched.h`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(i32)]
pub enum Class {
    /// `SCHED_OTHER`: of every thread that was given no other.
    Other = 0,
    /// `SCHED_FIFO`: runs until it sleeps, or something of a higher priority wants to.
    Fifo = 1,
    /// `SCHED_RR`: as that, but takes turns with its equals.
    Rr = 2,
    /// `SCHED_BATCH`.
    Batch = 3,
    /// `SCHED_IDLE`.
    Idle = 5,
    /// `SCHED_DEADLINE`: with a budget that is not known here.
    Deadline = 6,
    /// `SCHED_EXT`: by a loaded program (Linux 6.12).
    Ext = 7,
}

impl Class {
    const ALL: [Class; 7] = [
        Class::Other,
        Class::Fifo,
        Class::Rr,
        Class::Batch,
        Class::Idle,
        Class::Deadline,
        Class::Ext,
    ];

    /// The one with this number; `None`: a later kernel's.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.number() == number)
    }

    /// The kernel's number.
    #[must_use]
    pub fn number(self) -> i32 {
        self as i32
    }
}

/// What threads that it makes have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFork {
    /// The same.
    Inherit,
    /// `SCHED_OTHER`, as nice as any (`SCHED_RESET_ON_FORK`, `kernel/sched/core.c: sched_fork`).
    Reset,
}

/// How one thread is treated. Its nice value is no part of it: the kernel keeps it, whatever the policy
/// (`kernel/sched/syscalls.c: _sched_setscheduler`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Scheduling {
    /// Its policy.
    pub class: Class,
    /// Of [`Class::Fifo`] and [`Class::Rr`]: 1 to 99, the higher the sooner. Of all others 0.
    pub priority: u8,
    /// What threads that it makes have.
    pub on_fork: OnFork,
}

impl Scheduling {
    /// What a thread has that was given nothing else.
    pub const OTHER: Scheduling =
        Scheduling { class: Class::Other, priority: 0, on_fork: OnFork::Inherit };

    /// Whether both run alike. What they leave to their children does not show.
    #[must_use]
    pub fn runs_as(&self, other: &Scheduling) -> bool {
        (self.class, self.priority) == (other.class, other.priority)
    }
}

impl fmt::Display for Scheduling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // serde's name of a variant is the policy's name everywhere.
        self.class.serialize(&mut *f)?;
        if self.priority > 0 { write!(f, ":{}", self.priority) } else { Ok(()) }
    }
}

/// A core-scheduling cookie: threads with different ones, or of which one has none, never run on the same
/// core at the same time (`Documentation/admin-guide/hw-vuln/core-scheduling.rst`). The number stands for
/// it for as long as this boot lasts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Cookie(pub NonZeroU64);

impl fmt::Display for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// The cookie that a thread has, or that it has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ItsCookie(pub Option<Cookie>);

impl fmt::Display for ItsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(cookie) => write!(f, "core-scheduling cookie {cookie}"),
            None => f.write_str("no core-scheduling cookie"),
        }
    }
}

/// Whether the kernel keeps some time for others on a CPU whose real-time thread never sleeps
/// (`kernel.sched_rt_runtime_us`, `Documentation/scheduler/sched-rt-group.rst`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Throttling {
    /// It does, or does not say.
    On,
    /// It does not.
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_has_one_number_and_one_name() {
        for (class, number, name) in [
            (Class::Other, 0, "other"),
            (Class::Fifo, 1, "fifo"),
            (Class::Rr, 2, "rr"),
            (Class::Batch, 3, "batch"),
            (Class::Idle, 5, "idle"),
            (Class::Deadline, 6, "deadline"),
            (Class::Ext, 7, "ext"),
        ] {
            assert_eq!(Class::from_number(number), Some(class));
            assert_eq!(class.number(), number);
            let word = serde_json::to_string(&class).expect("a word");
            assert_eq!(word, format!("\"{name}\""));
            assert_eq!(Scheduling { class, ..Scheduling::OTHER }.to_string(), name);
        }
        // 4 was reserved and never used.
        assert_eq!(Class::from_number(4), None);
    }

    #[test]
    fn it_is_shown_as_in_a_policy_file() {
        let fifo = Scheduling { class: Class::Fifo, priority: 1, on_fork: OnFork::Reset };
        assert_eq!(fifo.to_string(), "fifo:1");
        assert_eq!(Scheduling::OTHER.to_string(), "other");
    }
}
