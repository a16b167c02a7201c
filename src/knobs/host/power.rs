//! The knob *power*: the VM's CPUs run at full frequency and wake up at once.
//!
//! Idle states deeper than the shallowest are forbidden, and not idling as such: a CPU that polls takes from
//! its SMT sibling and from the package's power budget. Which state polls is known by its name: on x86 the first
//! does, on Arm the first is `WFI`, which idles.
//!
//! Where the processor chooses frequencies by a preference, the kernel makes that the highest with the governor, takes
//! no other meanwhile (`EBUSY`), and with `amd-pstate-epp` keeps it when another governor comes
//! (`drivers/cpufreq/amd-pstate.c`). So the preference is recorded before, and restored after the governor.

use crate::cpuset::CpuSet;
use crate::knobs::host::memory::HostRecord;
use crate::knobs::host::places::{HostView, IdleState, Place, Value};
use crate::knobs::host::step::HostStep;

/// The governor that asks for the highest frequency (`Documentation/admin-guide/pm/cpufreq.rst`).
const GOVERNOR: &str = "performance";

/// States in which a CPU does not idle (`drivers/cpuidle/poll_state.c`, `cpuidle-powernv.c`).
const POLLING: [&str; 2] = ["POLL", "snooze"];

/// What the kernel calls the preference that it makes of it.
const HIGHEST: &str = "performance";

pub(crate) fn wishes(view: &HostView, cpus: &CpuSet) -> Vec<(Place, Value)> {
    let mut wishes = Vec::new();
    for power in cpus.iter().filter_map(|cpu| view.power.get(&cpu)) {
        let word = |word: &str| Value::Word(word.to_owned());
        wishes.extend(power.governor.clone().map(|place| (place, word(GOVERNOR))));
        let latency_us = shallowest_us(&power.idle_states);
        if let Some((place, latency_us)) = power.resume_latency.clone().zip(latency_us) {
            // 0 would mean "no limit" (`Documentation/ABI/testing/sysfs-devices-power`).
            wishes.push((place, word(&latency_us.max(1).to_string())));
        }
    }
    wishes
}

/// The exit latency of the shallowest state that idles and is not forbidden, in µs.
fn shallowest_us(states: &[IdleState]) -> Option<u32> {
    let polls =
        |state: &IdleState| POLLING.iter().any(|name| state.name.eq_ignore_ascii_case(name));
    let idle = states.iter().filter(|state| !polls(state) && !state.is_disabled);
    idle.map(|state| state.latency_us).min()
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
pub(crate) fn governor_over(place: &Place) -> Option<Place> {
    let Place::Word(path) = place else { return None };
    let folder = path.strip_suffix("/energy_performance_preference")?;
    Some(Place::Word(format!("{folder}/scaling_governor")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shallowest_state_is_found_by_name_and_latency_and_not_by_its_number() {
        let state = |(name, latency_us, is_disabled): (&str, u32, bool)| IdleState {
            name: name.to_owned(),
            latency_us,
            is_disabled,
        };
        let of = |states: &[(&str, u32, bool)]| {
            shallowest_us(&states.iter().copied().map(state).collect::<Vec<_>>())
        };
        assert_eq!(of(&[("POLL", 0, false), ("C1", 2, false), ("C6", 85, false)]), Some(2));
        assert_eq!(of(&[("WFI", 1, false), ("cpu-sleep-0", 450, false)]), Some(1));
        assert_eq!(of(&[("snooze", 0, false), ("Nap", 3, false)]), Some(3));
        // Without the first C-state the next one has to be allowed, or the CPU would poll.
        assert_eq!(of(&[("POLL", 0, false), ("C1", 1, true), ("C1E", 4, false)]), Some(4));
        // ACPI's C1 may have no latency.
        assert_eq!(of(&[("POLL", 0, false), ("C1", 0, false)]), Some(0));
        assert_eq!(of(&[("POLL", 0, false)]), None);
        assert_eq!(of(&[]), None);
    }
}
