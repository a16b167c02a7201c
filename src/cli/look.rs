//! Asks a running VM, beside its supervisor.

use super::block_on;
use crate::discover::{Target, VmLocation, VmView, channel_paths, read_vm, way_beside_supervisor};
use crate::error::Failure;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::qmp::Limits;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;

/// The roles and threads of a VM, as they are on this host now.
///
/// # Errors
/// Why it cannot be asked.
pub(super) fn look(
    vm: &VmName,
    location: &VmLocation,
    limits: &Limits,
    state: &StateDir,
) -> Result<VmView, Failure> {
    let paths = channel_paths(vm, location);
    // A supervisor keeps the better ways for itself: one client at a time.
    let first = way_beside_supervisor(&SysRoot::live(), state, vm);
    let target = Target { vm, location, paths: &paths, first, limits };
    let (view, ()) =
        block_on(read_vm(&SysRoot::live(), &Kernel, target, |_| Ok::<_, Failure>(())))??;
    Ok(view)
}
