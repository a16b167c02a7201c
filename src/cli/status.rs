//! `qmpin status`: which VMs are attached, what they have, and what is not as it should be.

use super::args::{Global, StatusArgs};
use super::host_look::HostLook;
use super::{Answer, output};
use crate::discover::{all_leases, boot_id, is_alive, lives};
use crate::error::{Failure, Kind, chain};
use crate::ids::VmName;
use crate::journal::{self, HostJournal};
use crate::leases::{Lease, StateDir};
use crate::render::{StatusDocument, VmState, VmStatus};
use crate::standing::read_standing;
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &StatusArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let state = global.state(&root);
    let boot_id = boot_id(&root).map_err(|error| Failure::from_error(Kind::No, error))?;
    let mut leases = all_leases(&state);
    let left = if leases.is_empty() { left_behind(&root, &state, &boot_id) } else { String::new() };
    if let Some(vm) = &args.vm {
        leases.retain(|lease| lease.vm == *vm);
        if leases.is_empty() {
            let failure = Failure::new(Kind::No, format!("VM {vm} is not attached"));
            return Err(failure.hint(format!("`qmpin attach {vm}` attaches it")));
        }
    }
    let vm_state = |lease: &Lease| {
        // Not to be learnt is not dead.
        let is_dead =
            lease.boot_id != boot_id || lives(&root, lease.qemu).is_ok_and(|lives| !lives);
        match lease.supervisor {
            _ if is_dead => VmState::Dead,
            Some(supervisor) if is_alive(&root, supervisor) => VmState::Followed,
            _ => VmState::Left,
        }
    };
    let status = |lease: Lease| {
        let vm_state = vm_state(&lease);
        let standing = read_standing(&state, &lease.vm);
        let mut status =
            VmStatus { state: vm_state, standing, partition: None, checks: Vec::new(), lease };
        // Of one that has gone nothing holds any more, and nothing should.
        if vm_state != VmState::Dead {
            let lease = &status.lease;
            let memory = journal::read(&state.journal_path(&lease.vm));
            let memory = memory.map(|content| content.memory).unwrap_or_default();
            match HostLook::at(&root, &state, &boot_id, lease, &memory) {
                Ok(look) => {
                    status.checks = look.checks(lease);
                    status.partition = look.partition;
                }
                // What the leases say is worth telling by itself.
                Err(failure) => {
                    tracing::warn!("VM {}: the host is not looked at: {failure}", lease.vm);
                }
            }
        }
        status
    };
    let document = StatusDocument::new(leases.into_iter().map(status));
    if args.json {
        output::json(&document)?;
    } else {
        output::text(&(document.to_text() + &left))?;
    }
    Ok(Answer::Done)
}

/// What is not as before although no VM is attached, and what to do about it; empty where there is nothing.
fn left_behind(root: &SysRoot, state: &StateDir, boot_id: &str) -> String {
    let mut left = String::new();
    let is_left = |vm: &VmName| {
        // One who is at it has his lease in a moment, or has just dropped it.
        let is_tended = state.supervisor(vm).is_some_and(|process| is_alive(root, process));
        !is_tended
            && journal::read(&state.journal_path(vm))
                .is_ok_and(|content| content.header.boot_id == boot_id)
    };
    for vm in state.vms().unwrap_or_default().iter().filter(|vm| is_left(vm)) {
        left += &format!("VM {vm} was attached, and not all of it is back\n");
    }
    let path = state.host_journal_path();
    match HostJournal::read(&path, boot_id) {
        Ok(memory) => {
            for (place, value) in memory.originals() {
                left += &format!("{place} was {value} before, and is not put back yet\n");
            }
        }
        Err(error) => {
            left += &format!("what of the host is not back is not known: {}\n", chain(&error));
        }
    }
    if !left.is_empty() {
        left += "`qmpin detach --all` puts back what can be put back now\n";
    }
    left
}
