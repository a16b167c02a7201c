//! The knob *kthreads*: kernel threads that can be moved are elsewhere.
//!
//! An isolated partition makes the kernel set all of them to all other CPUs
//! (`kernel/cgroup/cpuset.c: cpuset_update_tasks_cpumask`), those with a mask of their own as well. So
//! each is put on what it had before, without the VM's CPUs, also where it never was on those.

use crate::cpuset::CpuSet;
use crate::knobs::host::kept_off;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};

/// Where these threads are to be: the kernel's, or users' that had a mask of their own.
pub(crate) fn wishes(
    view: &HostView,
    memory: &HostMemory,
    threads: &[Place],
    off: &CpuSet,
) -> Vec<(Place, Value)> {
    if off.is_empty() {
        return Vec::new();
    }
    let wish = |place: &Place| {
        let before = memory.before(view, place)?.cpus()?;
        let rest = kept_off(&before, off, &view.online).unwrap_or(before);
        Some((place.clone(), Value::Cpus(rest)))
    };
    threads.iter().filter_map(wish).collect()
}
