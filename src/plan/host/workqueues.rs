//! The knob *workqueues*: unbound work is done elsewhere (`Documentation/core-api/workqueue.rst`). An
//! isolated partition does the same by itself; then there is nothing left to do.

use super::all_kept_off;
use crate::cpuset::CpuSet;
use crate::places::{HostView, Place, Value};

pub(super) fn wishes(
    view: &HostView,
    off: &CpuSet,
    original: &dyn Fn(&Place) -> Option<Value>,
) -> Vec<(Place, Value)> {
    all_kept_off(&view.workqueues, off, &view.online, original)
}
