//! `qmpin topology`.

use std::io::{IsTerminal as _, stdout};

use super::args::{Global, TopologyArgs, host_policy};
use super::{Answer, output};
use crate::cpuset::CpuSet;
use crate::discover::{all_leases, boot_id, live_leases, read_topology};
use crate::error::Failure;
use crate::policy::CpuChoice;
use crate::render::{Color, Owners, Picture, TopologyDocument};

/// Where nobody says how wide the terminal is.
const WIDTH_DEFAULT: usize = 80;

pub(super) fn run(global: &Global, args: &TopologyArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let policy = host_policy(global, &root)?;
    let topology = read_topology(&root)?;
    let state = global.state(&root);
    // Whether a captured machine's VMs are alive cannot be told: it is shown as it was.
    let leases = match boot_id(&root) {
        Ok(boot_id) if root.is_live() => live_leases(&state, &boot_id),
        _ => all_leases(&state),
    };
    let owners: Owners = leases.into_iter().map(|lease| (lease.vm, lease.exclusive)).collect();
    if args.json {
        output::json(&TopologyDocument::new(&topology, &owners))?;
        return Ok(Answer::Done);
    }
    let reserved = match policy.host.reserved.value {
        CpuChoice::Cpus(cpus) => cpus,
        CpuChoice::Auto => topology.cores.first().map_or(CpuSet::EMPTY, |core| core.cpus),
    };
    let picture = Picture {
        topology: &topology,
        owners: &owners,
        reserved,
        shared: policy.host.shared.value.unwrap_or(CpuSet::EMPTY),
        width: terminal_size::terminal_size().map_or(WIDTH_DEFAULT, |(width, _)| width.0.into()),
        color: color(),
    };
    output::text(&picture.draw())?;
    for unknown in &topology.unknown {
        tracing::debug!("{} is not known: {}", unknown.what, unknown.reason);
    }
    Ok(Answer::Done)
}

/// Colour for a terminal, unless `NO_COLOR` is set to anything (<https://no-color.org>).
fn color() -> Color {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if stdout().is_terminal() && !unwanted { Color::Always } else { Color::Never }
}
