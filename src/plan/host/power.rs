//! The knob *power*: the VM's CPUs run at full frequency and wake up at once.
//!
//! Idle states deeper than the first are forbidden, and not idling as such: a CPU that polls takes from
//! its SMT sibling and from the package's power budget.

use crate::cpuset::CpuSet;
use crate::places::{HostView, Place, Value};

/// The governor that asks for the highest frequency (`Documentation/admin-guide/pm/cpufreq.rst`).
const GOVERNOR: &str = "performance";

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
