//! Asks a running VM, beside its supervisor.

use super::block_on;
use crate::discover::{Target, VmLocation, VmView, channel_paths, read_vm, way_beside_supervisor};
use crate::error::Failure;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::qmp::Limits;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;

/// Which VM is looked at, and how it is asked.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    pub(super) vm: &'a VmName,
    pub(super) location: &'a VmLocation,
    pub(super) limits: &'a Limits,
    pub(super) state: &'a StateDir,
}

impl Look<'_> {
    /// Its roles and threads, as they are on this host now. `meanwhile` is done while QEMU answers.
    ///
    /// # Errors
    /// Why it cannot be asked, and those of `meanwhile`.
    pub(super) fn at_it<T>(
        self,
        meanwhile: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<(VmView, T), Failure> {
        let Look { vm, location, limits, state } = self;
        let paths = channel_paths(vm, location);
        // A supervisor keeps the better ways for itself: one client at a time.
        let first = way_beside_supervisor(&SysRoot::live(), state, vm);
        let target = Target { vm, location, paths: &paths, first, limits };
        block_on(read_vm(&SysRoot::live(), &Kernel, target, |_| meanwhile()))?
    }
}
