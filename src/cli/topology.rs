//! `qmpin topology`.

use std::fs;
use std::io::{self, IsTerminal as _, stdout};
use std::path::Path;

use super::args::{Global, TopologyArgs, host_policy};
use super::{Answer, output};
use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::{all_leases, boot_id, live_leases, read_topology};
use crate::error::{Failure, Kind};
use crate::knobs::affinity::limit::promises_beside;
use crate::knobs::ground::Host;
use crate::policy::Policy;
use crate::promises::Promises;
use crate::render::{Color, Owners, Picture, TopologyDocument};
use crate::sched::Kernel;
use crate::systemd::SystemBus;
use crate::topology::Topology;

/// The width of a terminal that does not report one.
const WIDTH_DEFAULT: usize = 80;

pub(super) fn run(global: &Global, args: &TopologyArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let policy = host_policy(global, &root)?;
    let topology = read_topology(&root)?;
    let state = global.state(&root);
    // Whether a captured machine's VMs are alive cannot be configured: it is shown as it was.
    let leases = match boot_id(&root) {
        Ok(boot_id) if root.is_live() => live_leases(&root, &state, &boot_id),
        _ => all_leases(&state),
    };
    let owners: Owners = leases.into_iter().map(|lease| (lease.vm, lease.exclusive)).collect();
    if args.json {
        output::json(&TopologyDocument::new(&topology, &owners))?;
        return Ok(Answer::Done);
    }
    let cgroups = CgroupTree::of(&root);
    let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    let promises = boot_id(&root).map(|boot_id| promises_beside(host, &state, &boot_id));
    let promises = promises.unwrap_or_default();
    let sheet = Sheet { topology: &topology, owners: &owners, policy: &policy };
    let picture = picture(&sheet, &promises);
    match &args.svg {
        None => output::painted(&picture.draw())?,
        Some(path) => put_svg(path, &picture)?,
    }
    for unknown in &topology.unknown {
        tracing::debug!("{} is not known: {}", unknown.what, unknown.reason);
    }
    Ok(Answer::Done)
}

/// What is drawn: the machine, who has its CPUs, and what the host keeps.
pub(super) struct Sheet<'a> {
    pub(super) topology: &'a Topology,
    pub(super) owners: &'a Owners,
    pub(super) policy: &'a Policy,
}

/// The picture of a machine, as wide as the terminal.
pub(super) fn picture<'a>(sheet: &Sheet<'a>, promises: &'a Promises) -> Picture<'a> {
    let Sheet { topology, owners, policy } = *sheet;
    let first_core = || topology.cores.first().map_or(CpuSet::EMPTY, |core| core.cpus);
    Picture {
        topology,
        owners,
        reserved: policy.host.reserved.value.cpus().unwrap_or_else(first_core),
        shared: policy.host.shared.value.unwrap_or(CpuSet::EMPTY),
        promises,
        width: terminal_size::terminal_size().map_or(WIDTH_DEFAULT, |(width, _)| width.0.into()),
        color: color(),
    }
}

/// Writes a picture as SVG to a file; `-` is standard output.
///
/// # Errors
/// A failure that names the file.
pub(super) fn put_svg(path: &Path, picture: &Picture<'_>) -> Result<(), Failure> {
    if path.as_os_str() == "-" {
        return output::document(&picture.draw_svg());
    }
    fs::write(path, picture.draw_svg()).map_err(|error| not_written(path, &error))
}

fn not_written(path: &Path, error: &io::Error) -> Failure {
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied => Kind::Permission,
        io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => Kind::Usage,
        _ => Kind::Partial,
    };
    Failure::new(kind, format!("could not write the picture {}: {error}", path.display()))
        .hint("`--svg FILE` wants a file in a folder that is there; `-` is standard output")
}

/// Colour for a terminal, unless `NO_COLOR` is set to anything (<https://no-color.org>).
fn color() -> Color {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if stdout().is_terminal() && !unwanted { Color::Always } else { Color::Never }
}
