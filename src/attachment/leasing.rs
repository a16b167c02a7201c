//! What VMs have to do with each other, and a qmpin with the one before it: leases and journals in the
//! state folder.

use crate::attachment::error::StartError;
use crate::cpuset::CpuSet;
use crate::discover;
use crate::error::chain;
use crate::ids::VmName;
use crate::journal::{Header, Journal, JournalError, Memory};
use crate::knobs::affinity::restore::{RestoreError, RestoreReport, restore};
use crate::knobs::ground::{Ground, Host};
use crate::knobs::host::keep::HostKnobs;
use crate::knobs::partition::keep::take_back::{free_cpus, hand_back_of, remembered, take_back};
use crate::knobs::partition::restore::PartitionRestore;
use crate::leases::{Lease, StateDir, StateError, SupervisorLock};
use crate::plan::{Neighbour, Neighbours};
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Opens the journal that an earlier qmpin has left of this very process, to go on with it. That of a process that is
/// gone is restored and forgotten, which may wait for systemd.
pub(crate) fn earlier_journal(ground: Ground<'_>) -> Result<Option<Journal>, StartError> {
    let Ground { host, state, vm, boot_id, process } = ground;
    let path = state.journal_path(vm);
    if !path.exists() {
        return Ok(None);
    }
    let (journal, header) = match Journal::resume(&path) {
        Err(JournalError::NeverBegun { .. }) => {
            state.forget(vm)?;
            return Ok(None);
        }
        resumed => resumed?,
    };
    if header.boot_id != boot_id {
        drop(journal);
        state.forget(vm)?;
        return Ok(None);
    }
    if header.process == process {
        return Ok(Some(journal));
    }
    match discover::lives(host.root, header.process) {
        Ok(false) => {
            take_over_from_dead(Ground { process: header.process, ..ground }, journal)?;
            Ok(None)
        }
        lives => {
            let (vm, pid) = (vm.clone(), header.process.pid);
            Err(StartError::NameTaken { vm, pid, source: lives.err() })
        }
    }
}

/// Takes back what a QEMU that is gone, that of `ground`, had above its unit, and forgets it once that is done. It may
/// wait for systemd.
fn take_over_from_dead(ground: Ground<'_>, journal: Journal) -> Result<(), StartError> {
    let Ground { state, vm, .. } = ground;
    let mut refused = take_back(ground, journal.memory()).refused;
    if let Some(unknown) = journal.memory().unknown() {
        return Err(StartError::UnknownUndo { vm: vm.clone(), unknown: unknown.clone() });
    }
    if let Some(last) = refused.pop() {
        for refused in refused {
            tracing::warn!("of the QEMU before: {refused}");
        }
        return Err(StartError::LeftOver { vm: vm.clone(), refused: last });
    }
    drop(journal);
    Ok(state.forget(vm)?)
}

pub(crate) fn new_journal(ground: Ground<'_>) -> Result<Journal, JournalError> {
    let header = Header {
        schema: crate::journal::SCHEMA.to_owned(),
        vm: ground.vm.clone(),
        boot_id: ground.boot_id.to_owned(),
        process: ground.process,
    };
    Journal::create(&ground.state.journal_path(ground.vm), &header)
}

/// The earlier lease of this very process. Its pins are held, so that a restarted qmpin changes nothing; and what a
/// newer qmpin wrote to it is kept, because an older one that goes on with it must not take that away from others.
pub(crate) fn earlier_lease(ground: Ground<'_>) -> Option<Lease> {
    let Ground { state, vm, boot_id, process, .. } = ground;
    match state.lease(vm) {
        Ok(lease) => lease.filter(|lease| lease.boot_id == boot_id && lease.qemu == process),
        Err(error) => {
            tracing::warn!("the earlier lease is of no use and is written anew: {}", chain(&error));
            None
        }
    }
}

