//! The VM's partition: made once the threads are pinned, kept at every look, taken back at the end.
//!
//! ```text
//!   claim ─▶ lease says so ─▶ prepare ─▶ converge at every look ─▶ take_back
//!     │                          │
//!     └── no unit of its own … ──┴── systemd says no ─▶ affinity alone, and why
//! ```

mod take_back;

use std::collections::{BTreeMap, BTreeSet};

pub(super) use take_back::{free_cpus, hand_back_of, remembered, take_back};

use super::settings::Host;
use crate::apply::Bench;
use crate::apply::partition::{Refused, UnitNeeds, carry_out, prepare_unit, survey_unit};
use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::{self, Grips, cgroup};
use crate::ids::VmName;
use crate::journal::{Journal, JournalError, Memory, PartitionUndo, Record};
use crate::leases::StateDir;
use crate::locks::LeasesLock;
use crate::plan::partition::{
    Group, PartitionStep, Rung, Share, Site, Target, affinity_alone, choose, in_words, lower,
    placing, resizing, target,
};
use crate::plan::{Finding, Plan};
use crate::policy::Knob;
use crate::systemd::SystemBus;
use crate::threads::{ProcessKey, Thread, ThreadKey};

/// Why a VM that is attached has none, where it looks as if it could have one.
const NOT_MADE: &str = "it could not be made when the VM was attached, and `qmpin status` says why";

/// What there is about one VM's partition, beside the plan.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) host: Host<'a>,
    pub(super) state: &'a StateDir,
    pub(super) vm: &'a VmName,
    pub(super) boot_id: &'a str,
    pub(super) process: ProcessKey,
}

/// The VM's partition, as far as there is one.
#[derive(Debug, Default)]
pub(super) struct Partition {
    site: Option<Site>,
    /// The cgroup beside which systemd is to keep others off the VM's CPUs, on the rung below.
    slices: Option<String>,
    needs: Option<UnitNeeds>,
    /// Threads that the kernel would not move, and what it said: they are not tried at every look.
    stuck: BTreeMap<ThreadKey, Refused>,
    /// What was logged already.
    said: BTreeSet<Refused>,
    /// What has sent it down a rung.
    fell: Option<Refused>,
    /// What it was given last, and has.
    target: Option<Target>,
    /// How many times it was found changed, since that was asked last.
    drifted: u64,
    has_told_drift: bool,
}

impl Partition {
    /// The one an earlier qmpin has made for this very process, or none.
    pub(super) fn resumed(journal: &Journal) -> Partition {
        let undo = journal.memory().partition();
        let site = undo.map(|undo| Site { unit: undo.unit.clone(), cgroup: undo.cgroup.clone() });
        Partition { site, ..Partition::default() }
    }

    /// Where it is.
    pub(super) fn site(&self) -> Option<Site> {
        self.site.clone()
    }

    /// Goes back to the one it had before [`Partition::claim`], of which nothing is written but the undo.
    pub(super) fn disclaim(&mut self, earlier: Option<Site>) {
        self.site = earlier;
        self.needs = None;
    }

    /// Where it is, for the lease.
    pub(super) fn cgroup(&self) -> Option<String> {
        self.site.as_ref().map(|site| site.cgroup.clone())
    }

    /// The cgroup beside which others are kept off, for the lease.
    pub(super) fn slices(&self) -> Option<String> {
        self.slices.clone()
    }

    /// Chooses the rung, and makes the undo durable where it is a partition: nothing is written yet.
    /// Whether it is.
    pub(super) fn claim(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
    ) -> Result<bool, JournalError> {
        let Ground { host, process, .. } = ground;
        let cgroups = CgroupTree::of(host.root);
        let site = cgroup::partition_site(host.root, &cgroups, process.pid);
        let shares = ground.shares();
        let beside = cgroup::slices_site(host.root, &cgroups, process.pid);
        let (rung, finding) =
            choose(plan, site.as_ref().map_err(String::as_str), as_strs(&beside), &shares);
        let (Rung::Partition(target), Ok(site)) = (&rung, site) else {
            self.go_down(ground, plan, journal, rung, &finding)?;
            return Ok(false);
        };
        let earlier = journal.memory().partition();
        let needs = survey_unit(host.root, &cgroups, &SystemBus, &site, earlier);
        let needs = match needs.and_then(|needs| within(&needs, &site, target).map(|()| needs)) {
            Ok(needs) => needs,
            Err(reason) => {
                self.fall_back(ground, plan, journal, &reason)?;
                return Ok(false);
            }
        };
        let undo = PartitionUndo {
            unit: site.unit.clone(),
            cgroup: site.cgroup.clone(),
            drop_in: needs.drop_in.clone(),
            allowed_set: needs.allow.then(|| discover::present_cpus(host.root)),
            had_controller: needs.had_controller,
            cpus: target.cpus,
        };
        let is_known = earlier.is_some_and(|known| {
            undo.cpus.is_subset(&known.cpus)
                && known.drop_in == undo.drop_in
                && known.allowed_set.is_some() >= undo.allowed_set.is_some()
        });
        if !is_known {
            journal.append(vec![Record::Partition(undo)])?;
        }
        self.site = Some(site);
        self.needs = Some(needs);
        Ok(true)
    }

