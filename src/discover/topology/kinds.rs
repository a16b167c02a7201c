//! Performance and efficiency cores, where there are both.
//!
//! Intel names them by the two PMUs that hybrid machines have (`cpu_core`, `cpu_atom`; also
//! `cpu_lowpower` for a third kind that is small as well). Elsewhere `cpu_capacity` decides, 1024 being
//! the largest core (`Documentation/ABI/testing/sysfs-devices-system-cpu`): where the cores differ, those with the
//! highest are the performance cores and all others efficiency cores.

use super::attribute::{Notes, Why};
use super::{CPU, PerCpu, attribute};
use crate::cpuset::CpuSet;
use crate::sysroot::SysRoot;
use crate::topology::CoreKind;

const SUBJECT: &str = "the kind";

/// The kind of each CPU; of none on machines whose cores are all alike.
pub(super) fn read_kinds(
    root: &SysRoot,
    online: &CpuSet,
    cores: &[CpuSet],
    notes: &mut Notes,
) -> PerCpu<CoreKind> {
    match attribute::cpulist(root, "sys/devices/cpu_core/cpus") {
        Err(why) if why.absent && has_one_x86_pmu(root) => PerCpu::none(),
        Err(why) if why.absent => by_capacity(root, online, cores, notes),
        performance => by_pmu(root, online, performance, notes),
    }
}

/// Whether this is x86 with one PMU for all cores, and so not hybrid: no other architecture's PMU has
/// an `rdpmc` (`arch/x86/events/core.c`), and hybrid machines have no PMU of that name
/// (`tools/perf/Documentation/intel-hybrid.txt`). It saves a file for each core. Only root may read
/// it, so that it is there will do.
fn has_one_x86_pmu(root: &SysRoot) -> bool {
    !matches!(attribute::text(root, "sys/devices/cpu/rdpmc"), Err(why) if why.absent)
}

fn by_pmu(
    root: &SysRoot,
    online: &CpuSet,
    performance: Result<CpuSet, Why>,
    notes: &mut Notes,
) -> PerCpu<CoreKind> {
    let mut kinds = PerCpu::none();
    let mut known = CpuSet::EMPTY;
    let efficiency = attribute::cpulist(root, "sys/devices/cpu_atom/cpus");
    let mut reason = None;
    for (kind, cpus) in [(CoreKind::Performance, performance), (CoreKind::Efficiency, efficiency)] {
        match cpus {
            Ok(cpus) => {
                let twice = cpus & known & *online;
                if !twice.is_empty() {
                    let why = format!("CPUs {twice} are in both cpu_core and cpu_atom");
                    notes.add_cpus(SUBJECT, &twice, Why::new(why));
                }
                known |= cpus;
                kinds.set(&(cpus & *online), Some(kind));
                kinds.set(&twice, None);
            }
            Err(why) => reason = Some(why),
        }
    }
    if !online.is_subset(&known)
        && let Ok(small) = attribute::cpulist(root, "sys/devices/cpu_lowpower/cpus")
    {
        kinds.set(&((small & *online) - known), Some(CoreKind::Efficiency));
        known |= small;
    }
    let rest = *online - known;
    if !rest.is_empty() {
        let neither = || Why::new("they are in neither cpu_core nor cpu_atom".to_owned());
        notes.add_cpus(SUBJECT, &rest, reason.unwrap_or_else(neither));
    }
    kinds
}

fn by_capacity(
    root: &SysRoot,
    online: &CpuSet,
    cores: &[CpuSet],
    notes: &mut Notes,
) -> PerCpu<CoreKind> {
    let in_cores = cores.iter().fold(CpuSet::EMPTY, |all, core| all | *core);
    let mut groups = cores.to_vec();
    groups.extend((*online - in_cores).iter().map(CpuSet::single));

    let mut capacities: Vec<(CpuSet, u32)> = Vec::with_capacity(groups.len());
    let mut kinds = PerCpu::none();
    for group in groups {
        let Some(first) = group.first() else { continue };
        match attribute::id(root, &format!("{CPU}/cpu{first}/cpu_capacity")) {
            Ok(capacity) => capacities.push((group, capacity)),
            // Older kernels have the file on a few architectures alone, and there on every CPU.
            Err(why) if why.absent && capacities.is_empty() => return kinds,
            Err(why) => notes.add_cpus(SUBJECT, &group, why),
        }
    }
    let highest = capacities.iter().map(|(_, capacity)| *capacity).max();
    if capacities.iter().all(|(_, capacity)| Some(*capacity) == highest) {
        return kinds;
    }
    for (group, capacity) in capacities {
        let kind =
            if Some(capacity) == highest { CoreKind::Performance } else { CoreKind::Efficiency };
        kinds.set(&group, Some(kind));
    }
    kinds
}