/// The other name that the process is attached under. Two names would each take the other's masks for its own.
pub(crate) fn other_name(ground: Ground<'_>) -> Option<VmName> {
    let Ground { host, state, vm, boot_id, process } = ground;
    let mut leases = discover::live_leases(host.root, state, boot_id).into_iter();
    leases.find(|lease| lease.qemu == process && lease.vm != *vm).map(|lease| lease.vm)
}

/// The other VMs that hold CPUs.
#[must_use]
pub fn neighbours(ground: Ground<'_>) -> Neighbours {
    let Ground { host, state, vm, boot_id, .. } = ground;
    neighbours_of(host, state, vm, boot_id)
}

/// The same of a VM that need not run.
#[must_use]
pub fn neighbours_of(host: Host<'_>, state: &StateDir, vm: &VmName, boot_id: &str) -> Neighbours {
    let all = all_neighbours(host, state, boot_id).into_iter();
    all.filter(|neighbour| neighbour.vm != *vm).collect()
}

/// What others see of a VM by its lease.
#[must_use]
pub fn neighbour(lease: Lease) -> Neighbour {
    Neighbour {
        vm: lease.vm,
        exclusive: lease.exclusive,
        helpers: lease.emulator | lease.iothreads,
        doubt: None,
    }
}

/// Every VM that holds CPUs.
#[must_use]
pub fn all_neighbours(host: Host<'_>, state: &StateDir, boot_id: &str) -> Vec<Neighbour> {
    let (leases, doubts) = discover::live_leases_and_doubts(host.root, host.sched, state, boot_id);
    let leases = leases.into_iter().map(neighbour);
    let doubts = doubts.into_iter().map(|doubt| Neighbour {
        doubt: Some(doubt.to_string()),
        vm: doubt.vm,
        exclusive: doubt.cpus,
        helpers: CpuSet::EMPTY,
    });
    leases.chain(doubts).collect()
}

/// A dead VM whose CPUs are free again, and of which systemd has something yet.
pub(crate) struct Swept {
    vm: VmName,
    left: Option<(ProcessKey, Memory, PartitionRestore)>,
    _lock: SupervisorLock,
}

/// Frees the CPUs of dead VMs. A VM with a living supervisor is left to that. The rest of the work, which may
/// take long, is for [`forget_swept`].
pub(crate) fn sweep(ground: Ground<'_>) -> Vec<Swept> {
    let Ground { host, state, boot_id, .. } = ground;
    let others = state.vms().unwrap_or_default().into_iter().filter(|vm| vm != ground.vm);
    others.filter_map(|vm| sweep_vm(host, state, &vm, boot_id)).collect()
}

/// Whether the QEMU of a lease has ended. Not to be learnt is not dead.
fn is_dead(root: &SysRoot, lease: &Lease, boot_id: &str) -> bool {
    lease.boot_id != boot_id || discover::lives(root, lease.qemu).is_ok_and(|lives| !lives)
}

fn sweep_vm(host: Host<'_>, state: &StateDir, vm: &VmName, boot_id: &str) -> Option<Swept> {
    let is_to_sweep = || match state.lease(vm) {
        Ok(Some(lease)) => is_dead(host.root, &lease, boot_id),
        Ok(None) => false,
        // One that may live is named when the neighbours are read.
        Err(error) => {
            discover::doubt_of(host.root, host.sched, state, vm, &error, boot_id).is_none()
        }
    };
    if !is_to_sweep() {
        return None;
    }
    let lock = match state.lock_supervisor(vm) {
        Ok(lock) => lock?,
        Err(error) => {
            tracing::warn!(
                "VM {vm}: its QEMU has ended and the host is not restored: {}",
                chain(&error)
            );
            return None;
        }
    };
    // Another process may have swept it, and the VM may have been started and attached since.
    if !is_to_sweep() {
        return None;
    }
    let left = match remembered(state, vm, boot_id) {
        Ok(None) => None,
        Ok(Some((process, memory))) => {
            let ground = Ground { host, state, vm, boot_id, process };
            let restored = free_cpus(ground, &memory);
            Some((process, memory, restored))
        }
        Err(error) => {
            let reason = chain(&error);
            tracing::warn!("VM {vm}: its QEMU has ended and the host cannot be restored: {reason}");
            return None;
        }
    };
    Some(Swept { vm: vm.clone(), left, _lock: lock })
}

