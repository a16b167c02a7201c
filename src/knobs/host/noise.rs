//! The knob *noise*: what the kernel does on every CPU now and then is done more rarely or not at all
//! (`Documentation/admin-guide/sysctl/{vm,kernel}.rst`).

use crate::cpuset::CpuSet;
use crate::knobs::host::kept_off;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};

/// Between two collections of per-CPU statistics, in seconds; the default is 1.
const STAT_INTERVAL_S: &str = "120";

/// The settings that it is about.
pub(crate) fn places() -> [Place; 3] {
    [
        Place::Word("proc/sys/kernel/numa_balancing".to_owned()),
        Place::CpuList("proc/sys/kernel/watchdog_cpumask".to_owned()),
        Place::Word("proc/sys/vm/stat_interval".to_owned()),
    ]
}

pub(crate) fn wishes(view: &HostView, memory: &HostMemory, off: &CpuSet) -> Vec<(Place, Value)> {
    if off.is_empty() {
        return Vec::new();
    }
    let wish = |place: &Place| {
        let (Place::Word(path) | Place::CpuList(path)) = place else { return None };
        let value = match (path.as_str(), memory.before(view, place)?) {
            // A value that is larger already stays.
            ("proc/sys/vm/stat_interval", Value::Word(now)) => {
                let rarer = now.parse::<u64>().is_ok_and(|now_s| now_s >= 120);
                (!rarer).then(|| Value::Word(STAT_INTERVAL_S.to_owned()))
            }
            // It moves pages, and makes every access to them fault, to learn who uses them.
            ("proc/sys/kernel/numa_balancing", Value::Word(now)) => {
                (now != "0").then(|| Value::Word("0".to_owned()))
            }
            ("proc/sys/kernel/watchdog_cpumask", Value::Cpus(before)) => {
                kept_off(before, off, &view.online).map(Value::Cpus)
            }
            _ => None,
        };
        Some((place.clone(), value?))
    };
    view.sysctls.iter().filter_map(wish).collect()
}
