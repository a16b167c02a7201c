//! What would do, where a VM cannot have what its policy wants: the first of these that can be had.
//!
//! ```text
//!   CPUs by hand left to the planner, one key at a time, then all ─▶ threads of cores, any cores, any cache ─▶ shared CPUs ─▶ all of it
//! ```

use super::{Nearest, Request, advice, plan_strictly};
use crate::cpuset::CpuSet;
use crate::policy::{CacheNeed, CoreNeed, CpuChoice, Policy, Sharing, Smt};

type Change = (&'static str, fn(&mut Policy));

const BY_HAND: [Change; 5] = [
    ("vcpus = \"auto\"", |policy| policy.vm.vcpus.value = CpuChoice::Auto),
    ("no [vcpu.N]", |policy| policy.vm.vcpu_cpus.clear()),
    ("no [iothread.N]", |policy| policy.vm.iothread_cpus.clear()),
    ("iothreads = \"auto\"", |policy| policy.vm.iothreads.value.cpus = CpuChoice::Auto),
    ("emulator = \"auto\"", |policy| policy.vm.emulator.value = CpuChoice::Auto),
];
const NEEDS: [Change; 3] = [
    ("smt = \"prefer\"", |policy| {
        if policy.vm.smt.value == Smt::Isolate {
            policy.vm.smt.value = Smt::Prefer;
        }
    }),
    ("cores = \"any\"", |policy| policy.vm.cores.value = CoreNeed::Any),
    ("cache = \"any\"", |policy| policy.vm.cache.value = CacheNeed::Any),
];
const SHARED: Change = ("--share", |policy| policy.vm.share.value = Sharing::Wrap);

/// The nearest plan that would do, and what it takes.
pub(super) fn nearest(request: &Request<'_>) -> Option<Box<Nearest>> {
    let one = |change: Change| vec![change];
    let some = |changes: &[Change]| changes.to_vec();
    let attempts = BY_HAND
        .map(one)
        .into_iter()
        .chain([some(&BY_HAND)])
        .chain(NEEDS.map(one))
        .chain([some(&NEEDS), one(SHARED), [&BY_HAND[..], &NEEDS, &[SHARED]].concat()]);
    attempts.into_iter().find_map(|changes| {
        let mut policy = request.policy.clone();
        let mut takes = Vec::new();
        for (words, change) in changes {
            let before = policy.clone();
            change(&mut policy);
            if policy != before {
                takes.push(words);
            }
        }
        if takes.is_empty() {
            return None;
        }
        let request = Request { policy: &policy, ..*request };
        let mut plan = plan_strictly(&request, &CpuSet::EMPTY).ok()?;
        advice::advise(&mut plan, &request);
        Some(Box::new(Nearest { takes: takes.join(" and "), plan }))
    })
}