/// Gives back what systemd has of dead VMs, and forgets them.
pub(crate) fn forget_swept(host: Host<'_>, state: &StateDir, boot_id: &str, swept: Vec<Swept>) {
    for Swept { vm, left, _lock } in swept {
        let refused = left.and_then(|(process, memory, restored)| {
            let ground = Ground { host, state, vm: &vm, boot_id, process };
            let restored = hand_back_of(ground, &memory, restored);
            let refused = restored.refused.first().map(ToString::to_string);
            refused.or_else(|| memory.unknown().map(ToString::to_string))
        });
        let forgotten = refused.map_or(Ok(()), Err).and_then(|()| {
            let _host = state.lock_host().map_err(|error| chain(&error))?;
            state.forget(&vm).map_err(|error| chain(&error))
        });
        match forgotten {
            Ok(()) => tracing::info!("VM {vm}: its QEMU had ended; the host is restored"),
            Err(reason) => {
                tracing::warn!(
                    "VM {vm}: its QEMU has ended and not everything is restored: {reason}"
                );
            }
        }
    }
}

/// The lock of a VM that was followed, or has left something, and that has no supervisor any more. One that
/// was attached with `--once` is left as it was meant, for as long as its QEMU lives. The process that restores what
/// it has left holds the lock meanwhile: without it, another program may have attached the VM since.
///
/// # Errors
/// [`StateError`] where the lock cannot be used: then it is not known whether there is something to restore.
pub fn lock_forsaken(
    root: &SysRoot,
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
) -> Result<Option<SupervisorLock>, StateError> {
    let Some(lock) = state.lock_supervisor(vm)? else { return Ok(None) };
    let is_forsaken = match state.lease(vm) {
        Ok(Some(lease)) => lease.supervisor.is_some() || is_dead(root, &lease, boot_id),
        // A journal without a lease: a qmpin was killed in between.
        Ok(None) | Err(_) => true,
    };
    let is_forsaken = is_forsaken && discover::unlinked_holder(state, vm).is_none();
    Ok(is_forsaken.then_some(lock))
}

/// Restores a VM and forgets it. Nothing is forgotten that could not be restored.
///
/// # Errors
/// [`StartError`] where journal or lease cannot be used.
pub fn give_back(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
) -> Result<RestoreReport, StartError> {
    let mut knobs = HostKnobs::default();
    let others = knobs.memory(state, boot_id);
    let (partition, memory) = match remembered(state, vm, boot_id)? {
        Some((process, memory)) => {
            let ground = Ground { host, state, vm, boot_id, process };
            (take_back(ground, &memory), memory)
        }
        None => (PartitionRestore::default(), Memory::default()),
    };
    let again = || restore(host.root, host.sched, boot_id, &state.journal_path(vm), &others);
    let going = Going { host, state, vm, boot_id, memory: &memory };
    let mut report = let_go(going, &mut knobs, partition, &again)?;
    knobs.await_irqbalance(host, state, boot_id, &mut report.host);
    Ok(report)
}

/// A VM that has been restored, and what its journal remembers.
#[derive(Clone, Copy)]
pub(crate) struct Going<'a> {
    pub(crate) host: Host<'a>,
    pub(crate) state: &'a StateDir,
    pub(crate) vm: &'a VmName,
    pub(crate) boot_id: &'a str,
    pub(crate) memory: &'a Memory,
}

