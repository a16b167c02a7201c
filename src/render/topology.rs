//! The machine, for `qmpin topology`: [`TopologyDocument`] for programs, [`Picture`] for people.
//!
//! ```text
//!  Picture ─ headline ─ node ─┬─ LLC group: a frame, a cell per core   grid.rs
//!                             └─ LLC group …                           dense.rs on large machines
//!          ─ legend, CPUs offline, what is not known                   legend.rs
//!  the same as an SVG document                                         svg.rs
//! ```

mod dense;
mod document;
mod grid;
mod legend;
mod marks;
mod svg;

use crate::cpuset::CpuSet;
use crate::ids::NodeId;
use crate::promises::Promises;
use crate::topology::{Core, CoreKind, Llc, Node, Topology};

use super::owners::Owners;
use super::paint::{Color, Line, Paint, flow};
use marks::Marks;

pub use document::TopologyDocument;

/// The fewest columns that are drawn for; a narrower terminal gets lines of this width.
const WIDTH_MIN: usize = 24;

/// Above so many online CPUs the cells lose their frames.
const FRAMED_CPUS_MAX: usize = 96;

/// The machine as a picture in the terminal.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// The machine.
    pub topology: &'a Topology,
    /// Who owns what.
    pub owners: &'a Owners,
    /// The CPUs that never go to a VM.
    pub reserved: CpuSet,
    /// The CPUs where emulator and iothreads of all VMs may meet.
    pub shared: CpuSet,
    /// What other programs count on.
    pub promises: &'a Promises,
    /// The terminal's width in columns.
    pub width: usize,
    /// Whether to write colours.
    pub color: Color,
}

/// The cores to draw below one heading.
struct Group {
    title: String,
    cells: Vec<Cell>,
}

/// A core's threads, or a lone CPU of which no core is known.
struct Cell {
    cpus: CpuSet,
    kind: Option<CoreKind>,
}

impl Picture<'_> {
    /// Draws it. No line is wider than the width, and each ends in a newline.
    #[must_use]
    pub fn draw(&self) -> String {
        let width = self.width.max(WIDTH_MIN);
        let marks = Marks::new(self);
        let mut lines = flow(headline(self.topology), ", ", 2, width);
        for (heading, groups) in self.nodes() {
            lines.push(Line::default());
            if !heading.is_empty() {
                let mut pieces = heading.into_iter();
                let first = pieces.next().map(|name| Line::painted(Paint::Strong, name));
                let pieces = first.into_iter().chain(pieces.map(Line::plain)).collect();
                lines.append(&mut flow(pieces, " · ", 2, width));
            }
            if self.topology.online().len() > FRAMED_CPUS_MAX {
                lines.append(&mut dense::draw(&groups, &marks, width));
            } else {
                lines.append(&mut grid::draw(&groups, &marks, width));
            }
        }
        lines.push(Line::default());
        lines.append(&mut legend::draw(self, &marks, width));
        let mut text = String::new();
        for line in lines {
            line.write(&mut text, width, self.color);
        }
        text
    }

    /// The nodes with their LLC groups; on a machine that does not say its nodes, one without a name.
    fn nodes(&self) -> Vec<(Vec<String>, Vec<Group>)> {
        let topology = self.topology;
        let online = topology.online();
        let mut nodes: Vec<_> = topology
            .nodes
            .iter()
            .map(|node| (node_heading(topology, node), self.groups(&node.cpus, Some(node.node))))
            .collect();
        let on_nodes = topology.nodes.iter().fold(CpuSet::EMPTY, |all, node| all | node.cpus);
        let nowhere = online - on_nodes;
        if !nowhere.is_empty() {
            let heading =
                if nodes.is_empty() { Vec::new() } else { vec!["on no known node".to_owned()] };
            nodes.push((heading, self.groups(&nowhere, None)));
        }
        nodes
    }

    /// The LLC groups among `cpus`, and at the end the CPUs of which no LLC is known.
    fn groups(&self, cpus: &CpuSet, node: Option<NodeId>) -> Vec<Group> {
        let topology = self.topology;
        let here = |llc: &&Llc| llc.cpus.intersects(cpus);
        let llcs: Vec<&Llc> = topology.llcs.iter().filter(here).collect();
        let lone = |llc: &&Llc| {
            llc.cpus
                .first()
                .and_then(|cpu| topology.core_of(cpu))
                .is_some_and(|core| core.cpus == llc.cpus)
        };
        let mut groups = Vec::new();
        if llcs.len() > 1 && llcs.iter().all(lone) {
            // No cache is shared, so a frame for each core would say nothing.
            let size = llcs.iter().map(|llc| llc.size_bytes).reduce(|a, b| a.filter(|_| a == b));
            let each = size.flatten().map(|bytes| format!(", {} each", size_text(bytes)));
            groups.push(Group {
                title: format!("no shared cache{}", each.unwrap_or_default()),
                cells: self.cells(cpus),
            });
            return groups;
        }
        for llc in &llcs {
            let size = llc.size_bytes.map(|bytes| format!(" · {}", size_text(bytes)));
            let cut = match node {
                Some(_) if !llc.cpus.is_subset(cpus) => " (in part)",
                _ => "",
            };
            let title = format!("LLC {}{}{cut}", llc.llc, size.unwrap_or_default());
            groups.push(Group { title, cells: self.cells(&(llc.cpus & *cpus)) });
        }
        let rest = llcs.iter().fold(*cpus, |rest, llc| rest - llc.cpus);
        if !rest.is_empty() {
            groups.push(Group { title: "no known LLC".to_owned(), cells: self.cells(&rest) });
        }
        groups
    }

    /// The cores of these CPUs in the order of their first CPUs, performance cores first.
    fn cells(&self, cpus: &CpuSet) -> Vec<Cell> {
        let mut left = *cpus;
        let mut cells = Vec::new();
        for cpu in cpus.iter() {
            if !left.contains(cpu) {
                continue;
            }
            let core: Option<&Core> = self.topology.core_of(cpu);
            let threads = core.map_or_else(|| CpuSet::single(cpu), |core| core.cpus & *cpus);
            left -= threads;
            let kind = self.topology.cpu(cpu).and_then(|cpu| cpu.kind);
            cells.push(Cell { cpus: threads, kind });
        }
        cells.sort_by_key(|cell| cell.kind);
        cells
    }
}

