//! The knob *irqs*: interrupts go to CPUs that are no VM's.

use super::all_kept_off;
use crate::cpuset::CpuSet;
use crate::places::{HostView, Place, Value};

pub(super) fn wishes(
    view: &HostView,
    off: &CpuSet,
    original: &dyn Fn(&Place) -> Option<Value>,
) -> Vec<(Place, Value)> {
    all_kept_off(&view.irqs, off, &view.online, original)
}
