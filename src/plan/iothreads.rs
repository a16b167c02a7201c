//! The knob *iothreads*: which of the helpers' CPUs each iothread has.
//!
//! ```text
//!   [iothread.io0] cpu = "2"    those, by hand
//!   iothreads = "each"          one each, of another core than the iothread before while there are any
//!   iothreads = "pool"          all of them
//! ```

use super::report::Finding;
use super::{PlannedIothread, Request};
use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::policy::Spread;
use crate::wording::{counted, cpus_in_words};

/// Deals the CPUs that iothreads have.
pub(super) fn planned(request: &Request<'_>, pool: &CpuSet) -> Vec<PlannedIothread> {
    let vm = &request.policy.vm;
    let turns = match vm.iothreads.value.spread {
        Spread::Pool => Vec::new(),
        Spread::Each => {
            let by_hand = taken_by_hand(request);
            let rest = if pool.is_subset(&by_hand) { *pool } else { *pool - by_hand };
            in_turn(request, &rest)
        }
    };
    let mut dealt = turns.into_iter().cycle();
    let iothreads = request.guest.iothreads.iter().map(|iothread| {
        let own = vm.iothread_cpus.get(iothread).map(|own| own.value);
        let cpus = own.unwrap_or_else(|| dealt.next().map_or(*pool, CpuSet::single));
        PlannedIothread { iothread: iothread.clone(), cpus }
    });
    iothreads.collect()
}

/// What iothreads have by hand.
pub(super) fn taken_by_hand(request: &Request<'_>) -> CpuSet {
    let by_hand = request.policy.vm.iothread_cpus.values();
    by_hand.fold(CpuSet::EMPTY, |all, own| all | own.value)
}

/// The first thread of each core, then the second ones.
fn in_turn(request: &Request<'_>, cpus: &CpuSet) -> Vec<CpuId> {
    let cores = request.machine.topology.cores.iter().map(|core| core.cpus & *cpus);
    let threads = cores.flat_map(|core| core.iter().enumerate().collect::<Vec<_>>());
    let mut turns: Vec<(usize, CpuId)> = threads.collect();
    turns.sort_by_key(|(thread, _)| *thread);
    turns.into_iter().map(|(_, cpu)| cpu).collect()
}

/// How far each has a CPU of its own, where that is asked for.
pub(super) fn finding(request: &Request<'_>, planned: &[PlannedIothread]) -> Option<Finding> {
    let choice = &request.policy.vm.iothreads;
    if choice.value.spread == Spread::Pool || planned.is_empty() {
        return None;
    }
    let users = |cpus: &CpuSet| planned.iter().filter(|one| one.cpus.intersects(cpus)).count();
    let all = planned.iter().fold(CpuSet::EMPTY, |all, one| all | one.cpus);
    let (number, cpus) = (counted(planned.len(), "iothread"), cpus_in_words(&all));
    Some(if planned.iter().all(|one| users(&one.cpus) == 1) {
        Finding::met("iothreads", format!("{number}, each alone on one of {cpus}"))
    } else {
        Finding::degraded("iothreads", format!("{number} share {cpus} ({})", choice.origin))
    })
}
