//! Takes a VM's CPUs offline and online again before its first thread is pinned, one after another, and
//! brings back what a killed qmpin has left offline.
//!
//! The host's lock is held for one CPU at a time: no other process then finds a CPU in the host's journal that
//! is about to come back, and none waits for long.

use crate::cpuset::CpuSet;
use crate::discover::{DiscoverError, online_cpus, with_own_masks};
use crate::ids::{CpuId, VmName};
use crate::knobs::ground::{Ground, Host};
use crate::knobs::host::apply::apply_host;
use crate::knobs::host::interrupts::irq_places;
use crate::knobs::host::journal::HostJournal;
use crate::knobs::host::keep::HostError;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::outcome::HostApplied;
use crate::knobs::host::places::{Place, Value};
use crate::knobs::host::refusal::host_refusal;
use crate::knobs::host::step::HostStep;
use crate::knobs::host::view::read_place;
use crate::knobs::reonline::apply::{CycleReport, Cycled, cycle};
use crate::knobs::reonline::plan::{Beforehand, Choice, Never, RULE, choose};
use crate::knobs::reonline::read::{is_switch, reonline_facts, switch};
use crate::leases::StateDir;
use crate::plan::Plan;
use crate::policy::{Knob, VmPolicy};
use crate::sysroot::SysRoot;
use crate::threads::ThreadKey;
use crate::wording::{counted, cpus_in_words};
use crate::{discover, shown};

/// How many are named, of many that have changed.
const NAMED: usize = 4;

/// What came of it, in sentences; they are logged already.
#[derive(Debug, Default)]
pub struct ReonlineReport {
    /// CPUs that were left as they are, and why.
    pub left_out: Vec<String>,
    /// What the kernel would not do, or has not undone.
    pub failed: Vec<String>,
}

/// Takes these CPUs offline and online again, where that has no cost for other threads.
///
/// # Errors
/// [`HostError`] where the host or its journal cannot be used. All CPUs are online then that can be.
pub(crate) fn reonline(ground: Ground<'_>, cpus: &CpuSet) -> Result<ReonlineReport, HostError> {
    let Ground { host: Host { root, .. }, state, vm, boot_id, process } = ground;
    let mut report = ReonlineReport::default();
    let mut taken = CpuSet::EMPTY;
    let before = {
        // Masks change as other VMs' partitions do.
        let _lock = state.lock_host()?;
        Picture::of(ground.host)
    };
    for cpu in cpus.iter() {
        // A VM that has ended needs none of it.
        if discover::lives(root, process).is_ok_and(|lives| !lives) {
            break;
        }
        let _lock = state.lock_host()?;
        let mut journal = HostJournal::open(&state.host_journal_path(), boot_id)?;
        let single = CpuSet::single(cpu);
        let facts = facts(ground.host, state, vm, boot_id, &single, journal.memory())?;
        match choose(&single, &facts, Beforehand::Done) {
            Err(never) => {
                report.left_out.push(format!("{RULE}: no CPU is taken offline: {never}"));
                break;
            }
            Ok(Choice { left_out, .. }) if !left_out.is_empty() => {
                let why = left_out
                    .iter()
                    .map(|(cpu, blocker)| format!("{RULE}: CPU {cpu} is left as it is: {blocker}"));
                report.left_out.extend(why);
            }
            Ok(_) => {
                let kept = kept(root, cpu, journal.memory());
                let CycleReport { cycled, put_back } =
                    cycle(ground.host, &mut journal, cpu, &kept)?;
                match cycled {
                    Cycled::Done => taken.insert(cpu),
                    Cycled::Refused(error) => report.failed.push(format!(
                        "{RULE}: CPU {cpu} could not be taken offline: {}: 1 → 0 was refused: {error}",
                        switch(cpu)
                    )),
                    Cycled::Stuck(error) => report.failed.push(format!(
                        "{RULE}: CPU {cpu} DOES NOT COME BACK ONLINE: {}: 0 → 1 was refused: {error}",
                        switch(cpu)
                    )),
                }
                for applied in &put_back {
                    tracing::info!("{RULE}: CPU {cpu} took {} with it", step_in_words(applied));
                }
                report.failed.extend(put_back.iter().filter_map(host_refusal));
            }
        }
    }
    report.failed.extend(before.lost(ground.host, &taken));
    if !taken.is_empty() {
        let were = if taken.len() == 1 { "was" } else { "were" };
        tracing::info!("{RULE}: {} {were} offline and online again", cpus_in_words(&taken));
    }
    for sentence in report.left_out.iter().chain(&report.failed) {
        tracing::warn!("{sentence}");
    }
    Ok(report)
}

