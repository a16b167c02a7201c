//! One attached VM: what is known of it, and the walk *discover → plan → apply*. `start` walks it for
//! the first time, `pass` again and again, `finish` restores.
//!
//! The order is what keeps the host safe: lock, discover, plan, lease, journal, and only then the first
//! write. Everything that can refuse, refuses before that.

pub mod adopt;
pub mod around;
pub mod aside;
pub mod before;
pub mod end;
pub mod error;
pub mod files;
pub mod found;
mod known;
pub mod leasing;
pub mod originals;
pub mod outside;
pub mod replan;
pub mod reports;
pub mod restored;
pub mod settings;
pub(crate) mod signalling;

use std::cell::Cell;

use known::Known;

use std::collections::BTreeMap;

use crate::attachment::error::{PassError, Seen, StartError};
pub(crate) use crate::attachment::found::Found;
use crate::attachment::leasing::{
    Going, Swept, earlier_journal, earlier_lease, forget_swept, let_go, neighbours, new_journal,
    other_name, sweep,
};
use crate::attachment::reports::{Learnt, Noticed, PassReport};
use crate::attachment::restored::restore_lines;
use crate::attachment::settings::Settings;
use crate::cpuset::CpuSet;
use crate::discover;
use crate::discover::tasks::{Identified, Scan, TasksError};
use crate::discover::{read_topology, tasks};
use crate::error::chain;
use crate::guest::Guest;
use crate::ids::Tid;
use crate::journal::{Journal, JournalError};
use crate::knobs::abilities::Abilities;
use crate::knobs::affinity::keep::Affinity;
use crate::knobs::affinity::limit::Limit;
use crate::knobs::affinity::restore::{RestoreReport, restore_process};
use crate::knobs::affinity::thread_cpus::ThreadCpus;
use crate::knobs::bench::Bench;
use crate::knobs::findings::{Facts, findings};
use crate::knobs::ground::Host;
use crate::knobs::host::keep::HostKnobs;
use crate::knobs::host::report::HostReport;
use crate::knobs::partition::keep::{Partition, take_back};
use crate::knobs::reonline::cycle::{Brought, ReonlineReport, bring_back};
use crate::knobs::turn::{Snapshot, Turn};
use crate::knobs::vm::VmKnobs;
use crate::leases::{FileState, Kept, SupervisorLock};
use crate::marks::unix_now_s;
use crate::plan::{Finding, Lasts, Neighbours, Plan, PlanError, Stay};
use crate::qmp::{Channel, Roles};
use crate::threads::{ProcessKey, Role, Thread, ThreadKey};
use crate::topology::Topology;

/// An attached VM.
pub struct Attachment<'a> {
    known: Known<'a>,
    topology: Topology,
    online: CpuSet,
    guest: Guest,
    identified: Identified,
    /// Kernel threads of the VM outside its process, as they were when they were found.
    outside: Vec<Thread>,
    plan: Plan,
    /// The other VMs that the plan was made beside.
    beside: Neighbours,
    /// Whether there should be a new plan, and how much staying is worth then.
    stale: Option<Stay>,
    journal: Journal,
    knobs: VmKnobs,
    /// What the kernel said in the last pass of priority and of cookies.
    abilities: Abilities,
    host_knobs: HostKnobs,
    /// The lease could not be written, and does not say what there is.
    lease_due: bool,
    /// What was done about the host before the first pin.
    early_host: Option<HostReport>,
    /// Where this process itself runs; none: wherever it was started.
    own_cpus: CpuSet,
    drift_total: u64,
    since_unix_s: u64,
    /// What a newer qmpin wrote to the lease.
    kept: Kept,
    /// The lease's file as it was written.
    leased: Cell<FileState>,
    // Dropped last: until then no other process may become this VM's supervisor.
    lock: SupervisorLock,
}

/// A VM that has its lease, and nothing else yet.
struct Leased<'a> {
    attachment: Attachment<'a>,
    scan: Scan,
    /// Whether no earlier qmpin has attached this process.
    is_new: bool,
    swept: Vec<Swept>,
}

