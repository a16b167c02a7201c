//! `qmpin status`: which VMs are attached, what they have, and what is not as it should be.

use super::args::{Global, StatusArgs};
use super::host_look::host_facts;
use super::{Answer, output};
use crate::check::verify::host_checks;
use crate::discover::{all_leases, boot_id, doubts, is_alive, lives};
use crate::error::{Failure, Kind, chain};
use crate::ids::VmName;
use crate::journal;
use crate::knobs::host::irqbalance::read::Silent;
use crate::knobs::host::journal::HostJournal;
use crate::leases::{Lease, StateDir};
use crate::marks::{Detached, Waiting, all_marks};
use crate::render::{StatusDocument, VmState, VmStatus};
use crate::sched::Kernel;
use crate::standing::read_standing;
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &StatusArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let state = global.state(&root);
    let boot_id = boot_id(&root)?;
    let mut leases = all_leases(&state);
    let left = if leases.is_empty() { left_behind(&root, &state, &boot_id) } else { String::new() };
    let (mut detached, mut waiting) = marks(&root, &state, &boot_id, &leases);
    let mut doubts = doubts(&root, &Kernel, &state, &boot_id);
    if let Some(vm) = &args.vm {
        leases.retain(|lease| lease.vm == *vm);
        detached.retain(|mark| mark.vm == *vm);
        waiting.retain(|mark| mark.vm == *vm);
        doubts.retain(|doubt| doubt.vm == *vm);
        if [leases.len(), detached.len(), waiting.len(), doubts.len()] == [0; 4] {
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
    let mut silent = Silent::new();
    let status = |lease: Lease| {
        let vm_state = vm_state(&lease);
        let standing = read_standing(&state, &lease.vm);
        let mut status =
            VmStatus { state: vm_state, standing, partition: None, checks: Vec::new(), lease };
        // Of one that has gone nothing holds any more, and nothing should.
        if vm_state != VmState::Dead {
            let lease = &status.lease;
            let memory = journal::memory(&state.journal_path(&lease.vm));
            match host_facts(&root, &state, &boot_id, lease, &memory, &mut silent) {
                Ok(facts) => {
                    status.checks = host_checks(&facts);
                    status.partition = facts.partition;
                }
                // What the leases say is worth telling by itself.
                Err(failure) => {
                    tracing::warn!("VM {}: the host is not checked: {failure}", lease.vm);
                }
            }
        }
        status
    };
    // Of one VM the answer is no, where it is not attached.
    let answer = if args.vm.is_some() && leases.is_empty() { Answer::No } else { Answer::Done };
    let document = StatusDocument::new(leases.into_iter().map(status))
        .with_marks(detached, waiting)
        .with_doubts(doubts);
    output::answer(args.json, &document, |document| document.to_text() + &left)?;
    Ok(answer)
}

/// The marks that hold: of VMs that are not attached, whose QEMU lives, and whose service waits indeed.
fn marks(
    root: &SysRoot,
    state: &StateDir,
    boot_id: &str,
    leases: &[Lease],
) -> (Vec<Detached>, Vec<Waiting>) {
    let is_open = |vm: &VmName, of_boot: &str, qemu| {
        of_boot == boot_id && is_alive(root, qemu) && !leases.iter().any(|lease| lease.vm == *vm)
    };
    let mut detached: Vec<Detached> = all_marks(state);
    detached.retain(|mark| is_open(&mark.vm, &mark.boot_id, mark.qemu));
    let mut waiting: Vec<Waiting> = all_marks(state);
    waiting.retain(|mark| {
        is_open(&mark.vm, &mark.boot_id, mark.qemu) && is_alive(root, mark.supervisor)
    });
    (detached, waiting)
}

/// What is not as before although no VM is attached, and what to do about it; empty where there is nothing.
fn left_behind(root: &SysRoot, state: &StateDir, boot_id: &str) -> String {
    let mut left = String::new();
    let is_left = |vm: &VmName| {
        // A process that is attaching has its lease in a moment, or has just dropped it.
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
                left += &format!("{place} was {value} before, and is not restored yet\n");
            }
            if let Some(unknown) = memory.unknown() {
                left += &format!("{unknown}\n");
            }
        }
        Err(error) => {
            left += &format!("what of the host is not back is not known: {}\n", chain(&error));
        }
    }
    if !left.is_empty() {
        left += "`qmpin detach --all` restores what can be restored now\n";
    }
    left
}