fn step_in_words(HostApplied { step, .. }: &HostApplied) -> String {
    match step {
        HostStep::PutBack { place, from, to } => format!("{place}: {from}, restored to {to}"),
        step => step.place().to_string(),
    }
}

fn facts(
    host: Host<'_>,
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
    cpus: &CpuSet,
    memory: &HostMemory,
) -> Result<crate::knobs::reonline::plan::Facts, DiscoverError> {
    let mut others = discover::live_leases(host.root, state, boot_id);
    others.retain(|lease| lease.vm != *vm);
    reonline_facts(host.root, host.sched, host.cgroups, cpus, &others, memory)
}

/// What is to be as it was when the CPU is back: interrupts, which drivers may spread anew, and the CPU's
/// own power management.
fn kept(root: &SysRoot, cpu: CpuId, memory: &HostMemory) -> Vec<Place> {
    let mut places = irq_places(root);
    let of_cpu = format!("sys/devices/system/cpu/cpu{cpu}");
    let names = ["scaling_governor", "scaling_min_freq", "scaling_max_freq"];
    let names = names.into_iter().chain(["energy_performance_preference"]);
    places.extend(names.map(|name| Place::Word(format!("{of_cpu}/cpufreq/{name}"))));
    places.push(Place::Word(format!("{of_cpu}/power/pm_qos_resume_latency_us")));
    let states = root.folder(&format!("{of_cpu}/cpuidle")).and_then(|folder| folder.names());
    let states = states.unwrap_or_default().into_iter();
    places.extend(states.map(|name| Place::Word(format!("{of_cpu}/cpuidle/{name}/disable"))));
    places.retain(|place| memory.original(place).is_none());
    places
}

/// What cannot be restored, and has to be reported.
struct Picture {
    masks: Vec<(ThreadKey, CpuSet)>,
    clock: Option<String>,
}

impl Picture {
    fn of(host: Host<'_>) -> Picture {
        let own = with_own_masks(host.root, host.sched, &[], &CpuSet::EMPTY).into_iter();
        Picture { masks: own.map(|own| (own.key, own.cpus)).collect(), clock: clock(host.root) }
    }

    /// What has been lost with the CPUs that were taken, in sentences. Threads are moved by others, too, so
    /// it counts only what looks like the kernel's doing.
    fn lost(&self, host: Host<'_>, taken: &CpuSet) -> Vec<String> {
        let moved = |(key, was): &(ThreadKey, CpuSet)| {
            let now = read_place(host.root, host.sched, &Place::Thread(*key)).ok()??;
            let is = now.cpus().filter(|is| has_lost(was, is, taken))?;
            let comm = host.root.read(&format!("proc/{}/comm", key.tid)).unwrap_or_default();
            Some(format!("{} ({}) from {was} to {is}", key.tid, shown::line(comm.trim())))
        };
        let moved: Vec<String> = self.masks.iter().filter_map(moved).collect();
        let mut changed = Vec::new();
        if !moved.is_empty() {
            let number = counted(moved.len(), "thread");
            let named = moved[..moved.len().min(NAMED)].join(", ");
            changed
                .push(format!("{RULE}: {number} may have lost CPUs of their own choice: {named}"));
        }
        let now = clock(host.root);
        if now != self.clock {
            let name = |clock: &Option<String>| clock.clone().unwrap_or_default();
            let (is, was) = (name(&now), name(&self.clock));
            changed.push(format!("{RULE}: the kernel's clock is {is} now, and was {was}"));
        }
        changed
    }
}

