//! What the host has promised to others than VMs: CPUs that a plan never takes, or takes last and says from whom.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::devices::Device;
use crate::guest::Allowed;
use crate::ids::{NodeId, Tid};

/// CPUs that another program counts on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promise {
    /// Who: a cgroup with the file that says so, or a unit with a thread: "dp.service (tid 512)".
    pub what: String,
    /// Which CPUs.
    pub cpus: CpuSet,
    /// The thread, or the first of them, where it is a thread's.
    pub tid: Option<Tid>,
    /// How strong it is.
    pub strength: Strength,
}

/// How strong a promise is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Strength {
    /// The kernel keeps it: exclusive CPUs and partitions. An overlap is refused.
    Hard,
    /// It is broken without an error: the thread or the unit is moved to other CPUs.
    Soft,
}

/// Who loses CPUs to a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Displaced {
    /// As [`Promise::what`].
    pub what: String,
    /// The CPUs that it loses.
    pub cpus: CpuSet,
    /// As [`Promise::tid`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tid: Option<Tid>,
}

/// What the rest of the host leaves to a VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Surroundings {
    /// The CPUs that the VM's cgroup allows it; `None`: all of them.
    pub allowed: Option<Allowed>,
    /// What others count on.
    pub promises: Promises,
    /// How many bytes of the VM's memory lie on which node; empty where that is not known.
    pub memory_on: BTreeMap<NodeId, u64>,
    /// The CPUs that VMs which are enabled and not started yet would have.
    pub expected: CpuSet,
    /// The devices that the VM has for itself, or is to have.
    pub devices: Vec<Device>,
    /// The nodes with devices that are set aside for VMs.
    pub set_aside: BTreeSet<NodeId>,
}

/// All that the host has promised.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Promises {
    /// To whom, and what.
    pub made: Vec<Promise>,
    /// CPUs that were isolated on the kernel command line (`isolcpus=`, `nohz_full=`): set aside for work such as a
    /// vCPU's, and not balanced, so that threads that share a mask of several of them all stay on the first.
    pub isolated: CpuSet,
}

impl Promises {
    /// The CPUs that the kernel keeps from others.
    #[must_use]
    pub fn hard(&self) -> CpuSet {
        let hard = self.made.iter().filter(|promise| promise.strength == Strength::Hard);
        hard.fold(CpuSet::EMPTY, |all, promise| all | promise.cpus)
    }

    /// Adds who was displaced before by the VM that is planned: a thread that runs elsewhere by now does not show what
    /// it was promised.
    pub fn add_displaced(&mut self, displaced: impl Iterator<Item = Displaced>) {
        for Displaced { what, cpus, tid } in displaced {
            let is_known = |made: &Promise| made.what == what || (tid.is_some() && made.tid == tid);
            if !self.made.iter().any(is_known) {
                self.made.push(Promise { what, cpus, tid, strength: Strength::Soft });
            }
        }
    }

    /// The promises that can be broken.
    pub fn soft(&self) -> impl Iterator<Item = &Promise> {
        self.made.iter().filter(|promise| promise.strength == Strength::Soft)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_displaced_before_is_known_once() {
        let cpus = |list: &str| -> CpuSet { list.parse().expect("a cpulist") };
        let displaced = |what: &str, tid: Option<i32>| Displaced {
            what: what.to_owned(),
            cpus: cpus("14"),
            tid: tid.map(Tid),
        };
        let mut promises = Promises::default();
        let all = [displaced("dp.service (tid 512)", Some(512)), displaced("a.slice", None)];
        promises.add_displaced(all.clone().into_iter());
        promises.add_displaced(all.into_iter());
        // More threads of the unit have the mask by now, and it is still the same one.
        promises
            .add_displaced([displaced("dp.service (tid 512 and 1 more)", Some(512))].into_iter());
        let made: Vec<&str> = promises.made.iter().map(|made| made.what.as_str()).collect();
        assert_eq!(made, ["dp.service (tid 512)", "a.slice"]);
        assert_eq!(promises.soft().count(), 2);
    }
}
