//! Every irqbalance that runs, and from which CPUs it excludes interrupts.
//!
//! ```text
//!   its sockets in /run/irqbalance ─┐
//!   the socket without a path ──────┼─▶ PID ─▶ called irqbalance, alive? ─▶ asked
//!   its unit's processes ───────────┘
//! ```
//!
//! One that was built without its socket is found by its unit alone. A process of another user than root that listens
//! where irqbalance would is ignored, with one warning.

use std::collections::BTreeMap;
use std::sync::Once;
use std::time::Instant;

use crate::discover::stat;
use crate::error::chain;
use crate::ids::Pid;
use crate::knobs::host::irqbalance::socket::{Line, PATIENCE, SOCKETS, ask, pid_of_socket};
use crate::knobs::host::places::Irqbalance;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Its processes as systemd knows them, in a tree of cgroup v2 and in systemd's own of v1.
const UNITS: [&str; 2] = [
    "sys/fs/cgroup/system.slice/irqbalance.service/cgroup.procs",
    "sys/fs/cgroup/systemd/system.slice/irqbalance.service/cgroup.procs",
];

/// The warning about a socket that is not irqbalance's is given once by each process of qmpin.
static WARNED: Once = Once::new();

/// Those that are not asked again, and why.
pub type Silent = BTreeMap<ProcessKey, String>;

/// Asks every irqbalance that runs; all together are given [`PATIENCE`]. `silent` are not asked again, and why not is
/// known of them.
#[must_use]
pub fn irqbalances(root: &SysRoot, silent: &Silent) -> Vec<Irqbalance> {
    let deadline = Instant::now() + PATIENCE;
    let mut found: BTreeMap<Pid, Option<Line>> = BTreeMap::new();
    let sockets = root.folder(SOCKETS).and_then(|folder| folder.names()).unwrap_or_default();
    let pids = sockets.iter().filter_map(|name| pid_of_socket(name));
    found.extend(pids.map(|pid| (pid, None)));
    for unit in UNITS {
        let processes = root.read(unit).unwrap_or_default();
        let pids = processes.lines().filter_map(|pid| pid.parse().ok());
        found.extend(pids.map(|pid| (Pid(pid), None)));
    }
    match Line::to_unnamed(root, deadline) {
        Ok(line) => found.extend(line.map(|line| (line.pid(), Some(line)))),
        Err(error) => WARNED.call_once(|| {
            tracing::warn!(
                "irqbalance's abstract socket is ignored: {error}; end that process if it is not meant to be there"
            );
        }),
    }
    let irqbalance = |(pid, line): (Pid, Option<Line>)| {
        let stat = stat::of(root, pid).ok()?;
        if stat.comm != "irqbalance" || stat.is_dead() {
            return None;
        }
        let process = ProcessKey { pid, start: stat.start };
        let ask =
            || line.map_or_else(|| ask(root, pid, deadline), |line| line.setup(root, deadline));
        let banned = match silent.get(&process) {
            Some(why) => Err(why.clone()),
            // It would answer when it goes on, when the connection is closed already.
            None if stat.is_stopped() => Err("it is stopped".to_owned()),
            None => ask().map(|setup| setup.banned).map_err(|error| chain(&error)),
        };
        Some(Irqbalance { process, banned })
    };
    found.into_iter().filter_map(irqbalance).collect()
}
