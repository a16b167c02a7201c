//! The knob *core_scheduling*: where the VM has not got whole cores, no thread of anybody else's runs on a
//! core together with one of its own.
//!
//! ```text
//!   whole cores                          ─▶ nothing to do: no other program is there
//!   a sibling is left to another program ─▶ a cookie for all threads of the VM, where `share` allows sharing
//!   the VM has a cookie of another's     ─▶ left alone, and said
//! ```

use std::collections::BTreeMap;
use std::fmt;

use crate::cpuset::CpuSet;
use crate::knobs::core_scheduling::journal::CookieMemory;
use crate::plan::Plan;
use crate::plan::report::Finding;
use crate::policy::{Knob, Level, Sharing, VmPolicy};
use crate::scheduling::Cookie;
use crate::threads::ThreadKey;
use crate::topology::Topology;
use crate::wording::cpus_in_words;

/// The rule's name in reports.
pub const RULE: &str = "core-scheduling";

/// The CPUs of the VM's cores that are left to another program.
#[must_use]
pub fn beside(topology: &Topology, exclusive: &CpuSet) -> CpuSet {
    let cores = exclusive.iter().filter_map(|cpu| topology.core_of(cpu));
    cores.fold(CpuSet::EMPTY, |all, core| all | core.cpus) - *exclusive
}

/// What the VM's cookie is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// None of qmpin's.
    Nothing,
    /// One of its own, since others may run on these CPUs.
    Cookie(CpuSet),
}

/// What is wished for where the policy asks for the knob.
fn wish(topology: &Topology, plan: &Plan, share: Sharing) -> Wish {
    let beside = beside(topology, &plan.exclusive);
    if beside.is_empty() || share == Sharing::Refuse || plan.isolation == Level::None {
        Wish::Nothing
    } else {
        Wish::Cookie(beside)
    }
}

/// The cookies of the VM's threads.
pub type Cookies = BTreeMap<ThreadKey, Option<Cookie>>;

/// Why the kernel gives no cookies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoCookies {
    /// It was built without core scheduling.
    NotBuilt,
    /// The machine has no SMT, or it is off.
    NoSmt,
    /// It answered with this error.
    Failed(String),
}

impl fmt::Display for NoCookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoCookies::NotBuilt => {
                f.write_str("the kernel has no core scheduling (CONFIG_SCHED_CORE)")
            }
            NoCookies::NoSmt => f.write_str("the kernel says that there is no SMT"),
            NoCookies::Failed(error) => write!(f, "the kernel gives no cookie: {error}"),
        }
    }
}

/// What to do about them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CookieStep {
    /// All is as it should be.
    Nothing,
    /// All threads of the VM get a new one.
    Make,
    /// These threads lose theirs, which qmpin made.
    Clear(Vec<ThreadKey>),
    /// A thread has one that is another program's.
    LeaveAlone {
        /// Which thread.
        thread: ThreadKey,
        /// Which cookie.
        cookie: Cookie,
    },
}

/// What leads to the wish. `memory` says which cookies qmpin made.
#[must_use]
pub fn step(wish: Wish, cookies: &Cookies, memory: &CookieMemory) -> CookieStep {
    let have = || cookies.iter().filter_map(|(thread, cookie)| Some((*thread, (*cookie)?)));
    match wish {
        Wish::Nothing => {
            let ours = have().filter(|(_, cookie)| memory.is_ours(*cookie));
            let ours: Vec<ThreadKey> = ours.map(|(thread, _)| thread).collect();
            if ours.is_empty() { CookieStep::Nothing } else { CookieStep::Clear(ours) }
        }
        Wish::Cookie(_) => {
            let foreign = have().find(|(_, cookie)| !memory.is_ours(*cookie));
            let mut all = cookies.values();
            let first = all.next().copied().flatten();
            match foreign {
                Some((thread, cookie)) => CookieStep::LeaveAlone { thread, cookie },
                None if first.is_some() && all.all(|cookie| *cookie == first) => {
                    CookieStep::Nothing
                }
                None if cookies.is_empty() => CookieStep::Nothing,
                None => CookieStep::Make,
            }
        }
    }
}

