//! `qmpin status`: which VMs are attached, what they have, and what is not as it should be.

use super::args::{Global, StatusArgs};
use super::host_look::HostLook;
use super::{Answer, output};
use crate::discover::{all_leases, boot_id, is_alive, lives};
use crate::error::{Failure, Kind};
use crate::journal::{self, Memory};
use crate::leases::Lease;
use crate::render::{StatusDocument, VmState, VmStatus};
use crate::standing::read_standing;

pub(super) fn run(global: &Global, args: &StatusArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let state = global.state(&root);
    let boot_id = boot_id(&root).map_err(|error| Failure::from_error(Kind::No, error))?;
    let mut leases = all_leases(&state);
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
            let memory = memory.map(|content| Memory::of(&content.records)).unwrap_or_default();
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
        output::text(&document.to_text())?;
    }
    Ok(Answer::Done)
}