fn clock(root: &SysRoot) -> Option<String> {
    let path = "sys/devices/system/clocksource/clocksource0/current_clocksource";
    root.read(path).ok().map(|text| text.trim().to_owned())
}

/// Whether a mask has become all that the thread may have, or lacks what was offline.
fn has_lost(was: &CpuSet, is: &CpuSet, taken: &CpuSet) -> bool {
    let has_grown = was.is_subset(is) && was != is;
    was.intersects(taken) && (has_grown || *is == *was - *taken)
}

/// Whether any CPU was brought online.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Brought {
    /// None was left offline.
    Nothing,
    /// Some were: the topology that was read before lacks them.
    Some,
}

/// Brings online what a qmpin that was killed has left offline.
///
/// # Errors
/// [`HostError`] where the host's journal cannot be used.
pub(crate) fn bring_back(
    host: Host<'_>,
    state: &StateDir,
    boot_id: &str,
) -> Result<Brought, HostError> {
    let path = state.host_journal_path();
    let has_one = |memory: &HostMemory| memory.originals().any(|(place, _)| is_switch(place));
    if !has_one(&HostJournal::read(&path, boot_id)?) {
        return Ok(Brought::Nothing);
    }
    // A process that takes a CPU offline holds the lock until the CPU is back.
    let _lock = state.lock_host()?;
    let mut journal = HostJournal::open(&path, boot_id)?;
    let steps = switches_back(host, journal.memory());
    let online = online_cpus(host.root)?;
    for applied in apply_host(host, &online, &mut journal, steps)? {
        if let Some(sentence) = host_refusal(&applied) {
            tracing::warn!("{sentence}");
        } else {
            tracing::info!("{RULE}: {} was left offline: online again", applied.step.place());
        }
    }
    Ok(Brought::Some)
}

fn switches_back(host: Host<'_>, memory: &HostMemory) -> Vec<HostStep> {
    let switches = memory.originals().filter(|(place, _)| is_switch(place));
    let step = |(place, to): (&Place, &Value)| {
        let (place, to) = (place.clone(), to.clone());
        match read_place(host.root, host.sched, &place) {
            Ok(now) => {
                now.filter(|from| *from != to).map(|from| HostStep::PutBack { place, from, to })
            }
            Err(error) => Some(HostStep::Later { place, before: to, reason: error.to_string() }),
        }
    };
    switches.filter_map(step).collect()
}

/// Which CPUs would be taken offline and online again if the VM was attached now; `None`: it is not asked for.
#[must_use]
pub fn would_take(
    host: Host<'_>,
    state: &StateDir,
    boot_id: &str,
    plan: &Plan,
    policy: &VmPolicy,
    memory: &HostMemory,
) -> Option<Result<Choice, Never>> {
    let knobs = policy.wanted_knobs();
    if !knobs.contains(&Knob::Reonline) {
        return None;
    }
    let (irqs, kthreads) = (knobs.contains(&Knob::Irqs), knobs.contains(&Knob::Kthreads));
    let beforehand = Beforehand::WillMove { irqs, kthreads };
    Some(match facts(host, state, &plan.vm, boot_id, &plan.exclusive, memory) {
        Ok(facts) => choose(&plan.exclusive, &facts, beforehand),
        Err(error) => Err(Never::Unknown(error.to_string())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_reset_by_the_kernel_is_distinguished_from_an_external_change() {
        let set = |list: &str| list.parse::<CpuSet>().expect("a cpulist");
        let lost = |was, is| has_lost(&set(was), &set(is), &set("4-5"));
        assert!(lost("4", "0-7") && lost("4,6", "0-7") && lost("4,6", "6"));
        assert!(!lost("4,6", "4,6") && !lost("0-7", "0-2") && !lost("2", "0-7"));
    }
}
