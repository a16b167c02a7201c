//! `detach` by hand of a VM that a service looks after: stops the service and marks the VM, so that it stays detached
//! until it is started anew or attached by hand.
//!
//! A service that ends without being asked to is started again by systemd, and so is one whose process another program
//! ends. systemd is therefore asked to stop it. The mark serves `qmpin status`, and starts that systemd makes by itself
//! (`qmpin may-start`).

use std::io;

use super::args::Global;
use crate::discover::{is_alive, proxmox_process};
use crate::error::{Failure, Kind, chain};
use crate::ids::VmName;
use crate::leases::{Lease, StateDir};
use crate::marks::{Detached, Waiting, read_mark, sweep_marks, write_mark};
use crate::services::{self, Service, has_systemd, service_name};
use crate::sysroot::SysRoot;
use crate::systemd::SystemdError;
use crate::threads::ProcessKey;

/// Keeps services from attaching VMs again.
pub(super) struct Keeper<'a> {
    pub(super) global: &'a Global,
    pub(super) root: &'a SysRoot,
    pub(super) state: &'a StateDir,
    pub(super) boot_id: &'a str,
    /// Whether systemd is worth asking: it has answered so far.
    asks: bool,
}

/// What was found of a VM's service.
enum Found {
    /// This service looks after it.
    Service(Service),
    /// No service that can be stopped does. One may attach it again: it is started when the VM is, or has the VM's
    /// supervisor and systemd does not answer.
    Watched,
    /// No service has to do with it.
    No,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(
        global: &'a Global,
        root: &'a SysRoot,
        state: &'a StateDir,
        boot_id: &'a str,
    ) -> Keeper<'a> {
        sweep_marks(state, boot_id, &|process| is_alive(root, process));
        Keeper { global, root, state, boot_id, asks: has_systemd(root) }
    }

    /// Stops the service that looks after a VM, and marks the VM. Returns the name of the service; `None`: no service
    /// looks after it, or systemd does not answer.
    ///
    /// # Errors
    /// A failure of permission where the mark cannot be written for want of it.
    pub(super) fn keep_detached(&mut self, vm: &VmName) -> Result<Option<String>, Failure> {
        match self.find(vm) {
            Found::No => Ok(None),
            Found::Watched => self.mark(vm).map(|()| None),
            Found::Service(service) => {
                // First, so that no start that systemd makes meanwhile goes by without it.
                self.mark(vm)?;
                match services::stop(&service.name) {
                    Ok(()) => Ok(Some(service.name)),
                    Err(error) => {
                        self.could_not(vm, &error);
                        Ok(None)
                    }
                }
            }
        }
    }

    /// The VMs that a service looks after.
    pub(super) fn vms(&mut self) -> Vec<VmName> {
        if !self.asks || !self.is_of_the_package() {
            return Vec::new();
        }
        services::vms_with_a_service().unwrap_or_else(|error| {
            tracing::warn!("VMs without files of qmpin are not detached: {}", chain(&error));
            self.asks = false;
            Vec::new()
        })
    }

    fn find(&mut self, vm: &VmName) -> Found {
        let holder = self.holder(vm);
        if !self.asks {
            return holder.map_or(Found::No, |holder| self.by_cgroup(holder));
        }
        let asked = match holder {
            Some(holder) => services::service_of(holder.pid)
                .map(|found| found.filter(|service| service.main == Some(holder.pid))),
            // It may be about to be started again.
            None if self.is_of_the_package() => services::service(&service_name(vm))
                .map(|found| found.filter(|service| service.activity == services::Activity::Busy)),
            None => Ok(None),
        };
        let asked = match asked {
            Ok(None) if self.is_of_the_package() => {
                services::is_watched(vm).map(|is| if is { Found::Watched } else { Found::No })
            }
            asked => asked.map(|found| found.map_or(Found::No, Found::Service)),
        };
        asked.unwrap_or_else(|error| {
            self.could_not(vm, &error);
            holder.map_or(Found::No, |holder| self.by_cgroup(holder))
        })
    }

    /// Without systemd's answer: whether the supervisor's cgroup is that of a service.
    fn by_cgroup(&self, holder: ProcessKey) -> Found {
        let cgroup = self.root.read_lossy(&format!("proc/{}/cgroup", holder.pid));
        let is_service = |line: &str| line.trim_end().ends_with(".service");
        match cgroup {
            Ok(text) if text.lines().any(is_service) => Found::Watched,
            _ => Found::No,
        }
    }

    /// The process that follows the VM, or waits to.
    fn holder(&self, vm: &VmName) -> Option<ProcessKey> {
        let leased = self.lease(vm).and_then(|lease| lease.supervisor);
        let waiting = self.waiting(vm).map(|mark| mark.supervisor);
        let mut all = self.state.supervisor(vm).into_iter().chain(leased).chain(waiting);
        all.find(|process| is_alive(self.root, *process))
    }

    /// The QEMU process that is detached.
    fn qemu(&self, vm: &VmName) -> Option<ProcessKey> {
        let leased = self.lease(vm).map(|lease| lease.qemu);
        let waiting = || self.waiting(vm).map(|mark| mark.qemu);
        let found = || proxmox_process(self.root, &self.global.proxmox_dir, vm).ok();
        leased.or_else(waiting).or_else(found).filter(|qemu| is_alive(self.root, *qemu))
    }

    /// The VM's lease, where it is of this boot.
    fn lease(&self, vm: &VmName) -> Option<Lease> {
        let lease = self.state.lease(vm).ok().flatten();
        lease.filter(|lease| lease.boot_id == self.boot_id)
    }

    /// What the VM's service waits for, where it has waited since this boot.
    fn waiting(&self, vm: &VmName) -> Option<Waiting> {
        read_mark(self.state, vm).filter(|mark: &Waiting| mark.boot_id == self.boot_id)
    }

    fn mark(&self, vm: &VmName) -> Result<(), Failure> {
        let Some(qemu) = self.qemu(vm) else { return Ok(()) };
        let mark = Detached::now(vm, self.boot_id, qemu);
        match write_mark(self.state, &mark) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let path = self.state.path().display();
                let message = format!("VM {vm}: not permitted to write in {path}");
                Err(Failure::new(Kind::Permission, message).hint("run it as root"))
            }
            Err(error) => {
                // The service is stopped all the same.
                tracing::warn!("VM {vm}: could not be marked as detached by hand: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn could_not(&mut self, vm: &VmName, error: &SystemdError) {
        self.asks = false;
        tracing::warn!(
            "VM {vm}: its service could not be stopped, its supervisor is ended instead: {}",
            chain(error)
        );
    }

    /// Whether the state folder is the one that the package's services use.
    fn is_of_the_package(&self) -> bool {
        self.global.state_dir.is_none() && self.root.is_live()
    }
}
