//! What the knobs of one VM are handed: the machine, and which VM it is about.

use crate::cgroups::Cgroups;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::sched::Sched;
use crate::sysroot::SysRoot;
use crate::systemd::Units;
use crate::threads::ProcessKey;

/// The machine, by its four seams: each can be a fake. A supervisor hands it to its worker's thread.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// Files.
    pub root: &'a SysRoot,
    /// System calls about threads.
    pub sched: &'a (dyn Sched + Sync),
    /// The cgroup tree: all writes go through it. Its files are those below `root`, where some code only reads them.
    pub cgroups: &'a (dyn Cgroups + Sync),
    /// systemd.
    pub units: &'a (dyn Units + Sync),
}

/// One attached VM on its machine.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// The machine.
    pub host: Host<'a>,
    /// Where leases and journals are.
    pub state: &'a StateDir,
    /// Which VM.
    pub vm: &'a VmName,
    /// The boot that its journal is valid in.
    pub boot_id: &'a str,
    /// Its QEMU.
    pub process: ProcessKey,
}
