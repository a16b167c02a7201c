//! A knob's turn in a pass over a VM: what was read before the first knob, and what a knob works with.

use crate::cpuset::CpuSet;
use crate::discover::Grips;
use crate::knobs::abilities::Abilities;
use crate::knobs::bench::Bench;
use crate::knobs::ground::Ground;
use crate::plan::Plan;
use crate::policy::VmPolicy;
use crate::threads::Thread;
use crate::topology::Topology;

/// What a pass has read, before the first knob has its turn.
pub struct Snapshot {
    /// The threads of the process.
    pub threads: Vec<Thread>,
    /// What proves that a thread is still the one that was listed.
    pub grips: Grips,
    /// Kernel threads that work for the VM.
    pub outside: Vec<Thread>,
    /// The host's online CPUs.
    pub online: CpuSet,
    /// What the kernel can do for the VM's threads beside placing them.
    pub abilities: Abilities,
}

/// What a knob has in its turn.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// The VM on its machine.
    pub ground: Ground<'a>,
    /// What steps on threads are carried out with.
    pub bench: Bench<'a>,
    /// The machine's CPUs.
    pub topology: &'a Topology,
    /// The plan in force.
    pub plan: &'a Plan,
    /// The policy in force.
    pub policy: &'a VmPolicy,
    /// What was read.
    pub snapshot: &'a Snapshot,
}
