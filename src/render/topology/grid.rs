//! The framed picture: a cell per core, its threads one below the other.
//!
//! ```text
//! ┌ LLC 0 · 32 MiB ───────┬───────┐
//! │  0 #  │  1 ·  │  2 A  │  3 A  │
//! │ 12 #  │ 13 ·  │ 14 A  │ 15 A  │
//! └───────┴───────┴───────┴───────┘
//! ```

use crate::render::paint::{Line, Paint};

use super::marks::Marks;
use super::{Cell, Group, bands};

/// Columns between two frames that stand side by side.
const GAP: usize = 2;

/// The groups' frames, side by side where they fit.
pub(super) fn draw(groups: &[Group], marks: &Marks<'_>, width: usize) -> Vec<Line> {
    let frames: Vec<_> = groups.iter().map(|group| frame(group, marks, width)).collect();
    side_by_side(&frames, GAP, width)
}

/// Blocks of lines in rows, as many to a row as the width allows. Rows of equal length look better
/// than full ones and a short last one.
pub(super) fn side_by_side(blocks: &[Vec<Line>], gap: usize, width: usize) -> Vec<Line> {
    let block_width = |block: &Vec<Line>| block.iter().map(Line::width).max().unwrap_or(0);
    let widest = blocks.iter().map(block_width).max().unwrap_or(0);
    let fit = (width + gap) / (widest + gap);
    let per_row = evenly(blocks.len(), fit);
    let mut lines: Vec<Line> = Vec::new();
    for row in blocks.chunks(per_row) {
        let mut joined = vec![Line::default(); row.iter().map(Vec::len).max().unwrap_or(0)];
        for (at, block) in row.iter().enumerate() {
            for (line, piece) in joined.iter_mut().zip(block) {
                line.pad_to(at * (widest + gap));
                line.append(piece.clone());
            }
        }
        lines.append(&mut joined);
    }
    lines
}

/// How many of `number` things go in a row that has room for `fit`, so that rows are equally long.
pub(super) fn evenly(number: usize, fit: usize) -> usize {
    let rows = number.max(1).div_ceil(fit.max(1));
    number.max(1).div_ceil(rows)
}

fn frame(group: &Group, marks: &Marks<'_>, width: usize) -> Vec<Line> {
    let bands = bands(&group.cells);
    let longest = bands.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0);
    let narrow = marks.digits + 4;
    let columns = evenly(longest, width.saturating_sub(1) / (narrow + 1));
    let labels = labels(&group.title, &bands);
    // The cells of a small group grow until the labels fit between its corners.
    let room = |label: &String| (label.chars().count() + 3).div_ceil(columns) - 1;
    let wanted = labels.iter().map(room).max().unwrap_or(0);
    let allowed = (width.saturating_sub(1) / columns).saturating_sub(1);
    let rule = Rule { columns, cell_width: wanted.min(allowed).max(narrow) };

    let mut lines = Vec::new();
    for (at, ((_, cells), label)) in bands.iter().zip(labels).enumerate() {
        let [left, joint, right] =
            if at == 0 { ['┌', '┬', '┐'] } else { ['├', '┼', '┤'] };
        if let Some(line) = rule.line(left, joint, right, &label) {
            lines.push(line);
        } else {
            lines.push(Line::plain(label));
            lines.extend(rule.line(left, joint, right, ""));
        }
        for (at, row) in cells.chunks(columns).enumerate() {
            if at > 0 {
                lines.extend(rule.line('├', '┼', '┤', ""));
            }
            lines.append(&mut rows(row, &rule, marks));
        }
    }
    lines.extend(rule.line('└', '┴', '┘', ""));
    lines
}

/// What stands above each band: the group's title with the first kind, then the other kinds.
fn labels(title: &str, bands: &[(Option<&'static str>, &[Cell])]) -> Vec<String> {
    let label = |(at, (kind, _)): (usize, &(Option<&str>, _))| match (at, *kind) {
        (0, None) => title.to_owned(),
        (0, Some(kind)) => format!("{title} · {kind}"),
        (_, kind) => kind.unwrap_or_default().to_owned(),
    };
    bands.iter().enumerate().map(label).collect()
}

/// One line for each thread of the cores in a row.
fn rows(row: &[Cell], rule: &Rule, marks: &Marks<'_>) -> Vec<Line> {
    let threads = row.iter().map(|cell| cell.cpus.len()).max().unwrap_or(0);
    let after = " ".repeat(rule.cell_width - marks.digits - 3);
    let line = |thread| {
        let mut line = Line::painted(Paint::Faint, "│");
        for column in 0..rule.columns {
            let cpu = row.get(column).and_then(|cell| cell.cpus.iter().nth(thread));
            line.append(marks.cell(cpu, " ", " ", &after));
            line.push(Paint::Faint, "│");
        }
        line
    };
    (0..threads).map(line).collect()
}

/// The horizontal lines of a frame.
struct Rule {
    columns: usize,
    cell_width: usize,
}

impl Rule {
    /// A line with a label in it, or `None` where the label is too long.
    fn line(&self, left: char, joint: char, right: char, label: &str) -> Option<Line> {
        let cells = vec!["─".repeat(self.cell_width); self.columns];
        let cells = cells.join(&joint.to_string());
        let mut line = Line::painted(Paint::Faint, left);
        let label = if label.is_empty() { String::new() } else { format!(" {label} ") };
        let length = label.chars().count();
        if length > cells.chars().count() {
            return None;
        }
        line.push(Paint::Plain, label);
        line.push(Paint::Faint, cells.chars().skip(length).collect::<String>());
        line.push(Paint::Faint, right);
        Some(line)
    }
}
