//! One reload of systemd for all VMs: a supervisor that needs one makes it for every VM that qmpin looks after.
//!
//! ```text
//!   .reload.lock ─▶ delegated meanwhile? ── yes ─▶ another VM's reload has served this one
//!                          │ no
//!                          └─▶ drop-ins of all VMs whose path unit is active, undo first ─▶ reload
//! ```
//!
//! systemd reads the drop-ins of a scope when that starts, without a reload, as long as it knows the folder; so a VM
//! that starts after such a reload needs none.

use crate::error::chain;
use crate::ids::VmName;
use crate::knobs::ground::Ground;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::memory::HostRecord;
use crate::knobs::host::places::{DROP_IN_THERE, Place, Value};
use crate::knobs::partition::apply::{Refused, delegate, is_delegated};
use crate::knobs::partition::drop_ins::drop_in;
use crate::services;
use crate::site::Site;
use crate::systemd::Units;

/// Has systemd delegate the unit, by a reload where that is needed. It may take long.
///
/// # Errors
/// What could not be done.
pub(crate) fn have_delegated(
    ground: Ground<'_>,
    units: &dyn Units,
    site: &Site,
) -> Result<(), Refused> {
    let refused = |reason: String| Refused::new(&site.unit, "Delegate=cpuset", reason);
    let _lock = ground.state.lock_reload().map_err(|error| refused(chain(&error)))?;
    if is_delegated(units, &site.unit).map_err(|error| refused(chain(&error)))? {
        return Ok(());
    }
    let others = others(ground, units);
    delegate(ground.host.root, units, &site.unit, &others)
}

/// The scopes of the other VMs that qmpin looks after, with the undo of their drop-ins durable.
fn others(ground: Ground<'_>, units: &dyn Units) -> Vec<String> {
    let names = units.listed("active", services::PATHS).unwrap_or_else(|error| {
        tracing::debug!("no other VM is served by this reload: {}", chain(&error));
        Vec::new()
    });
    let scopes: Vec<String> = names
        .iter()
        .filter_map(|name| name.strip_prefix("qmpin@")?.strip_suffix(".path"))
        .filter(|name| is_vmid(name) && *name != ground.vm.as_str())
        .map(|name| format!("{name}.scope"))
        .collect();
    match remember(ground, &scopes) {
        Ok(()) => scopes,
        Err(reason) => {
            tracing::debug!("no other VM is served by this reload: {reason}");
            Vec::new()
        }
    }
}

/// Only Proxmox has a scope of a known name.
fn is_vmid(name: &str) -> bool {
    name.parse::<VmName>().is_ok() && name.bytes().all(|byte| byte.is_ascii_digit())
}

/// Makes the undo of drop-ins durable that are not there yet: they are the host's, until their VM is attached.
fn remember(ground: Ground<'_>, scopes: &[String]) -> Result<(), String> {
    let root = ground.host.root;
    let is_new = |scope: &&String| root.read(&drop_in(scope)).is_err_and(|error| error.is_gone());
    let records: Vec<HostRecord> = scopes
        .iter()
        .filter(is_new)
        .map(|scope| HostRecord::Intent {
            place: Place::DropIn(drop_in(scope)),
            from: Value::Word(String::new()),
            to: Value::Word(DROP_IN_THERE.to_owned()),
        })
        .collect();
    if records.is_empty() {
        return Ok(());
    }
    let _lock = ground.state.lock_host().map_err(|error| chain(&error))?;
    let path = ground.state.host_journal_path();
    let mut journal = HostJournal::open(&path, ground.boot_id).map_err(|error| chain(&error))?;
    journal.append(records).map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_of_proxmox_have_a_scope() {
        assert!(is_vmid("100") && is_vmid("999999999"));
        for name in ["", "win", "1-2", "100.scope", "../100"] {
            assert!(!is_vmid(name), "{name}");
        }
    }
}
