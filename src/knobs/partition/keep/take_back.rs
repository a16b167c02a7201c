//! The end of a partition: its groups first, under the leases' lock, then what systemd has of it.

use std::io;

use crate::ids::VmName;
use crate::journal::{JournalError, Memory};
use crate::knobs::ground::{Ground, Host};
use crate::knobs::partition::restore::{PartitionRestore, hand_back, let_systemd_prune, take_down};
use crate::leases::{StateDir, StateError};
use crate::threads::ProcessKey;
use crate::{discover, journal};

/// Takes back the partition that is remembered, before any mask is restored. It may wait for systemd.
pub(crate) fn take_back(ground: Ground<'_>, memory: &Memory) -> PartitionRestore {
    let restored = free_cpus(ground, memory);
    hand_back_of(ground, memory, restored)
}

/// The part of [`take_back`] that frees the CPUs: afterwards another VM can have them. What systemd has of the
/// partition is left for [`hand_back_of`], which may take long.
pub(crate) fn free_cpus(ground: Ground<'_>, memory: &Memory) -> PartitionRestore {
    if memory.partition().is_none() {
        return PartitionRestore::default();
    }
    // Before the lock: no other process has to wait for systemd.
    let_prune(ground, memory);
    // The folder may have been removed: then there are no leases either.
    let lock = ground.state.lock_leases().map_err(|error: StateError| {
        tracing::debug!("{}", crate::error::chain(&error));
    });
    let restored = take_down_of(ground, memory);
    drop(lock);
    restored
}

fn let_prune(ground: Ground<'_>, memory: &Memory) {
    if let Some(undo) = memory.partition()
        && !discover::is_alive(ground.host.root, ground.process)
    {
        let_systemd_prune(ground.host.cgroups, undo);
    }
}

fn take_down_of(ground: Ground<'_>, memory: &Memory) -> PartitionRestore {
    let Some(undo) = memory.partition() else { return PartitionRestore::default() };
    let refused = take_down(ground.host.cgroups, undo, &ground.shares());
    PartitionRestore { taken_back: Some(undo.cgroup.clone()), refused, foreign: Vec::new() }
}

/// Gives back to systemd what it has of the partition. It may take long.
pub(crate) fn hand_back_of(
    ground: Ground<'_>,
    memory: &Memory,
    mut restored: PartitionRestore,
) -> PartitionRestore {
    if let Some(undo) = memory.partition() {
        let Host { root, units, .. } = ground.host;
        let handed = hand_back(root, units, undo);
        restored.refused.extend(handed.refused);
        restored.foreign.extend(handed.foreign);
    }
    restored
}

/// What a VM's journal of this boot remembers; nothing where there is none, or nothing in it yet.
///
/// # Errors
/// [`JournalError`] where it cannot be configured: then there may be something to undo.
pub(crate) fn remembered(
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
) -> Result<Option<(ProcessKey, Memory)>, JournalError> {
    let content = match journal::read(&state.journal_path(vm)) {
        Ok(content) => content,
        Err(JournalError::NeverBegun { .. }) => return Ok(None),
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let header = content.header;
    let is_of_this_boot = header.boot_id == boot_id;
    Ok(is_of_this_boot.then_some((header.process, content.memory)))
}
