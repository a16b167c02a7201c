//! The choice between a partition and the fallbacks below it: made when the VM is attached, and again when the
//! reason for a fallback has gone.
//!
//! ```text
//!   assess, by reading ─▶ claim ─▶ prepare, converge: the writes ─▶ a partition
//!        │                              │ refused
//!        └── obstacle ──▶ step_down ◀───┘   what was made is undone, then AllowedCPUs= of units, or masks alone
//!                            └─▶ assess again, at growing intervals
//! ```

use std::time::{Duration, Instant};

use crate::cpuset::CpuSet;
use crate::discover::cpusets::{Hold, Holder, conflicts};
use crate::discover::{self, cgroup};
use crate::journal::{Journal, JournalError, Memory, PartitionUndo, Record};
use crate::knobs::ground::Ground;
use crate::knobs::partition::apply::{Refused, UnitNeeds, prepare_unit, survey_unit};
use crate::knobs::partition::keep::reload::have_delegated;
use crate::knobs::partition::keep::{Partition, take_back};
use crate::knobs::partition::plan::{Separation, Target, isolated, lower, target};
use crate::plan::{Finding, Plan};
use crate::site::Site;

/// The first check whether the reason for a fallback has gone; each further one waits twice as long.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause where a check reads a few files.
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(8);
/// The longest pause where only another attempt can show it: it has systemd reload twice.
const ATTEMPT_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Why there is no partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Obstacle {
    /// It was found by reading: unit, tree, plan, or systemd's answer.
    Seen(String),
    /// A write was refused, and these cgroups hold CPUs of the partition.
    Held(Vec<Holder>),
    /// Writes were refused, and the reason is not known.
    Refused(Vec<Refused>),
}

impl Obstacle {
    fn of(refused: Vec<Refused>, holders: Vec<Holder>) -> Obstacle {
        if holders.is_empty() { Obstacle::Refused(refused) } else { Obstacle::Held(holders) }
    }

    /// The obstacle in a clause.
    fn in_words(&self) -> String {
        match self {
            Obstacle::Seen(reason) => reason.clone(),
            Obstacle::Held(holders) => held_in_words(holders),
            Obstacle::Refused(refused) => {
                refused.first().map_or_else(String::new, ToString::to_string)
            }
        }
    }

    fn pause_max(&self) -> Duration {
        match self {
            Obstacle::Seen(_) | Obstacle::Held(_) => LOOK_PAUSE_MAX,
            Obstacle::Refused(_) => ATTEMPT_PAUSE_MAX,
        }
    }
}

pub(crate) fn held_in_words(holders: &[Holder]) -> String {
    holders.iter().map(Holder::in_words).collect::<Vec<_>>().join(", ")
}

/// A fallback in force.
#[derive(Debug)]
pub(crate) struct Fallback {
    pub(crate) obstacle: Obstacle,
    /// What is reported of it.
    pub(crate) finding: Finding,
    look_at: Instant,
    pause: Duration,
}

impl Fallback {
    /// The fallback after a choice that began at `begun`. The pause grows as long as the obstacle is the same, and
    /// with the time that the check takes.
    fn after(
        earlier: Option<&Fallback>,
        obstacle: Obstacle,
        finding: Finding,
        begun: Instant,
    ) -> Fallback {
        let pause = match earlier.filter(|earlier| earlier.obstacle == obstacle) {
            Some(earlier) => (earlier.pause * 2).min(obstacle.pause_max()),
            None => LOOK_PAUSE,
        };
        let pause = pause.max((begun.elapsed() * 2).min(ATTEMPT_PAUSE_MAX));
        Fallback { obstacle, finding, look_at: Instant::now() + pause, pause }
    }
}

impl Partition {
    /// When the choice is to be made again; `None`: there is a partition, or none is wanted.
    pub(crate) fn choice_due(&self) -> Option<Instant> {
        if !self.refused.is_empty() {
            return Some(Instant::now());
        }
        self.fallback.as_ref().map(|fallback| fallback.look_at)
    }

