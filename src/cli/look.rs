//! Asks a running VM, beside its supervisor.

use super::block_on;
use crate::discover::{Target, VmLocation, VmView, channel_paths, read_vm, way_beside_supervisor};
use crate::error::Failure;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::qmp::Limits;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;

/// The roles and threads of a VM, as they are on this host now. `meanwhile` is done while QEMU answers.
///
/// # Errors
/// Why it cannot be asked, and those of `meanwhile`.
pub(super) fn look<T>(
    vm: &VmName,
    location: &VmLocation,
    limits: &Limits,
    state: &StateDir,
    meanwhile: impl FnOnce() -> Result<T, Failure>,
) -> Result<(VmView, T), Failure> {
    let paths = channel_paths(vm, location);
    // A supervisor keeps the better ways for itself: one client at a time.
    let first = way_beside_supervisor(&SysRoot::live(), state, vm);
    let target = Target { vm, location, paths: &paths, first, limits };
    block_on(read_vm(&SysRoot::live(), &Kernel, target, |_| meanwhile()))?
}
