//! Sets the CPUs from which irqbalance excludes interrupts, and reads back.

use std::io;
use std::time::Instant;

use crate::cpuset::CpuSet;
use crate::discover::is_alive;
use crate::error::chain;
use crate::knobs::host::irqbalance::socket::{PATIENCE, ask, tell};
use crate::knobs::host::outcome::HostOutcome;
use crate::knobs::host::places::Value;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

pub(crate) fn write(
    root: &SysRoot,
    online: &CpuSet,
    process: ProcessKey,
    banned: &CpuSet,
) -> HostOutcome {
    // The number may be another's by now; that other would not be called by this name.
    if !is_alive(root, process) {
        return HostOutcome::Gone;
    }
    let deadline = Instant::now() + PATIENCE;
    let read_back =
        tell(root, process.pid, banned, deadline).and_then(|()| ask(root, process.pid, deadline));
    match read_back {
        Ok(setup) if Value::Cpus(setup.banned).same(&Value::Cpus(*banned), online) => {
            HostOutcome::Done
        }
        Ok(setup) => HostOutcome::Pending { within_s: setup.interval_s },
        Err(_) if !is_alive(root, process) => HostOutcome::Gone,
        Err(error) => HostOutcome::Refused { error: io::Error::other(chain(&error)) },
    }
}
