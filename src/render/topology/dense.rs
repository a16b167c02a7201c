//! The picture of a large machine: the same cells without frames, so that 256 CPUs fit a screen.
//!
//! ```text
//! ── LLC 0 · 32 MiB ─────────────────────
//!   0#   1·   2A   3A   4A   5A   6A   7A
//! 128# 129· 130A 131A 132A 133A 134A 135A
//! ```

use crate::render::paint::{Line, Paint};

use super::grid::{evenly, side_by_side};
use super::marks::Marks;
use super::{Cell, Group, bands};

const GAP: usize = 2;

/// The groups, side by side where they fit.
pub(super) fn draw(groups: &[Group], marks: &Marks<'_>, width: usize) -> Vec<Line> {
    let blocks: Vec<_> = groups.iter().map(|group| block(group, marks, width)).collect();
    side_by_side(&blocks, GAP, width)
}

fn block(group: &Group, marks: &Marks<'_>, width: usize) -> Vec<Line> {
    let cell_width = marks.digits + 1;
    let bands = bands(&group.cells);
    let longest = bands.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0);
    let columns = evenly(longest, (width + 1) / (cell_width + 1));
    let block_width = columns * (cell_width + 1) - 1;

    let mut lines = vec![heading(&group.title, "── ", block_width)];
    for (kind, cells) in bands {
        if let Some(kind) = kind {
            lines.push(heading(kind, "", 0));
        }
        let stacked = cells.iter().any(|cell| cell.cpus.len() > 1);
        for (at, row) in cells.chunks(columns).enumerate() {
            if at > 0 && stacked {
                // Without it a reader could not see which of the lines are siblings.
                lines.push(Line::painted(Paint::Faint, "╌".repeat(block_width)));
            }
            lines.append(&mut rows(row, marks));
        }
    }
    lines
}

fn rows(row: &[Cell], marks: &Marks<'_>) -> Vec<Line> {
    let threads = row.iter().map(|cell| cell.cpus.len()).max().unwrap_or(0);
    let line = |thread| {
        let mut line = Line::default();
        for (at, cell) in row.iter().enumerate() {
            if at > 0 {
                line.push(Paint::Plain, " ");
            }
            line.append(marks.cell(cell.cpus.iter().nth(thread), "", "", ""));
        }
        line
    };
    (0..threads).map(line).collect()
}

/// A title on a line as wide as the block.
fn heading(title: &str, before: &str, width: usize) -> Line {
    let mut line = Line::painted(Paint::Faint, before);
    line.push(Paint::Plain, title);
    let used = line.width() + 1;
    if used < width {
        line.push(Paint::Faint, format!(" {}", "─".repeat(width - used)));
    }
    line
}
