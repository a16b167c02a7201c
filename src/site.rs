//! Where a VM's threads are in the cgroup tree: its unit, and the threaded groups of its partition.

use std::collections::{BTreeMap, BTreeSet};

use crate::cpuset::CpuSet;
use crate::ids::{Tid, VmName};

/// What the partition file says when all is well.
pub const ISOLATED: &str = "isolated";

/// A threaded group in the VM's scope.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    /// vCPU threads, alone on their CPUs.
    Vcpus,
    /// Iothreads, and the workers they make.
    Iothreads,
    /// Everything else of QEMU's.
    Emulator,
}

impl Group {
    /// All of them, in the order in which they are filled.
    pub const ALL: [Group; 3] = [Group::Vcpus, Group::Iothreads, Group::Emulator];

    /// Its folder's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Group::Vcpus => "vcpus",
            Group::Iothreads => "iothreads",
            Group::Emulator => "emulator",
        }
    }

    /// Its path below a unit's cgroup.
    #[must_use]
    pub fn below(self, cgroup: &str) -> String {
        format!("{cgroup}/{}", self.name())
    }
}

/// A unit that is the VM's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Site {
    /// Its name, as `100.scope`.
    pub unit: String,
    /// Its cgroup below the root, as `qemu.slice/100.scope`.
    pub cgroup: String,
}

/// Another VM's partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Share {
    /// Whose.
    pub vm: VmName,
    /// The cgroup of its unit.
    pub cgroup: String,
    /// Its CPUs.
    pub cpus: CpuSet,
}

/// The cgroups from below the root down to this one: each must allow the partition.
#[must_use]
pub fn levels(cgroup: &str) -> Vec<&str> {
    let ends = cgroup.match_indices('/').map(|(at, _)| at).chain([cgroup.len()]);
    ends.map(|end| &cgroup[..end]).collect()
}

/// Where in the unit a thread is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Seat {
    /// In one of the groups.
    In(Group),
    /// In none of them, but in the unit's own cgroup: where it may run is up to its mask.
    Loose,
}

/// One group as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupSeen {
    /// Whether it has `cpuset.cpus`: the controller is there.
    pub has_cpuset: bool,
    /// `cpuset.cpus`.
    pub cpus: CpuSet,
    /// `cpuset.cpus.exclusive`.
    pub exclusive: CpuSet,
    /// `cpuset.cpus.partition`, with the reason where it is invalid.
    pub partition: String,
    /// The threads in it.
    pub threads: BTreeSet<Tid>,
}

/// The partition as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// The groups that are there.
    pub groups: BTreeMap<Group, GroupSeen>,
    /// Threads in no group, but in the unit's own cgroup.
    pub loose: BTreeSet<Tid>,
    /// `cpuset.cpus.exclusive` of each level, top down.
    pub levels: Vec<(String, CpuSet)>,
}

impl Seen {
    /// Where a thread is; `None` where it is somewhere else.
    #[must_use]
    pub fn seat(&self, tid: Tid) -> Option<Seat> {
        let in_group = self.groups.iter().find(|(_, seen)| seen.threads.contains(&tid));
        let loose = self.loose.contains(&tid).then_some(Seat::Loose);
        in_group.map(|(group, _)| Seat::In(*group)).or(loose)
    }
}