    /// Whether a partition that is in force, or was being made, was refused: then the choice is to be made again.
    pub(crate) fn is_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Returns whether the choice would be another one now. It reads, and writes nothing.
    pub(crate) fn would_choose_anew(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        memory: &Memory,
    ) -> bool {
        if self.is_refused() || !self.unrestored.is_empty() {
            return true;
        }
        let begun = Instant::now();
        let Some(earlier) = self.fallback.as_ref() else { return false };
        match self.assess(ground, plan, memory) {
            Ok(_) => true,
            Err(obstacle) if obstacle != earlier.obstacle => true,
            Err(obstacle) => {
                let finding = earlier.finding.clone();
                self.fallback = Some(Fallback::after(Some(earlier), obstacle, finding, begun));
                false
            }
        }
    }

    /// Chooses. Where it is a partition, its undo is made durable and nothing is written yet; else the fallback is
    /// in force for this VM's own part. Whether it is a partition.
    pub(crate) fn claim(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
    ) -> Result<bool, JournalError> {
        let begun = Instant::now();
        let refused = std::mem::take(&mut self.refused);
        let shares = ground.shares();
        let assessed = match (&self.site, target(plan, &shares)) {
            (Some(site), Ok(target)) if !refused.is_empty() => {
                let tree = ground.host.cgroups;
                let before = ground.unit_limits();
                let holders = conflicts(tree, site, &target.cpus, &shares, &before);
                Err(Obstacle::of(refused, holders))
            }
            _ => self.assess(ground, plan, journal.memory()),
        };
        match assessed {
            Ok((site, target, needs)) => {
                remember_undo(ground, journal, &site, &target, &needs)?;
                self.site = Some(site);
                self.needs = Some(needs);
                Ok(true)
            }
            Err(obstacle) => {
                self.step_down(ground, plan, journal, obstacle, begun)?;
                Ok(false)
            }
        }
    }

    /// Finds out by reading whether there can be a partition.
    fn assess(
        &self,
        ground: Ground<'_>,
        plan: &Plan,
        memory: &Memory,
    ) -> Result<(Site, Target, UnitNeeds), Obstacle> {
        let Ground { host, process, .. } = ground;
        let tree = host.cgroups;
        let site = cgroup::partition_site(host.root, tree, process.pid);
        let shares = ground.shares();
        let target = target(plan, &shares).map_err(Obstacle::Seen)?;
        let site = site.map_err(Obstacle::Seen)?;
        let before = ground.unit_limits();
        let holders = conflicts(tree, &site, &target.cpus, &shares, &before);
        self.may_be_tried(&holders)?;
        let needs = survey_unit(host.root, tree, host.units, &site, memory.partition())
            .map_err(Obstacle::Seen)?;
        within(&needs, &site, &target).map_err(Obstacle::Seen)?;
        Ok((site, target, needs))
    }

    /// Whether these holders of the partition's CPUs allow an attempt. That all CPUs of a cgroup are taken is refused
    /// by many kernels and not by all: it is tried once.
    fn may_be_tried(&self, holders: &[Holder]) -> Result<(), Obstacle> {
        let certain = holders.iter().any(|holder| holder.how != Hold::AllItsCpus);
        let tried = self.fallback.as_ref().is_some_and(|fallback| match &fallback.obstacle {
            Obstacle::Held(known) => holders.iter().any(|holder| known.contains(holder)),
            Obstacle::Seen(_) | Obstacle::Refused(_) => false,
        });
        if certain || tried { Err(Obstacle::Held(holders.to_vec())) } else { Ok(()) }
    }

    /// Makes the unit ready. What is refused leads to the next choice.
    pub(crate) fn prepare(&mut self, ground: Ground<'_>) {
        let root = ground.host.root;
        let (Some(site), Some(needs)) = (&self.site, self.needs.take()) else { return };
        let all = discover::present_cpus(root);
        let tree = ground.host.cgroups;
        let delegated =
            if needs.delegate { have_delegated(ground, ground.host.units, site) } else { Ok(()) };
        let needs = UnitNeeds { delegate: false, ..needs };
        let prepared = delegated
            .and_then(|()| prepare_unit(root, tree, ground.host.units, site, &needs, &all));
        if let Err(refused) = prepared {
            self.refused = vec![refused];
        }
    }