impl<'a> Attachment<'a> {
    /// Attaches: everything up to the first write, and the first writes.
    ///
    /// # Errors
    /// [`StartError`]; then nothing has been written to any thread.
    pub async fn start(
        host: Host<'a>,
        settings: Settings,
    ) -> Result<(Attachment<'a>, Channel, PassReport), StartError> {
        let (found, channel) = Found::find(host, &settings).await?;
        let (attachment, report) = Attachment::begin(host, settings, found)?;
        Ok((attachment, channel, report))
    }

    /// Attaches a VM that was found. It may block for long: for locks, and for systemd where an earlier QEMU has
    /// left something.
    ///
    /// # Errors
    /// As [`Attachment::start`].
    pub(crate) fn begin(
        host: Host<'a>,
        settings: Settings,
        found: Found,
    ) -> Result<(Attachment<'a>, PassReport), StartError> {
        let state = settings.state.clone();
        let leased = Attachment::lease(host, settings, found);
        // Only now: the host's lock was held.
        let Leased { mut attachment, scan, is_new, swept } =
            leased.inspect_err(|_| state.tidy())?;
        let (scan, reonline) =
            if is_new { attachment.reonline(scan) } else { (scan, ReonlineReport::default()) };
        let mended = attachment.mend(scan).map(|report| PassReport { reonline, ..report });
        forget_swept(host, &state, &attachment.known.boot_id, swept);
        match mended {
            Ok(mut report) => {
                if let Some(error) = report.not_permitted(&attachment.known.settings.vm) {
                    return Err(attachment.give_up(error));
                }
                attachment.find_outside();
                Ok((attachment, report))
            }
            Err(error) => {
                // The undo could not be written any further: what was written before goes back.
                Err(attachment.give_up(error.into()))
            }
        }
    }

