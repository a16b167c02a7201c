//! The knob *workqueues*: unbound work is done elsewhere (`Documentation/core-api/workqueue.rst`). An
//! isolated partition does the same by itself; then there is nothing left to do.

use crate::cpuset::CpuSet;
use crate::knobs::host::kept_off;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{HostView, Place, Value};

pub(crate) fn wishes(view: &HostView, memory: &HostMemory, off: &CpuSet) -> Vec<(Place, Value)> {
    let wish = |place: &Place| {
        let rest = kept_off(&memory.before(view, place)?.cpus()?, off, &view.online)?;
        Some((place.clone(), Value::Cpus(rest)))
    };
    view.workqueues.iter().filter_map(wish).collect()
}