    /// Uses the next fallback. What there is of a partition is undone; limits of units are made with the rest of the
    /// host.
    fn step_down(
        &mut self,
        ground: Ground<'_>,
        plan: &Plan,
        journal: &mut Journal,
        obstacle: Obstacle,
        begun: Instant,
    ) -> Result<(), JournalError> {
        let Ground { host, process, .. } = ground;
        let beside = cgroup::slices_site(host.root, host.cgroups, process.pid);
        let (separation, finding) =
            lower(plan, crate::knobs::partition::keep::as_strs(&beside), &obstacle.in_words());
        let slices = match separation {
            Separation::Slices(cgroup) => Some(cgroup),
            Separation::Partition(_) | Separation::Affinity => None,
        };
        let is_clean = self.site.is_none() && self.unrestored.is_empty();
        if !(is_clean && self.fallback.is_some() && self.slices == slices) {
            self.give_up(ground, journal.memory());
            if slices.is_some() && !journal.memory().has_slices() {
                journal.append(vec![Record::Slices(plan.exclusive)])?;
            }
            self.slices = slices;
        }
        self.fallback = Some(Fallback::after(self.fallback.as_ref(), obstacle, finding, begun));
        Ok(())
    }

    /// Forgets the fallback, once the partition has been made.
    pub(crate) fn settle(&mut self) {
        if self.site.is_some() && self.target.is_some() && !self.is_refused() {
            self.slices = None;
            self.fallback = None;
        }
    }

    /// Undoes whatever there is, because the policy wants neither a partition nor a fallback.
    pub(crate) fn abandon(&mut self, ground: Ground<'_>, memory: &Memory) {
        if self.site.is_some() || self.slices.is_some() {
            self.give_up(ground, memory);
        }
        self.fallback = None;
        self.refused.clear();
    }

    /// Undoes what an earlier choice, or an earlier qmpin, has made and this one is not to have.
    pub(crate) fn give_up(&mut self, ground: Ground<'_>, memory: &Memory) {
        self.site = None;
        self.slices = None;
        self.target = None;
        self.stuck.clear();
        let restored = take_back(ground, memory);
        for refused in &restored.refused {
            tracing::warn!("{refused}");
        }
        for foreign in restored.foreign {
            tracing::warn!("{foreign}");
        }
        self.unrestored = restored.refused;
    }

    /// What is reported of the partition or of the fallback; `None`: neither is in force yet, or wanted.
    pub(crate) fn finding(&self) -> Option<Finding> {
        let fallback = self.fallback.as_ref().map(|fallback| fallback.finding.clone());
        fallback.or_else(|| Some(isolated(self.site.as_ref()?, &self.target?)))
    }

    /// What was refused and led to the fallback in force, or could not be undone since. Where the cause is known,
    /// the fallback is all that could be expected.
    pub(crate) fn fell(&self) -> Vec<Refused> {
        let refused = self.fallback.iter().flat_map(|fallback| match &fallback.obstacle {
            Obstacle::Refused(refused) => refused.clone(),
            Obstacle::Seen(_) | Obstacle::Held(_) => Vec::new(),
        });
        refused.chain(self.unrestored.iter().cloned()).collect()
    }
}

/// Makes the undo of a partition durable, where the journal does not have it yet.
fn remember_undo(
    ground: Ground<'_>,
    journal: &mut Journal,
    site: &Site,
    target: &Target,
    needs: &UnitNeeds,
) -> Result<(), JournalError> {
    let undo = PartitionUndo {
        unit: site.unit.clone(),
        cgroup: site.cgroup.clone(),
        drop_in: needs.drop_in.clone(),
        allowed_set: needs.allow.then(|| discover::present_cpus(ground.host.root)),
        had_controller: needs.had_controller,
        cpus: target.cpus,
    };
    let is_known = journal.memory().partition().is_some_and(|known| {
        undo.cpus.is_subset(&known.cpus)
            && (undo.drop_in.is_none() || known.drop_in == undo.drop_in)
            && known.allowed_set.is_some() >= undo.allowed_set.is_some()
    });
    if is_known { Ok(()) } else { journal.append(vec![Record::Partition(undo)]) }
}