    /// Makes the unit ready; if that cannot be, it goes down a rung.
    pub(super) fn prepare(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
    ) -> Result<(), JournalError> {
        let Host { root, .. } = ground.host;
        let (Some(site), Some(needs)) = (&self.site, self.needs.take()) else { return Ok(()) };
        let cgroups = CgroupTree::of(root);
        let all = discover::present_cpus(ground.host.root);
        match prepare_unit(root, &cgroups, &SystemBus, site, &needs, &all) {
            Ok(()) => Ok(()),
            Err(refused) => {
                let reason = refused.to_string();
                self.fell = Some(refused);
                self.fall_back(ground, plan, journal, &reason)
            }
        }
    }

    /// Goes down a rung, since there can be no partition.
    fn fall_back(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
        reason: &str,
    ) -> Result<(), JournalError> {
        let Ground { host, process, .. } = ground;
        let beside = cgroup::slices_site(host.root, &CgroupTree::of(host.root), process.pid);
        let (rung, finding) = lower(plan, as_strs(&beside), reason);
        self.go_down(ground, plan, journal, rung, &finding)
    }

    /// What an earlier qmpin has made is taken back; limits of units are made with the rest of the host.
    fn go_down(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
        rung: Rung,
        finding: &Finding,
    ) -> Result<(), JournalError> {
        tracing::warn!("{}: {}", finding.rule, finding.reason);
        self.give_up(ground, journal.memory());
        if let Rung::Slices(cgroup) = rung {
            journal.append(vec![Record::Slices(plan.exclusive)])?;
            self.slices = Some(cgroup);
        }
        Ok(())
    }

    /// Takes back what an earlier qmpin has made and this one is not to have.
    pub(super) fn give_up(&mut self, ground: Ground<'_>, memory: &Memory) {
        self.site = None;
        self.slices = None;
        self.target = None;
        let restored = take_back(ground, memory);
        for refused in restored.refused {
            tracing::warn!("{refused}");
        }
        for foreign in restored.foreign {
            tracing::warn!("{foreign}");
        }
    }

