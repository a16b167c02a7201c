//! The other VMs of the host, and what they have together.

use std::ops::Deref;

use crate::cpuset::CpuSet;
use crate::ids::VmName;

/// Another attached VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// Its name.
    pub vm: VmName,
    /// The CPUs that are its alone.
    pub exclusive: CpuSet,
    /// Where its emulator threads and iothreads may run.
    pub helpers: CpuSet,
    /// Where its lease cannot be read: which file, why, and what to do. `exclusive` is then all that it may have.
    pub doubt: Option<String>,
}

/// All other attached VMs. Their sums are kept, so that the next plan on a full host does not add them up again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Neighbours {
    all: Vec<Neighbour>,
    exclusive: CpuSet,
    helpers: CpuSet,
}

impl Neighbours {
    /// Adds one.
    pub fn push(&mut self, neighbour: Neighbour) {
        self.exclusive |= neighbour.exclusive;
        self.helpers |= neighbour.helpers;
        self.all.push(neighbour);
    }

    /// The CPUs that belong to any of them alone.
    #[must_use]
    pub fn exclusive(&self) -> CpuSet {
        self.exclusive
    }

    /// Where the helpers of any of them may run.
    #[must_use]
    pub fn helpers(&self) -> CpuSet {
        self.helpers
    }

    /// Their names.
    pub(super) fn names(&self) -> Vec<VmName> {
        self.all.iter().map(|other| other.vm.clone()).collect()
    }
}

impl Deref for Neighbours {
    type Target = [Neighbour];

    fn deref(&self) -> &[Neighbour] {
        &self.all
    }
}

impl FromIterator<Neighbour> for Neighbours {
    fn from_iter<I: IntoIterator<Item = Neighbour>>(all: I) -> Neighbours {
        let mut neighbours = Neighbours::default();
        all.into_iter().for_each(|neighbour| neighbours.push(neighbour));
        neighbours
    }
}