/// Whether what another program allows the unit is enough.
fn within(needs: &UnitNeeds, site: &Site, target: &Target) -> Result<(), String> {
    let wanted: CpuSet = target.cpus | target.emulator | target.iothreads;
    match needs.limit {
        Some(limit) if !wanted.is_subset(&limit) => Err(format!(
            "{} has AllowedCPUs={limit}, which another program has set, and the plan needs {wanted}",
            site.unit
        )),
        _ => Ok(()),
    }
}

/// The cgroups that stand in the way of a partition of these CPUs, in a clause; `None`: there are none.
pub(crate) fn obstacle_of(ground: Ground<'_>, site: &Site, cpus: &CpuSet) -> Option<String> {
    let tree = ground.host.cgroups;
    let holders = conflicts(tree, site, cpus, &ground.shares(), &ground.unit_limits());
    (!holders.is_empty()).then(|| held_in_words(&holders))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knobs::partition::plan::affinity_alone;

    fn holder(cgroup: &str, how: Hold) -> Holder {
        Holder { cgroup: cgroup.to_owned(), how, cpus: "12-13".to_owned() }
    }

    fn fallen(obstacle: Obstacle) -> Partition {
        let fallback = Fallback::after(None, obstacle, affinity_alone(""), Instant::now());
        Partition { fallback: Some(fallback), ..Partition::default() }
    }

    #[test]
    fn taking_all_cpus_of_a_cgroup_is_tried_once_and_exclusive_ones_never() {
        let soft = [holder("rt.slice", Hold::AllItsCpus)];
        let hard = [holder("rt.slice", Hold::Exclusive)];
        let fresh = Partition::default();
        assert_eq!(fresh.may_be_tried(&[]), Ok(()));
        assert_eq!(fresh.may_be_tried(&soft), Ok(()));
        assert_eq!(fresh.may_be_tried(&hard), Err(Obstacle::Held(hard.to_vec())));
        let refused = fallen(Obstacle::Held(soft.to_vec()));
        assert_eq!(refused.may_be_tried(&soft), Err(Obstacle::Held(soft.to_vec())));
        assert_eq!(refused.may_be_tried(&[]), Ok(()), "it has gone");
        let moved = [Holder { cpus: "14".to_owned(), ..soft[0].clone() }];
        assert_eq!(refused.may_be_tried(&moved), Ok(()), "it has changed");
    }

    #[test]
    fn looks_grow_rare_while_the_reason_stays_and_are_soon_again_when_it_changes() {
        let pause = |earlier: Option<&Fallback>, reason: &str| {
            let obstacle = Obstacle::Seen(reason.to_owned());
            Fallback::after(earlier, obstacle, affinity_alone(""), Instant::now())
        };
        let mut last = pause(None, "a process");
        assert_eq!(last.pause, LOOK_PAUSE);
        for _ in 0..10 {
            let next = pause(Some(&last), "a process");
            assert!(next.pause >= last.pause);
            last = next;
        }
        assert_eq!(last.pause, LOOK_PAUSE_MAX);
        assert_eq!(pause(Some(&last), "another").pause, LOOK_PAUSE);
        let slow = Instant::now().checked_sub(Duration::from_secs(20)).expect("a time");
        let obstacle = Obstacle::Seen("systemd".to_owned());
        let late = Fallback::after(None, obstacle, affinity_alone(""), slow);
        assert!(late.pause >= Duration::from_secs(40), "a slow look is not made all the time");
    }

    #[test]
    fn a_refusal_whose_cause_is_known_names_it_and_is_no_shortfall() {
        let refused = vec![Refused::new("qemu.slice/cpuset.cpus.exclusive", "12-19", "EINVAL")];
        let known = Obstacle::of(refused.clone(), vec![holder("rt.slice", Hold::AllItsCpus)]);
        assert_eq!(known.in_words(), "rt.slice has CPUs 12-13 (cpuset.cpus)");
        assert_eq!(fallen(known).fell(), []);
        let unknown = Obstacle::of(refused.clone(), Vec::new());
        assert!(unknown.in_words().contains("would not become 12-19: EINVAL"));
        assert_eq!(fallen(unknown).fell(), refused);
    }
}
