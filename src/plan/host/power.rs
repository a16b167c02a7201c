//! The knob *power*: the VM's CPUs run at full frequency and wake up at once.
//!
//! Idle states deeper than the first are forbidden, and not idling as such: a CPU that polls takes from
//! its SMT sibling and from the package's power budget.
//!
//! Where the processor chooses frequencies by a preference, the kernel makes that the highest with the governor, takes
//! no other meanwhile (`EBUSY`), and with `amd-pstate-epp` keeps it when another governor comes
//! (`drivers/cpufreq/amd-pstate.c`). So the preference is taken down before, and put back after the governor.

use super::diff::HostStep;
use crate::cpuset::CpuSet;
use crate::journal::HostRecord;
use crate::places::{HostView, Place, Value};

/// The governor that asks for the highest frequency (`Documentation/admin-guide/pm/cpufreq.rst`).
const GOVERNOR: &str = "performance";

/// What the kernel calls the preference that it makes of it.
const HIGHEST: &str = "performance";

pub(super) fn wishes(view: &HostView, cpus: &CpuSet) -> Vec<(Place, Value)> {
    let mut wishes = Vec::new();
    for power in cpus.iter().filter_map(|cpu| view.power.get(&cpu)) {
        let word = |word: &str| Value::Word(word.to_owned());
        wishes.extend(power.governor.clone().map(|place| (place, word(GOVERNOR))));
        if let Some((place, latency_us)) = &power.resume_latency {
            // 0 would mean "no limit" (`Documentation/ABI/testing/sysfs-devices-power`).
            wishes.push((place.clone(), word(&(*latency_us).max(1).to_string())));
        }
    }
    wishes
}

/// The preferences that the kernel is about to change with a governor, as they are.
#[must_use]
pub fn preferences(view: &HostView, steps: &[HostStep]) -> Vec<HostRecord> {
    let is_written = |governor: &Place| {
        steps.iter().any(|step| matches!(step, HostStep::Write { place, .. } if place == governor))
    };
    let highest = Value::Word(HIGHEST.to_owned());
    let preferences = view.power.values().filter_map(|power| power.preference.as_ref());
    let preferences =
        preferences.filter(|place| governor_over(place).as_ref().is_some_and(is_written));
    let records = |place: &Place| {
        let value = view.values.get(place).filter(|value| **value != highest)?.clone();
        let original = HostRecord::Original { place: place.clone(), value: value.clone() };
        let intent = HostRecord::Intent { place: place.clone(), from: value, to: highest.clone() };
        Some([original, intent])
    };
    preferences.filter_map(records).flatten().collect()
}

/// The governor that decides on a preference, where the place is one.
pub(super) fn governor_over(place: &Place) -> Option<Place> {
    let Place::Word(path) = place else { return None };
    let folder = path.strip_suffix("/energy_performance_preference")?;
    Some(Place::Word(format!("{folder}/scaling_governor")))
}
