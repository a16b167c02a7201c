//! The VM's partition: made once the threads are pinned, kept in every pass, removed at the end.
//!
//! ```text
//!   claim ─▶ lease says so ─▶ prepare ─▶ converge in every pass ─▶ take_back
//!     │                          │           │
//!     └── no unit of its own … ──┴───────────┴── refused: the next fallback, and why       choice.rs
//! ```

pub mod choice;
pub mod reload;
pub mod take_back;

use std::collections::{BTreeMap, BTreeSet};

use crate::cpuset::CpuSet;
use crate::discover;
use crate::discover::{Grips, cgroup};
use crate::ids::{Pid, VmName};
use crate::journal::{Journal, JournalError, PartitionUndo, Record};
use crate::knobs::bench::Bench;
use crate::knobs::execute::{carry_out, carry_out_in_turn};
use crate::knobs::ground::{Ground, Host};
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::places::{Place, Value};
use crate::knobs::partition::apply::{PartitionBench, Refused, UnitNeeds, refusals};
use crate::knobs::partition::keep::choice::{Fallback, obstacle_of};
pub(crate) use crate::knobs::partition::keep::take_back::take_back;
use crate::knobs::partition::plan::steps::{PartitionStep, placing, resizing};
use crate::knobs::partition::plan::{RULE, Separation, Target, choose, in_words, lower, target};
use crate::knobs::turn::Turn;
use crate::leases::{Lease, StateDir};
use crate::locks::LeasesLock;
use crate::plan::{Finding, Plan};
use crate::policy::Knob;
use crate::site::{Group, Share, Site};
use crate::standing::read_standing;
use crate::threads::{ProcessKey, ThreadKey};

impl Ground<'_> {
    /// The CPUs of all other VMs, and those that their partitions still hold.
    pub(crate) fn others_cpus(&self) -> CpuSet {
        let leases = discover::live_leases(self.host.root, self.state, self.boot_id).into_iter();
        let others = leases.filter(|lease| lease.vm != *self.vm);
        let held = self.shares().into_iter().map(|share| share.cpus);
        others.map(|lease| lease.exclusive).chain(held).fold(CpuSet::EMPTY, |all, cpus| all | cpus)
    }

    /// What is qmpin's own on this host, with this VM.
    pub(crate) fn known(&self) -> discover::Known {
        let leases = discover::live_leases(self.host.root, self.state, self.boot_id);
        known(self.state, self.boot_id, &leases, &[self.process.pid])
    }

    /// What units and other cgroups were limited to before qmpin limited them.
    fn unit_limits(&self) -> BTreeMap<String, CpuSet> {
        unit_limits(self.state, self.boot_id)
    }

    /// The other VMs' partitions: what their leases say, and what the kernel still has of them.
    fn shares(&self) -> Vec<Share> {
        shares(self.host, self.state, self.vm, self.boot_id)
    }
}

/// What is qmpin's own on this host: attached VMs, and QEMUs that are about to be.
pub(crate) fn known(
    state: &StateDir,
    boot_id: &str,
    leases: &[Lease],
    also: &[Pid],
) -> discover::Known {
    let of_leases = leases.iter().map(|lease| lease.qemu.pid);
    let qemus: Vec<Pid> = of_leases.chain(also.iter().copied()).collect();
    let supervisors = leases.iter().filter_map(|lease| lease.supervisor);
    let itself = i32::try_from(std::process::id()).ok().map(Pid);
    let supervisors = supervisors.map(|supervisor| supervisor.pid).chain(itself);
    let processes = qemus.iter().copied().chain(supervisors).collect();
    discover::Known { processes, qemus, limits: unit_limits(state, boot_id) }
}

fn unit_limits(state: &StateDir, boot_id: &str) -> BTreeMap<String, CpuSet> {
    let memory = HostJournal::read(&state.host_journal_path(), boot_id).unwrap_or_default();
    let limit = |(place, value): (&Place, &Value)| {
        Some((place.limited_cgroup()?.to_owned(), value.cpus()?))
    };
    memory.originals().filter_map(limit).collect()
}

/// The VM's partition, as far as there is one.
#[derive(Debug, Default)]
pub(crate) struct Partition {
    site: Option<Site>,
    /// The cgroup beside which systemd is to exclude others from the VM's CPUs, in the next fallback.
    slices: Option<String>,
    needs: Option<UnitNeeds>,
    /// Threads that the kernel would not move, and what it said: they are not tried in every pass.
    stuck: BTreeMap<ThreadKey, Refused>,
    /// What was logged already.
    said: BTreeSet<Refused>,
    /// Writes that were refused since the choice was made: it is to be made again.
    refused: Vec<Refused>,
    /// What of an earlier partition could not be undone.
    unrestored: Vec<Refused>,
    /// The fallback in force, and when the choice is made again.
    fallback: Option<Fallback>,
    /// What it was given last, and has.
    target: Option<Target>,
    /// How many times it was found changed, since that was asked last.
    drifted: u64,
    has_reported_drift: bool,
}

