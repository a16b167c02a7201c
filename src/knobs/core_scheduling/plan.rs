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

/// One change of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CookieStep {
    /// All threads of the VM get a new one.
    Make,
    /// This thread loses its own, which qmpin made.
    Clear(ThreadKey),
}

/// What leads to the wish. `memory` says which cookies qmpin made. Where a thread has one that is another program's,
/// the VM gets none.
#[must_use]
pub fn steps(wish: Wish, cookies: &Cookies, memory: &CookieMemory) -> Vec<CookieStep> {
    let mut all = cookies.values();
    let first = all.next().copied().flatten();
    let have_one = first.is_some() && all.all(|cookie| *cookie == first);
    match wish {
        Wish::Nothing => {
            let ours = with_cookie(cookies).filter(|(_, cookie)| memory.is_ours(*cookie));
            ours.map(|(thread, _)| CookieStep::Clear(thread)).collect()
        }
        Wish::Cookie(_) if cookies.is_empty() || have_one => Vec::new(),
        Wish::Cookie(_) if foreign(cookies, memory).is_some() => Vec::new(),
        Wish::Cookie(_) => vec![CookieStep::Make],
    }
}

/// A thread that has another program's cookie.
fn foreign(cookies: &Cookies, memory: &CookieMemory) -> Option<(ThreadKey, Cookie)> {
    with_cookie(cookies).find(|(_, cookie)| !memory.is_ours(*cookie))
}

fn with_cookie(cookies: &Cookies) -> impl Iterator<Item = (ThreadKey, Cookie)> {
    cookies.iter().filter_map(|(thread, cookie)| Some((*thread, (*cookie)?)))
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
    if let Some(reason) = obstacle(cookies, made) {
        let reason = format!("others may run on {who} cores at the same time: {reason}");
        return Some(Finding::impossible(RULE, reason));
    }
    let reason =
        format!("threads on {} run when the VM does not use that core", cpus_in_words(&beside));
    Some(Finding::met(RULE, reason))
}

/// Why the VM cannot have a cookie.
fn obstacle(cookies: Result<&Cookies, &NoCookies>, made: &CookieMemory) -> Option<String> {
    let cookies = match cookies {
        Ok(cookies) => cookies,
        Err(reason) => return Some(reason.to_string()),
    };
    let (thread, cookie) = foreign(cookies, made)?;
    let tid = thread.tid;
    Some(format!("thread {tid} has cookie {cookie} of another program, which is kept"))
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
        let steps = |wish, list: &[Option<u64>], memory: &Memory| {
            steps(wish, &cookies(list), memory.cookie())
        };
        let obstacle =
            |list: &[Option<u64>], memory: &Memory| obstacle(Ok(&cookies(list)), memory.cookie());
        assert_eq!(steps(wanted(), &[None, None], &none), [CookieStep::Make]);
        assert_eq!(steps(wanted(), &[], &none), []);
        assert_eq!(steps(wanted(), &[Some(7), Some(7)], &made), []);
        assert_eq!(steps(wanted(), &[Some(7), None], &made), [CookieStep::Make], "it missed it");
        let taken = steps(wanted(), &[None, None], &made);
        assert_eq!(taken, [CookieStep::Make], "another program took it");
        for (list, memory) in [([None, Some(3)], &none), ([Some(7), Some(3)], &made)] {
            assert_eq!(steps(wanted(), &list, memory), []);
            assert!(obstacle(&list, memory).is_some_and(|why| why.contains("cookie 3")));
        }
        assert_eq!(obstacle(&[Some(7), None], &made), None);
        assert_eq!(steps(Wish::Nothing, &[None, Some(3)], &made), []);
        let cleared = steps(Wish::Nothing, &[Some(3), Some(7)], &made);
        let [CookieStep::Clear(thread)] = cleared.as_slice() else { panic!("{cleared:?}") };
        assert_eq!(thread.tid.0, 2);
    }
}
