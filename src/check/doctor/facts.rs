//! What the checks are given: the host, and one VM with its plan.

use std::fmt;

use crate::discover::{HugeShare, ProxmoxConfig};
use crate::guest::Guest;
use crate::ids::{Pid, VmName};
use crate::knobs::host::places::Irqbalance;
use crate::plan::Plan;
use crate::scheduling::Throttling;
use crate::sysroot::SysRoot;
use crate::topology::Topology;

/// How QEMU is asked, as far as that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// Over a socket that is qmpin's alone.
    Alone,
    /// By visits of `<vmid>.qmp`.
    Visits,
}

/// What is known of the host.
#[derive(Debug)]
pub struct HostFacts<'a> {
    /// Where the kernel's settings are read from.
    pub root: &'a SysRoot,
    /// The machine.
    pub topology: &'a Topology,
    /// Whether a partition is to be had; why not.
    pub partition: Result<(), String>,
    /// Every irqbalance that runs.
    pub irqbalances: &'a [Irqbalance],
    /// Whether the kernel keeps some time for its own threads.
    pub throttling: Throttling,
}

/// Plans other guests of the same VM, as they would be at its next start. The error is why there is no plan.
pub type Planner<'a> = dyn Fn(&Guest) -> Result<Plan, String> + 'a;

/// What is known of a VM.
pub struct VmFacts<'a> {
    /// Which.
    pub vm: &'a VmName,
    /// Its QEMU process.
    pub process: Pid,
    /// What it has.
    pub guest: Guest,
    /// How it is asked; `None`: it is not Proxmox's, and no other program needs its socket.
    pub asked: Option<Asked>,
    /// Its configuration, or why that cannot be read; `None`: it is not Proxmox's.
    pub config: Option<Result<ProxmoxConfig, String>>,
    /// Its plan as it runs, or why there is none.
    pub plan: Result<Plan, String>,
    /// What would be planned for another guest.
    pub plans: &'a Planner<'a>,
    /// How much of its memory is backed by transparent huge pages.
    pub huge: Option<HugeShare>,
}

impl VmFacts<'_> {
    /// Its configuration, where it is Proxmox's and could be read.
    pub(super) fn read_config(&self) -> Option<&ProxmoxConfig> {
        self.config.as_ref()?.as_ref().ok()
    }
}

impl fmt::Debug for VmFacts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmFacts")
            .field("vm", &self.vm)
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

/// Whether the kernel reports which NUMA nodes there are.
pub(super) fn knows_nodes(topology: &Topology) -> bool {
    topology.unknown.iter().all(|unknown| unknown.what != "the NUMA nodes")
}