/// The last part of a restore: restores the VM's threads, forgets the VM, and brings the host in line without it.
/// Nothing is forgotten that could not be restored. `restore` restores the VM's threads. It is called twice where
/// systemd has limited units, because some kernels change the VM's masks as that goes.
pub(crate) fn let_go(
    going: Going<'_>,
    knobs: &mut HostKnobs,
    partition: PartitionRestore,
    restore: &dyn Fn() -> Result<RestoreReport, RestoreError>,
) -> Result<RestoreReport, StartError> {
    let Going { host, state, vm, boot_id, memory } = going;
    let mut report = {
        // No CPU is offline for a moment meanwhile, and no partition comes or goes before the VM's kernel threads
        // are the host's. The masks are restored in any case.
        let lock = state.lock_host();
        let report = RestoreReport { partition, ..restore()? };
        let lock = lock?;
        knobs.take_over(host.root, state, boot_id, memory, &lock)?;
        if memory.has_slices() {
            state.drop_lease(vm)?;
        } else if report.is_complete() {
            state.forget(vm)?;
        }
        report
    };
    let reconciled = knobs.reconcile(host, state, boot_id)?;
    report.host = reconciled.applied;
    report.host_left = reconciled.held_back;
    report.unknown.extend(reconciled.unknown);
    if memory.has_slices() {
        let _lock = state.lock_host()?;
        report.add(restore()?);
        if report.is_complete() {
            state.forget(vm)?;
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {

    use std::{fs, io};

    use super::*;
    use crate::ids::{Pid, StartTicks, Tid};
    use crate::leases::Lease;

    use crate::cgroups::CgroupTree;
    use crate::sched::Sched;
    use crate::systemd::SystemBus;

    const BOOT: &str = "this-boot";

    struct NoThreads;

    impl Sched for NoThreads {
        fn affinity(&self, _: Tid) -> io::Result<CpuSet> {
            Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
        }

        fn set_affinity(&self, _: Tid, _: &CpuSet) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
        }
    }

    /// What a VM of which only files are left has left, after it was swept and restored.
    fn left_of(journal: Option<&str>) -> (bool, bool) {
        let dir = tempfile::tempdir().expect("a folder");
        let root = SysRoot::at(dir.path());
        fs::create_dir(dir.path().join("proc")).expect("a folder");
        let state = StateDir::at(dir.path().join("qmpin"));
        state.create().expect("made");
        let vm: VmName = "101".parse().expect("a name");
        let lease = Lease {
            exclusive: "4-5".parse().expect("cpus"),
            ..Lease::new(
                vm.clone(),
                BOOT.to_owned(),
                ProcessKey { pid: Pid(1000), start: StartTicks(7) },
            )
        };
        state.write_lease(&lease).expect("written");
        if let Some(journal) = journal {
            fs::write(state.journal_path(&vm), journal).expect("written");
        }
        let cgroups = CgroupTree::of(&root);
        let host = Host { root: &root, sched: &NoThreads, cgroups: &cgroups, units: &SystemBus };
        let is_left = || state.lease(&vm).expect("a lease").is_some();
        let swept = sweep_vm(host, &state, &vm, BOOT);
        forget_swept(host, &state, BOOT, swept.into_iter().collect());
        let after_sweep = is_left();
        state.write_lease(&lease).expect("written");
        if let Some(journal) = journal {
            fs::write(state.journal_path(&vm), journal).expect("written");
        }
        let given = give_back(host, &state, &vm, BOOT);
        assert_eq!(given.is_err(), after_sweep, "{given:?}");
        (after_sweep, is_left())
    }

    #[test]
    fn unreadable_journal_is_kept() {
        let header = |boot: &str| {
            let process = "{\"pid\":1000,\"start\":7}";
            let schema = crate::journal::SCHEMA;
            format!(
                "{{\"schema\":\"{schema}\",\"vm\":\"101\",\"boot_id\":\"{boot}\",\"process\":{process}}}\n"
            )
        };
        for nothing in [None, Some(""), Some(&*header(BOOT)), Some(&*header("another"))] {
            assert_eq!(left_of(nothing), (false, false), "{nothing:?}");
        }
        for garbled in ["\n", "{}\n", "{\"schema\":\"qmpin.lease/1\"}\n", &header(BOOT)[9..]] {
            assert_eq!(left_of(Some(garbled)), (true, true), "{garbled}");
        }
    }
}