    /// Plans, begins the journal, and writes the lease. Everything that can refuse has refused by then.
    fn lease(host: Host<'a>, settings: Settings, found: Found) -> Result<Leased<'a>, StartError> {
        let Found { process, roles, identified, scan, boot_id, mut lock, mut topology } = found;
        let known = Known { host, settings, boot_id, process };
        let (ground, settings) = (known.ground(), &known.settings);
        let Settings { state, vm, .. } = settings;
        let guest = discover::guest(&roles);
        // Before anything is planned: the VM may have had these CPUs.
        match bring_back(host, state, ground.boot_id) {
            Ok(Brought::Nothing) => {}
            Ok(Brought::Some) => topology = read_topology(host.root)?,
            Err(error) => tracing::warn!("CPUs that were left offline: {}", chain(&error)),
        }
        let resumed = earlier_journal(ground)?;
        // It is asked again under the lock; most are refused here, before anything is written.
        if let Some(other) = other_name(ground) {
            return Err(StartError::OtherName { vm: vm.clone(), process, other });
        }
        // Another supervisor of this process has claimed it, also where the files of the VM were removed meanwhile. One
        // of qmpin 0.1.0 claims nothing, and is known by what it has pinned.
        let folder = host.root.path(&format!("proc/{}", process.pid)).ok();
        let is_claimed = folder.is_some_and(|folder| lock.claim(&folder).unwrap_or(false));
        if (!is_claimed || scan.is_confined(&topology.online()))
            && let Some(supervisor) = discover::unlinked_holder(state, vm)
        {
            let (vm, pid) = (vm.clone(), Some(supervisor.pid));
            return Err(StartError::AlreadyAttached { vm, pid });
        }
        let (held, kept): (BTreeMap<_, _>, _) = earlier_lease(ground)
            .map(|lease| (lease.vcpus.into_iter().collect(), lease.kept))
            .unwrap_or_default();
        let swept = sweep(ground);
        let mut limit = Limit::beside_promises(ground);
        let is_new = resumed.is_none();
        let host_lock = state.lock_host()?;
        // Without the leases' lock: a VM that does not fit is refused before there is a journal.
        let beside = neighbours(ground);
        limit.read(ground, &topology.online());
        if held.is_empty() {
            let around = limit.surroundings();
            let expected = settings.expected(&topology, &guest, &beside, around);
            limit.expect(expected);
        }
        let around = limit.surroundings();
        let plan = settings.plan(&topology, &guest, &beside, around, &held, Stay::Always);
        let plan = plan.map_err(|reason| no_room(process, &roles, &guest, reason))?;
        let journal = match resumed {
            Some(journal) => journal,
            None => new_journal(ground)?,
        };
        let mut attachment = Attachment {
            known,
            online: topology.online(),
            topology,
            guest,
            identified,
            outside: Vec::new(),
            plan,
            beside,
            stale: None,
            knobs: VmKnobs {
                partition: Partition::resumed(&journal),
                affinity: Affinity::within(limit),
                ..VmKnobs::default()
            },
            abilities: Abilities::default(),
            journal,
            host_knobs: HostKnobs::default(),
            lease_due: false,
            early_host: None,
            own_cpus: CpuSet::EMPTY,
            drift_total: 0,
            since_unix_s: unix_now_s(),
            kept,
            leased: Cell::default(),
            lock,
        };
        let taken_down = attachment.take_down(&host_lock);
        if let Err(error) = taken_down.and_then(|()| attachment.lease_first(&host_lock, &held)) {
            // Nothing was written to any thread in this run; an earlier one's undo stays.
            let Settings { state, vm, .. } = &attachment.known.settings;
            let error = StartError::before_the_first_write(vm.clone(), error);
            let forgotten = if is_new { state.forget(vm) } else { Ok(()) };
            return Err(match forgotten {
                Ok(()) => error,
                Err(left) => {
                    StartError::NotUndone { left: vec![chain(&left)], source: Box::new(error) }
                }
            });
        }
        Ok(Leased { attachment, scan, is_new, swept })
    }

    /// The plan in force.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What there is to say about the plan in force, as of the last pass.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        findings(&Facts {
            topology: &self.topology,
            plan: &self.plan,
            policy: &self.known.settings.policy.vm,
            partition: self.knobs.partition.finding(),
            throttling: self.abilities.throttling,
            cookies: &self.abilities.cookies,
            made: self.journal.memory().cookie(),
            // It was done before the first pin, or was not; the report of that pass says which.
            reonline: None,
        })
    }

    /// What was attached, and how.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.known.settings
    }

    /// Where its threads are after the last pass.
    #[must_use]
    pub fn placed(&self) -> ThreadCpus {
        self.knobs.affinity.placed()
    }

    /// How many times a thread was found moved externally.
    #[must_use]
    pub fn drift_total(&self) -> u64 {
        self.drift_total
    }

    /// Takes QEMU's answer. `before` are the threads that were listed before it was asked.
    ///
    /// # Errors
    /// [`TasksError`] where the answer does not agree with the process.
    pub fn learn(&mut self, before: &[Tid], roles: Roles) -> Result<Learnt, TasksError> {
        let scan = self.scan()?;
        let Known { host, process, .. } = self.known;
        let roles = discover::in_our_numbers(host.root, process.pid, roles)?;
        let identified = tasks::identify(process, before, &roles, &scan)?;
        let only_in = |these: &Identified, those: &Identified| -> Vec<(ThreadKey, Role)> {
            let named = these.named().filter(|(key, role)| those.role(*key) != Some(*role));
            named.map(|(key, role)| (key, role.clone())).collect()
        };
        let learnt = Learnt {
            joined: only_in(&identified, &self.identified),
            left: only_in(&self.identified, &identified),
        };
        self.identified = identified;
        let guest = discover::guest(&roles);
        if guest != self.guest {
            self.guest = guest;
            self.knobs.affinity.limit.expire();
            self.stale.get_or_insert(Stay::Always);
        }
        self.find_outside();
        Ok(learnt)
    }

    /// Reads the VM again and corrects what is not as planned.
    ///
    /// # Errors
    /// [`PassError`]. That there is no new plan is none: the plan in force stays in force.
    pub fn pass(&mut self) -> Result<PassReport, PassError> {
        self.keep_files()?;
        self.notice_cpu_hotplug()?;
        self.notice_limit();
        self.notice_neighbours();
        if self.stale.is_some() {
            self.knobs.affinity.limit.renew(self.known.ground());
        }
        let plan_failed = self.stale.and_then(|stay| self.replan(stay).err());
        let scan = self.scan()?;
        Ok(PassReport { plan_failed, ..self.mend(scan)? })
    }

    /// Puts everything back and lets go.
    ///
    /// # Errors
    /// [`StartError`] where journal or lease cannot be used; what could not be restored is in the
    /// report.
    pub fn finish(self) -> Result<RestoreReport, StartError> {
        let partition = take_back(self.known.ground(), self.journal.memory());
        let Attachment { known, journal, mut host_knobs, lock, .. } = self;
        let Known { host, settings, boot_id, process } = known;
        let Settings { state, vm, .. } = &settings;
        // From what is in mind, and not from the file: the folder may have been removed.
        let memory = journal.memory();
        let others = host_knobs.memory(state, &boot_id);
        let restore = || restore_process(host.root, host.sched, process, memory, &others);
        let mut report = if state.path().exists() || host_knobs.knows_something() {
            state.create()?;
            let going = Going { host, state, vm, boot_id: &boot_id, memory };
            let_go(going, &mut host_knobs, partition, &restore)?
        } else {
            RestoreReport { partition, ..restore()? }
        };
        drop(lock);
        host_knobs.await_irqbalance(host, state, &boot_id, &mut report.host);
        // A lock that was taken since the supervisor's was dropped.
        state.tidy();
        Ok(report)
    }

    /// Restores everything because it could not be attached. Returns why, and what could not be restored.
    fn give_up(self, error: StartError) -> StartError {
        let vm = self.known.settings.vm.clone();
        let left = match self.finish() {
            Ok(report) if report.is_complete() => return error,
            Ok(report) => restore_lines(&vm, &report),
            Err(undo) => vec![chain(&undo)],
        };
        StartError::NotUndone { left, source: Box::new(error) }
    }

    /// Leaves everything applied, and the VM without a supervisor.
    pub fn leave(self) {
        drop(self.lock);
    }

    fn scan(&self) -> Result<Scan, TasksError> {
        tasks::scan(self.known.host.root, self.known.host.sched, self.known.process.pid, None)
    }

    /// Compares a scan with the plan and carries out the difference.
    fn mend(&mut self, mut scan: Scan) -> Result<PassReport, JournalError> {
        let grips = scan.take_grips();
        let observed = tasks::observe(self.known.process, scan, &self.identified);
        let baseline = self.first_baseline(&observed.threads);
        let role = |key: ThreadKey| {
            let at =
                observed.threads.binary_search_by_key(&key.tid, |thread| thread.key.tid).ok()?;
            Some(&observed.threads[at].role)
        };
        let noticed = Noticed {
            // Workers come and go by the dozen under I/O and are never vCPUs or iothreads; everything else that QMP has
            // not been asked about may be.
            unnamed: observed.unidentified.iter().any(|key| role(*key) == Some(&Role::Emulator)),
            named_gone: self.identified.named().any(|(key, _)| role(key).is_none()),
        };
        let Known { host: Host { root, sched, .. }, settings, process, .. } = &self.known;
        let policy = &settings.policy.vm;
        let memory = self.journal.memory();
        let snapshot = Snapshot {
            abilities: Abilities::read(root, *sched, policy, memory, &observed.threads),
            threads: observed.threads,
            grips,
            outside: self.outside.clone(),
            online: self.online,
        };
        let turn = Turn {
            ground: self.known.ground(),
            bench: Bench { root, sched: *sched, grips: &snapshot.grips, process: *process },
            topology: &self.topology,
            plan: &self.plan,
            policy,
            snapshot: &snapshot,
        };
        let knobs = self.knobs.converge(&turn, &mut self.journal, baseline)?;
        self.abilities = snapshot.abilities;
        self.drift_total += knobs.drifted();
        Ok(PassReport { noticed, knobs, ..PassReport::default() })
    }
}

/// Why there is no plan; where the host has no room, with what is known of the VM.
fn no_room(process: ProcessKey, roles: &Roles, guest: &Guest, reason: PlanError) -> StartError {
    if matches!(reason, PlanError::Policy { lasts: Lasts::ForGood, .. }) {
        return reason.into();
    }
    let vcpus = roles.vcpus.iter().map(|vcpu| vcpu.tid).collect();
    StartError::NoRoom { seen: Box::new(Seen { process, guest: guest.clone(), vcpus }), reason }
}