    /// Puts threads into their groups and gives the partition the plan's CPUs, where that is not so.
    /// What was refused.
    pub(super) fn converge(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
        threads: &[Thread],
        grips: &Grips,
    ) -> Result<Vec<Refused>, JournalError> {
        let Some(site) = self.site.clone() else { return Ok(self.fell.iter().cloned().collect()) };
        let Host { root, sched } = ground.host;
        let cgroups = CgroupTree::of(root);
        let shares = ground.shares();
        let target = match target(plan, &shares) {
            Ok(target) => target,
            Err(reason) => {
                return Ok(self.say(vec![Refused::new(&site.cgroup, "a partition", reason)]));
            }
        };
        let ever = remember(journal, &target)?;
        // Without its cgroup the VM is gone, and somebody will say so.
        let Ok(seen) = cgroup::partition_seen(&cgroups, &site) else { return Ok(Vec::new()) };
        let bench = Bench { root, sched, grips, process: ground.process };
        let mut steps = placing(plan, &target, &seen, threads);
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
        // Threads are born into other groups than theirs; all else was as planned, and is somebody's doing.
        let mut is_changed = steps.iter().any(|step| !matches!(step, PartitionStep::Move { .. }));
        let (mut written, mut refused) = carry_out(bench, &cgroups, &site, &steps);
        let of_thread = |refused: &Refused| Some((refused.thread?, refused.clone()));
        self.stuck.extend(refused.iter().filter_map(of_thread));
        let seen =
            if steps.is_empty() { Ok(seen) } else { cgroup::partition_seen(&cgroups, &site) };
        let Ok(seen) = seen else { return Ok(Vec::new()) };
        let resizing = resizing(&site, &target, ever, &shares, &seen);
        is_changed |= resizing.contains(&PartitionStep::Isolate);
        if !resizing.is_empty() {
            match ground.state.lock_leases() {
                Ok(lock) => {
                    let (more, said) = self.resize_locked(ground, bench, plan, ever, &lock);
                    written += more;
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
        if cgroup::partition_seen(&cgroups, &site).is_err() {
            return Ok(Vec::new());
        }
        refused.extend(held);
        Ok(self.say(refused))
    }

    /// Somebody has changed what it has; that is mended at every look, and told once.
    fn drift(&mut self, site: &Site) {
        self.drifted += 1;
        if !std::mem::replace(&mut self.has_told_drift, true) {
            tracing::warn!("somebody has changed the partition in {}: made again", site.cgroup);
        }
    }

    /// How many times it was found changed since the last call.
    pub(super) fn take_drifted(&mut self) -> u64 {
        std::mem::take(&mut self.drifted)
    }

    /// Gives the partition the CPUs of a new plan while nobody else may change leases: what others see
    /// as free is free.
    pub(super) fn resize(
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
            let Host { root, sched } = ground.host;
            let grips = Grips::default();
            let bench = Bench { root, sched, grips: &grips, process: ground.process };
            // What was refused is tried again by the look that follows, and said by that.
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
        let cgroups = CgroupTree::of(ground.host.root);
        let shares = ground.shares();
        let refuse = |reason: String| (0, vec![Refused::new(&site.cgroup, "a partition", reason)]);
        match (target(plan, &shares), cgroup::partition_seen(&cgroups, site)) {
            (Ok(target), Ok(seen)) => {
                let steps = resizing(site, &target, ever, &shares, &seen);
                carry_out(bench, &cgroups, site, &steps)
            }
            (Err(reason), _) => refuse(reason),
            (_, Err(error)) => refuse(error.to_string()),
        }
    }

    /// Logs what was not logged before.
    fn say(&mut self, refused: Vec<Refused>) -> Vec<Refused> {
        for one in &refused {
            if self.said.insert(one.clone()) {
                tracing::warn!("{}: {one}", crate::plan::partition::RULE);
            }
        }
        refused
    }
}

impl Ground<'_> {
    /// The CPUs of all other VMs, and those that their partitions still hold.
    pub(super) fn others_cpus(&self) -> CpuSet {
        let leases = discover::live_leases(self.state, self.boot_id).into_iter();
        let others = leases.filter(|lease| lease.vm != *self.vm);
        let held = self.shares().into_iter().map(|share| share.cpus);
        others.map(|lease| lease.exclusive).chain(held).fold(CpuSet::EMPTY, |all, cpus| all | cpus)
    }

    /// The other VMs' partitions: what their leases say, and what the kernel still has of them.
    fn shares(&self) -> Vec<Share> {
        shares(self.host, self.state, self.vm, self.boot_id)
    }
}

fn shares(host: Host<'_>, state: &StateDir, vm: &VmName, boot_id: &str) -> Vec<Share> {
    let cgroups = CgroupTree::of(host.root);
    let others = discover::live_leases(state, boot_id).into_iter().filter(|lease| lease.vm != *vm);
    others
        .filter_map(|lease| {
            let cgroup = lease.partition?;
            let vcpus = Group::Vcpus.below(&cgroup);
            let held = cgroup::set(&cgroups, &vcpus, "cpuset.cpus.exclusive");
            Some(Share { vm: lease.vm, cgroup, cpus: lease.exclusive | held })
        })
        .collect()
}

/// Whether what somebody else allows the unit is enough.
fn within(needs: &UnitNeeds, site: &Site, target: &Target) -> Result<(), String> {
    let wanted = target.cpus | target.emulator | target.iothreads;
    match needs.limit {
        Some(limit) if !wanted.is_subset(&limit) => Err(format!(
            "{} was given AllowedCPUs={limit} by somebody else, and the plan needs {wanted}",
            site.unit
        )),
        _ => Ok(()),
    }
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

/// The rung that a VM would be on, for `qmpin plan`: nothing is asked of systemd.
#[must_use]
pub fn partition_finding(
    host: Host<'_>,
    state: &StateDir,
    process: ProcessKey,
    plan: &Plan,
    boot_id: &str,
) -> Finding {
    let cgroups = CgroupTree::of(host.root);
    let site = cgroup::partition_site(host.root, &cgroups, process.pid);
    let shares = shares(host, state, &plan.vm, boot_id);
    let beside = cgroup::slices_site(host.root, &cgroups, process.pid);
    let chosen = choose(plan, site.as_ref().map_err(String::as_str), as_strs(&beside), &shares);
    let lease = state.lease(&plan.vm).ok().flatten();
    let has_none = lease.filter(|lease| {
        lease.qemu == process
            && lease.boot_id == boot_id
            && lease.knobs.contains(&Knob::Partition)
            && lease.partition.is_none()
    });
    // What it has tells more than what could be.
    match (chosen, has_none) {
        ((Rung::Partition(_), _), Some(lease)) if lease.slices.is_some() => {
            lower(plan, as_strs(&beside), NOT_MADE).1
        }
        ((Rung::Partition(_) | Rung::Slices(_), _), Some(lease)) if lease.slices.is_none() => {
            affinity_alone(NOT_MADE)
        }
        ((_, finding), _) => finding,
    }
}
