//! The knob *workqueues*: unbound work is done elsewhere (`Documentation/core-api/workqueue.rst`). An
//! isolated partition does the same by itself; then there is nothing left to do.

use crate::cpuset::CpuSet;
use crate::knobs::host::all_kept_off;
use crate::knobs::host::places::{HostView, Place, Value};

pub(crate) fn wishes(
    view: &HostView,
    off: &CpuSet,
    original: &dyn Fn(&Place) -> Option<Value>,
) -> Vec<(Place, Value)> {
    all_kept_off(&view.workqueues, off, &view.online, original)
}