/// The cells kind by kind, each with the kind's name where the machine has kinds.
fn bands(cells: &[Cell]) -> Vec<(Option<&'static str>, &[Cell])> {
    cells
        .chunk_by(|a, b| a.kind == b.kind)
        .map(|band| (band.first().and_then(|cell| cell.kind).map(kind_name), band))
        .collect()
}

fn kind_name(kind: CoreKind) -> &'static str {
    match kind {
        CoreKind::Performance => "performance cores",
        CoreKind::Efficiency => "efficiency cores",
    }
}

/// `12 cores`, `24 CPUs`, `2 LLC groups`, `1 node`.
fn headline(topology: &Topology) -> Vec<Line> {
    let cores = |kind| topology.cores.iter().filter(|core| core.kind == Some(kind)).count();
    let (performance, efficiency) = (cores(CoreKind::Performance), cores(CoreKind::Efficiency));
    let mut parts = Vec::new();
    if !topology.cores.is_empty() {
        let mut cores = count(topology.cores.len(), "core");
        if performance > 0 && efficiency > 0 {
            cores.push_str(&format!(" ({performance} performance, {efficiency} efficiency)"));
        }
        parts.push(cores);
    }
    parts.push(count(topology.online().len(), "CPU"));
    if !topology.llcs.is_empty() {
        parts.push(count(topology.llcs.len(), "LLC group"));
    }
    if !topology.nodes.is_empty() {
        parts.push(count(topology.nodes.len(), "node"));
    }
    let packages = packages(topology, &topology.online());
    if packages.len() > 1 {
        parts.push(count(packages.len(), "package"));
    }
    parts.into_iter().map(|part| Line::painted(Paint::Strong, part)).collect()
}

/// `node 0`, `package 0`, `64 GiB`, `distances 10 32`.
fn node_heading(topology: &Topology, node: &Node) -> Vec<String> {
    let mut heading = vec![format!("node {}", node.node)];
    let of_node = packages(topology, &node.cpus);
    if let [package] = of_node[..]
        && packages(topology, &topology.online()).len() > 1
    {
        heading.push(format!("package {package}"));
    }
    match node.memory_bytes {
        Some(0) => heading.push("no memory".to_owned()),
        Some(bytes) => heading.push(size_text(bytes)),
        None => {}
    }
    if node.cpus.is_empty() {
        heading.push("no CPUs".to_owned());
    }
    if node.distances.len() > 1 {
        let distances: Vec<String> = node.distances.iter().map(ToString::to_string).collect();
        heading.push(format!("distances {}", distances.join(" ")));
    }
    heading
}

fn packages(topology: &Topology, cpus: &CpuSet) -> Vec<u32> {
    let mut packages: Vec<u32> =
        cpus.iter().filter_map(|cpu| topology.cpu(cpu).and_then(|cpu| cpu.package)).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn count(number: usize, what: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {what}{s}")
}

/// `512 KiB`, `32 MiB`, `62.7 GiB`: the largest unit of which there is one, with a decimal where the
/// number is not whole.
fn size_text(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] =
        [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let (name, unit) = UNITS.into_iter().find(|(_, unit)| bytes >= *unit).unwrap_or(("bytes", 1));
    let tenths = (u128::from(bytes) * 10 + u128::from(unit) / 2) / u128::from(unit);
    match tenths % 10 {
        0 => format!("{} {name}", tenths / 10),
        tenth => format!("{}.{tenth} {name}", tenths / 10),
    }
}