impl Partition {
    /// The one an earlier qmpin has made for this very process, or none.
    pub(crate) fn resumed(journal: &Journal) -> Partition {
        let undo = journal.memory().partition();
        let site = undo.map(|undo| Site { unit: undo.unit.clone(), cgroup: undo.cgroup.clone() });
        Partition { site, ..Partition::default() }
    }

    /// Where it is.
    pub(crate) fn site(&self) -> Option<Site> {
        self.site.clone()
    }

    /// Goes back to the one it had before [`Partition::claim`], of which nothing is written but the undo.
    pub(crate) fn disclaim(&mut self, earlier: Option<Site>) {
        self.site = earlier;
        self.needs = None;
    }

    /// Where it is, for the lease.
    pub(crate) fn cgroup(&self) -> Option<String> {
        self.site.as_ref().map(|site| site.cgroup.clone())
    }

    /// The cgroup beside which others are excluded, for the lease.
    pub(crate) fn slices(&self) -> Option<String> {
        self.slices.clone()
    }

    /// Puts threads into their groups and gives the partition the plan's CPUs, where that is not so.
    /// What was refused.
    pub(crate) fn converge(
        &mut self,
        turn: &Turn<'_>,
        journal: &mut Journal,
    ) -> Result<Vec<Refused>, JournalError> {
        let Turn { ground, bench, plan, snapshot, .. } = *turn;
        let Some(site) = self.site.clone() else { return Ok(self.fell()) };
        let cgroups = ground.host.cgroups;
        let shares = ground.shares();
        let target = match target(plan, &shares) {
            Ok(target) => target,
            Err(reason) => {
                let refused = vec![Refused::new(&site.cgroup, "a partition", reason)];
                // A neighbour that has yet to make room does so in a moment.
                if !shares.iter().any(|share| share.cpus.intersects(&plan.exclusive)) {
                    self.refused.clone_from(&refused);
                }
                return Ok(self.say(refused));
            }
        };
        let ever = remember(journal, &target)?;
        // Without its cgroup the VM has ended, which is reported elsewhere.
        let Ok(seen) = cgroup::partition_seen(cgroups, &site) else { return Ok(Vec::new()) };
        let mut steps = placing(plan, &target, &seen, &snapshot.threads);
        let mut held = Vec::new();
        steps.retain(|step| match step {
            PartitionStep::Move { thread, .. } => match self.stuck.get(&thread.key) {
                Some(refused) => {
                    held.push(refused.clone());
                    false
                }
                None => true,
            },
            _ => true,
        });
        // Threads are created in other groups than those they belong to; all else was as planned, and is an external
        // change.
        let mut is_changed = steps.iter().any(|step| !matches!(step, PartitionStep::Move { .. }));
        let is_kept = steps.is_empty();
        let mut written = steps.len();
        let mut tools = PartitionBench { threads: bench, cgroups, site: &site };
        let mut refused = refusals(carry_out(&mut tools, steps));
        written -= refused.len();
        let of_thread = |refused: &Refused| Some((refused.thread?, refused.clone()));
        self.stuck.extend(refused.iter().filter_map(of_thread));
        let mut fatal: Vec<Refused> =
            refused.iter().filter(|refused| refused.thread.is_none()).cloned().collect();
        let seen = if is_kept { Ok(seen) } else { cgroup::partition_seen(cgroups, &site) };
        let Ok(seen) = seen else { return Ok(Vec::new()) };
        let resizing = resizing(&site, &target, ever, &shares, &seen);
        is_changed |= resizing.contains(&PartitionStep::Isolate);
        if !resizing.is_empty() && fatal.is_empty() {
            match ground.state.lock_leases() {
                Ok(lock) => {
                    let (more, said) = self.resize_locked(ground, bench, plan, ever, &lock);
                    written += more;
                    fatal.extend(said.iter().cloned());
                    refused.extend(said);
                }
                Err(error) => {
                    refused.push(Refused::new(
                        &site.cgroup,
                        "a partition",
                        crate::error::chain(&error),
                    ));
                }
            }
        }
        if is_changed && refused.is_empty() && self.target == Some(target) {
            self.drift(&site);
        }
        if refused.is_empty() && self.target != Some(target) {
            if written > 0 {
                tracing::info!("{}", in_words(written, &site, &target));
            }
            self.target = Some(target);
        }
        if cgroup::partition_seen(cgroups, &site).is_err() {
            return Ok(Vec::new());
        }
        // What makes a partition is refused: the next choice names the cause.
        refused.retain(|refused| !fatal.contains(refused));
        self.refused = fatal;
        refused.extend(held);
        let mut said = self.say(refused);
        said.extend(self.refused.iter().cloned());
        Ok(said)
    }

    /// Another program has changed what it has; that is corrected in every pass, and reported once.
    fn drift(&mut self, site: &Site) {
        self.drifted += 1;
        if !std::mem::replace(&mut self.has_reported_drift, true) {
            tracing::warn!("the partition in {} was changed externally: made again", site.cgroup);
        }
    }

