//! A VM that was found and asked, before anything is done about it. Nothing here waits for a lock or for another
//! program but QEMU: `<vmid>.qmp` may be held meanwhile, and Proxmox waits for it.

use crate::attachment::error::StartError;
use crate::attachment::settings::{Settings, channel_paths};
use crate::discover::tasks::{Identified, Scan};
use crate::discover::{self, Target, VmView, read_topology_aside, read_vm};
use crate::knobs::ground::Host;
use crate::leases::{Heart, SupervisorLock};
use crate::qmp::{Channel, Roles};
use crate::threads::ProcessKey;
use crate::topology::Topology;

use crate::attachment::replan::this_process;

/// A VM that was found, whose supervisor this process is.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) process: ProcessKey,
    pub(crate) roles: Roles,
    pub(crate) identified: Identified,
    pub(crate) scan: Scan,
    pub(crate) boot_id: String,
    pub(crate) lock: SupervisorLock,
    pub(crate) topology: Topology,
}

impl Found {
    /// Returns what shows other processes that this supervisor makes progress.
    pub(crate) fn heart(&self) -> Heart {
        self.lock.heart()
    }

    /// Finds the VM, becomes its supervisor, and asks it. The host is read while QEMU answers.
    ///
    /// # Errors
    /// [`StartError`]; then nothing has been written to any thread.
    pub(crate) async fn find(
        host: Host<'_>,
        settings: &Settings,
    ) -> Result<(Found, Channel), StartError> {
        let (paths, first) = channel_paths(settings);
        let target = Target {
            vm: &settings.vm,
            location: &settings.location,
            paths: &paths,
            first,
            limits: &settings.limits,
        };
        let meanwhile = |_| -> Result<_, StartError> {
            let boot_id = discover::boot_id(host.root).map_err(StartError::BootId)?;
            settings.state.create()?;
            let mut lock = settings
                .state
                .lock_supervisor(&settings.vm)?
                .ok_or_else(|| StartError::already_attached(settings))?;
            if let Some(process) = this_process(host.root) {
                lock.sign(process);
            }
            Ok((boot_id, lock, read_topology_aside(host.root)))
        };
        let (view, (boot_id, lock, topology)) =
            read_vm(host.root, host.sched, target, meanwhile).await?;
        let topology = topology.await?;
        let VmView { process, channel, roles, identified, scan } = view;
        let found = Found { process, roles, identified, scan, boot_id, lock, topology };
        Ok((found, channel))
    }
}
