//! `qmpin topology`.

use super::args::{Global, TopologyArgs, host_policy};
use super::{Answer, output};
use crate::discover::read_topology;
use crate::error::Failure;

pub(super) fn run(global: &Global, args: &TopologyArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let _policy = host_policy(global, &root)?;
    let topology = read_topology(&root)?;
    output::text(&format!("{} CPUs\n", topology.cpus.len()))?;
    Ok(Answer::Done)
}
