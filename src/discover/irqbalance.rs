//! Every irqbalance that runs, and which CPUs it keeps interrupts off.
//!
//! ```text
//!   its sockets in /run/irqbalance ─┐
//!   the socket without a path ──────┼─▶ PID ─▶ called irqbalance, alive? ─▶ asked
//!   its unit's processes ───────────┘
//! ```
//!
//! One that was built without its socket is found by its unit alone.

use std::collections::BTreeMap;

use super::stat;
use crate::error::chain;
use crate::ids::Pid;
use crate::irqbalance::{Line, SOCKETS, ask, pid_of_socket};
use crate::places::Irqbalance;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Its processes as systemd knows them, in a tree of cgroup v2 and in systemd's own of v1.
const UNITS: [&str; 2] = [
    "sys/fs/cgroup/system.slice/irqbalance.service/cgroup.procs",
    "sys/fs/cgroup/systemd/system.slice/irqbalance.service/cgroup.procs",
];

/// Asks every irqbalance that runs. `silent` are not asked again, and why not is known of them.
#[must_use]
pub fn irqbalances(root: &SysRoot, silent: &BTreeMap<ProcessKey, String>) -> Vec<Irqbalance> {
    let mut found: BTreeMap<Pid, Option<Line>> = BTreeMap::new();
    let sockets = root.folder(SOCKETS).and_then(|folder| folder.names()).unwrap_or_default();
    let pids = sockets.iter().filter_map(|name| pid_of_socket(name));
    found.extend(pids.map(|pid| (pid, None)));
    for unit in UNITS {
        let processes = root.read(unit).unwrap_or_default();
        let pids = processes.lines().filter_map(|pid| pid.parse().ok());
        found.extend(pids.map(|pid| (Pid(pid), None)));
    }
    found.extend(Line::to_unnamed(root).map(|line| (line.pid(), Some(line))));
    let irqbalance = |(pid, line): (Pid, Option<Line>)| {
        let stat = stat::read(root, &format!("proc/{pid}/stat")).ok()?;
        if stat.comm != "irqbalance" || stat.is_dead() {
            return None;
        }
        let process = ProcessKey { pid, start: stat.start };
        let ask = || line.map_or_else(|| ask(root, pid), |line| line.setup(root));
        let banned = match silent.get(&process) {
            Some(why) => Err(why.clone()),
            // It would answer when it goes on, and nobody would listen any more.
            None if stat.is_stopped() => Err("it is stopped".to_owned()),
            None => ask().map(|setup| setup.banned).map_err(|error| chain(&error)),
        };
        Some(Irqbalance { process, banned })
    };
    found.into_iter().filter_map(irqbalance).collect()
}