/// What is wished for by this policy.
#[must_use]
pub fn wished(topology: &Topology, plan: &Plan, policy: &VmPolicy) -> Wish {
    if policy.wanted_knobs().contains(&Knob::CoreScheduling) {
        wish(topology, plan, policy.share.value)
    } else {
        Wish::Nothing
    }
}

/// How far the wish can be met, where a core is shared and the policy asks for the knob. `cookies` are the threads', or
/// why the kernel gives none.
#[must_use]
pub fn finding(
    topology: &Topology,
    plan: &Plan,
    policy: &VmPolicy,
    cookies: Result<&Cookies, &NoCookies>,
    made: &CookieMemory,
) -> Option<Finding> {
    let beside = beside(topology, &plan.exclusive);
    let is_wanted = policy.wanted_knobs().contains(&Knob::CoreScheduling);
    if !is_wanted || beside.is_empty() || plan.isolation == Level::None {
        return None;
    }
    let who = format!("{} and this VM's", cpus_in_words(&beside));
    let wish = wish(topology, plan, policy.share.value);
    if wish == Wish::Nothing {
        let reason = format!(
            "others may run on {who} cores at the same time; with share = true the kernel would keep them apart"
        );
        return Some(Finding::degraded(RULE, reason));
    }
    if let Some(reason) = obstacle(wish, cookies, made) {
        let reason = format!("others may run on {who} cores at the same time: {reason}");
        return Some(Finding::impossible(RULE, reason));
    }
    let reason =
        format!("threads on {} run when the VM does not use that core", cpus_in_words(&beside));
    Some(Finding::met(RULE, reason))
}

/// Why the VM cannot have a cookie.
fn obstacle(
    wish: Wish,
    cookies: Result<&Cookies, &NoCookies>,
    made: &CookieMemory,
) -> Option<String> {
    let cookies = match cookies {
        Ok(cookies) => cookies,
        Err(reason) => return Some(reason.to_string()),
    };
    match step(wish, cookies, made) {
        CookieStep::LeaveAlone { thread, cookie } => Some(format!(
            "thread {} has cookie {cookie} of another program, which is kept",
            thread.tid
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::ids::{StartTicks, Tid};
    use crate::journal::{Memory, Record};
    use crate::knobs::core_scheduling::journal::CookieRecord;

    fn cookie(number: u64) -> Cookie {
        Cookie(NonZeroU64::new(number).expect("a number"))
    }

    fn cookies(list: &[Option<u64>]) -> Cookies {
        let key = |tid| ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        (1..).map(key).zip(list.iter().map(|one| one.map(cookie))).collect()
    }

    fn wanted() -> Wish {
        Wish::Cookie("5".parse().expect("a cpulist"))
    }

    #[test]
    fn all_threads_have_one_cookie_and_no_other_program_s_changes() {
        let none = Memory::default();
        let lines = [CookieRecord::Intended, CookieRecord::Made(cookie(7))].map(Record::Cookie);
        let made = Memory::of(&lines);
        let step = |wish, list: &[Option<u64>], memory: &Memory| {
            step(wish, &cookies(list), memory.cookie())
        };
        assert_eq!(step(wanted(), &[None, None], &none), CookieStep::Make);
        assert_eq!(step(wanted(), &[], &none), CookieStep::Nothing);
        assert!(matches!(step(wanted(), &[None, Some(3)], &none), CookieStep::LeaveAlone { .. }));
        assert_eq!(step(wanted(), &[Some(7), Some(7)], &made), CookieStep::Nothing);
        assert_eq!(step(wanted(), &[Some(7), None], &made), CookieStep::Make, "it missed it");
        assert_eq!(
            step(wanted(), &[None, None], &made),
            CookieStep::Make,
            "another program took it"
        );
        assert!(matches!(
            step(wanted(), &[Some(7), Some(3)], &made),
            CookieStep::LeaveAlone { .. }
        ));
        assert_eq!(step(Wish::Nothing, &[None, Some(3)], &made), CookieStep::Nothing);
        let CookieStep::Clear(threads) = step(Wish::Nothing, &[Some(3), Some(7)], &made) else {
            panic!("ours is to go");
        };
        assert_eq!(threads.iter().map(|thread| thread.tid.0).collect::<Vec<_>>(), [2]);
    }
}