    /// How many times it was found changed since the last call.
    pub(crate) fn take_drifted(&mut self) -> u64 {
        std::mem::take(&mut self.drifted)
    }

    /// Gives the partition the CPUs of a new plan while no other process may change leases: what others see
    /// as free is free.
    pub(crate) fn resize(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
        lock: &LeasesLock,
    ) -> Result<(), JournalError> {
        if self.site.is_none() || self.target.is_none() {
            return Ok(());
        }
        if let Ok(target) = target(plan, &ground.shares()) {
            let ever = remember(journal, &target)?;
            let Host { root, sched, .. } = ground.host;
            let grips = Grips::default();
            let bench = Bench { root, sched, grips: &grips, process: ground.process };
            // What was refused is tried again by the pass that follows, which reports it.
            let _ = self.resize_locked(ground, bench, plan, ever, lock);
        }
        Ok(())
    }

    fn resize_locked(
        &self,
        ground: Ground<'_>,
        bench: Bench<'_>,
        plan: &Plan,
        ever: CpuSet,
        _lock: &LeasesLock,
    ) -> (usize, Vec<Refused>) {
        let Some(site) = &self.site else { return (0, Vec::new()) };
        let cgroups = ground.host.cgroups;
        let shares = ground.shares();
        let refuse = |reason: String| (0, vec![Refused::new(&site.cgroup, "a partition", reason)]);
        match (target(plan, &shares), cgroup::partition_seen(cgroups, site)) {
            (Ok(target), Ok(seen)) => {
                let steps = resizing(site, &target, ever, &shares, &seen);
                let mut tools = PartitionBench { threads: bench, cgroups, site };
                let applied = carry_out_in_turn(&mut tools, steps);
                let tried = applied.len();
                let refused = refusals(applied);
                (tried - refused.len(), refused)
            }
            (Err(reason), _) => refuse(reason),
            (_, Err(error)) => refuse(error.to_string()),
        }
    }

    /// Logs what was not logged before.
    fn say(&mut self, refused: Vec<Refused>) -> Vec<Refused> {
        for one in &refused {
            if self.said.insert(one.clone()) {
                tracing::warn!("{}: {one}", RULE);
            }
        }
        refused
    }
}

fn shares(host: Host<'_>, state: &StateDir, vm: &VmName, boot_id: &str) -> Vec<Share> {
    let cgroups = host.cgroups;
    let others = discover::live_leases(host.root, state, boot_id)
        .into_iter()
        .filter(|lease| lease.vm != *vm);
    others
        .filter_map(|lease| {
            let cgroup = lease.partition?;
            let vcpus = Group::Vcpus.below(&cgroup);
            let held = cgroup::set(cgroups, &vcpus, "cpuset.cpus.exclusive");
            Some(Share { vm: lease.vm, cgroup, cpus: lease.exclusive | held })
        })
        .collect()
}

/// Makes durable which CPUs the partition may have from now on; all that it ever had.
fn remember(journal: &mut Journal, target: &Target) -> Result<CpuSet, JournalError> {
    let Some(known) = journal.memory().partition() else { return Ok(target.cpus) };
    let all = known.cpus | target.cpus;
    if all != known.cpus {
        let undo = PartitionUndo { cpus: target.cpus, ..known.clone() };
        journal.append(vec![Record::Partition(undo)])?;
    }
    Ok(all)
}

fn as_strs(found: &Result<String, String>) -> Result<&str, &str> {
    found.as_ref().map(String::as_str).map_err(String::as_str)
}

/// The finding of the partition or fallback that a VM would have. An attached one has its supervisor's: nothing is
/// asked of systemd, and what was refused is not seen by reading.
#[must_use]
pub fn would_be(
    host: Host<'_>,
    state: &StateDir,
    process: ProcessKey,
    plan: &Plan,
    boot_id: &str,
) -> Finding {
    let cgroups = host.cgroups;
    let site = cgroup::partition_site(host.root, cgroups, process.pid);
    let ground = Ground { host, state, vm: &plan.vm, boot_id, process };
    let shares = ground.shares();
    let beside = cgroup::slices_site(host.root, cgroups, process.pid);
    let chosen = choose(plan, site.as_ref().map_err(String::as_str), as_strs(&beside), &shares);
    let (Separation::Partition(target), Ok(site)) = (&chosen.0, &site) else { return chosen.1 };
    let lease = state.lease_of(&plan.vm, boot_id, process);
    let attached = lease.filter(|lease| lease.knobs.contains(&Knob::Partition));
    if let Some(lease) = attached {
        let standing = read_standing(state, &plan.vm).filter(|_| lease.partition.is_none());
        let findings = standing.into_iter().flat_map(|standing| standing.findings);
        return findings.into_iter().find(|one| one.rule == RULE).unwrap_or(chosen.1);
    }
    match obstacle_of(ground, site, &target.cpus) {
        None => chosen.1,
        Some(reason) => lower(plan, as_strs(&beside), &reason).1,
    }
}
