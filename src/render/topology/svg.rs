//! `qmpin topology --svg FILE`: the same picture for a browser or a document.
//!
//! ```text
//!  headline
//!  node 0 · 64 GiB
//!  ┌ LLC 0 · 32 MiB ┐ ┌ LLC 1 … ┐     as many side by side as there is room for
//!  · free  4-5,16-17                  what the marks mean
//! ```
//!
//! All text is of one width, so that its length is known. Colour shows nothing that the marks do not.

use svg::Document;
use svg::node::element::{Group as Place, Rectangle, Style, Text, Title};

use super::grid::evenly;
use super::legend::Entry;
use super::marks::{FREE, Marks};
use super::{Cell, Group, Picture, bands, headline, legend};
use crate::ids::CpuId;
use crate::render::paint::{Line, Paint};
use crate::shown;

/// The width that groups are set in; a wider one stands alone.
const WIDTH: usize = 960;
const MARGIN: usize = 16;
/// From one line of text to the next, and how high a CPU's box is.
const LINE: usize = 20;
/// How wide a letter is: 0.6 em of 12.
const LETTER: f64 = 7.2;
const CPU_WIDTH: usize = 52;
/// Between cores, and from a group's frame to what is in it.
const GAP: usize = 6;
/// The most cores in a row of a group.
const COLUMNS_MAX: usize = 8;

const STYLE: &str = "text { font: 12px monospace; fill: #1b1b1b } .strong { font-weight: bold } \
.frame { fill: #f6f6f6; stroke: #9a9a9a } .core { fill: #ffffff; stroke: #9a9a9a }";

/// Fills on which black text reads well.
const VM_FILLS: [&str; 8] =
    ["#8dd3e0", "#f4c95d", "#e6a5d8", "#a3d977", "#f2a079", "#a9b8f0", "#d9cf8f", "#9fd8c0"];

impl Picture<'_> {
    /// Draws it as an SVG document; the terminal's width and colours do not count.
    #[must_use]
    pub fn draw_svg(&self) -> String {
        let marks = Marks::new(self);
        let entries = legend::entries(self, &marks);
        let mut sheet = Sheet { place: Place::new(), width: 0, bottom: MARGIN };
        let headline: Vec<String> = headline(self.topology).iter().map(Line::text).collect();
        sheet.line(&headline.join(", "), true);
        for (heading, groups) in self.nodes() {
            sheet.bottom += GAP;
            if !heading.is_empty() {
                sheet.line(&heading.join(" · "), true);
            }
            let blocks = groups.iter().map(|group| block(group, &marks, &entries)).collect();
            sheet.blocks(blocks);
        }
        sheet.bottom += LINE / 2;
        for entry in &entries {
            sheet.entry(entry);
        }
        for unknown in &self.topology.unknown {
            sheet.line(&format!("not known: {}: {}", unknown.what, unknown.reason), false);
        }
        let (width, height) = (sheet.width + MARGIN, sheet.bottom + MARGIN);
        let paper = Rectangle::new().set("width", width).set("height", height).set("fill", "white");
        let document = Document::new()
            .set("viewBox", (0, 0, width, height))
            .set("width", width)
            .set("height", height)
            .add(Style::new(STYLE))
            .add(paper)
            .add(sheet.place);
        format!("{document}\n")
    }
}

/// What is drawn already, and where it ends.
struct Sheet {
    place: Place,
    width: usize,
    bottom: usize,
}

impl Sheet {
    fn add(&mut self, place: impl Into<Box<dyn svg::Node>>, right: usize) {
        self.place = std::mem::take(&mut self.place).add(place);
        self.width = self.width.max(right);
    }

    fn line(&mut self, words: &str, is_strong: bool) {
        let words = &shown::line(words);
        let drawn = text(words, MARGIN, self.bottom);
        let drawn = if is_strong { drawn.set("class", "strong") } else { drawn };
        self.add(drawn, MARGIN + text_width(words));
        self.bottom += LINE;
    }

    /// Side by side, in rows.
    fn blocks(&mut self, blocks: Vec<Block>) {
        let mut left = MARGIN;
        let mut row_height = 0;
        for Block { place, width, height } in blocks {
            if left > MARGIN && left + width > WIDTH {
                left = MARGIN;
                self.bottom += row_height + GAP;
                row_height = 0;
            }
            let at = format!("translate({left} {})", self.bottom);
            self.add(place.set("transform", at), left + width);
            left += width + GAP;
            row_height = row_height.max(height);
        }
        self.bottom += row_height;
    }

    /// A mark as it is drawn, its name, and its CPUs.
    fn entry(&mut self, entry: &Entry) {
        let Entry { mark, paint, name, cpus } = entry;
        if *mark != ' ' {
            let sample = Rectangle::new()
                .set("x", MARGIN)
                .set("y", self.bottom)
                .set("width", LINE)
                .set("height", LINE - 4)
                .set("class", "core")
                .set("style", style(*paint));
            self.add(sample, MARGIN + LINE);
            self.add(text(&mark.to_string(), MARGIN + GAP, self.bottom), 0);
        }
        let left = MARGIN + LINE + GAP;
        let words =
            if cpus.is_empty() { format!("{name}: none") } else { format!("{name}: {cpus}") };
        self.add(text(&words, left, self.bottom), left + text_width(&words));
        self.bottom += LINE;
    }
}

/// A group's frame with its cores, and how large it is.
struct Block {
    place: Place,
    width: usize,
    height: usize,
}

fn block(group: &Group, marks: &Marks<'_>, entries: &[Entry]) -> Block {
    let bands = bands(&group.cells);
    let longest = bands.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0);
    let columns = evenly(longest, COLUMNS_MAX);
    let mut place = Place::new().add(text(&group.title, GAP, 2));
    let mut width = text_width(&group.title).max(columns * (CPU_WIDTH + GAP));
    let mut bottom = LINE + 2;
    for (kind, cells) in bands {
        if let Some(kind) = kind {
            place = place.add(text(kind, GAP, bottom));
            width = width.max(text_width(kind));
            bottom += LINE;
        }
        for row in cells.chunks(columns) {
            for (column, cell) in row.iter().enumerate() {
                let left = GAP + column * (CPU_WIDTH + GAP);
                place = place.add(core(cell, marks, entries, left, bottom));
            }
            let threads = row.iter().map(|cell| cell.cpus.len()).max().unwrap_or(0);
            bottom += threads * LINE + GAP;
        }
    }
    let width = width + GAP;
    let frame = Rectangle::new()
        .set("width", width)
        .set("height", bottom)
        .set("rx", 4)
        .set("class", "frame");
    Block { place: Place::new().add(frame).add(place), width, height: bottom }
}

/// A core: a box with one in it for each thread.
fn core(cell: &Cell, marks: &Marks<'_>, entries: &[Entry], left: usize, top: usize) -> Place {
    let mut place = Place::new();
    for (at, cpu) in cell.cpus.iter().enumerate() {
        let top = top + at * LINE;
        let (mark, paint) = marks.of(cpu);
        let thread = Rectangle::new()
            .set("x", left)
            .set("y", top)
            .set("width", CPU_WIDTH)
            .set("height", LINE)
            .set("class", "core")
            .set("style", style(paint));
        let digits = marks.digits;
        // Other blanks at the beginning are not drawn.
        let words = format!("{:>digits$} {mark}", cpu.index()).replace(' ', "\u{a0}");
        let indent = CPU_WIDTH.saturating_sub(text_width(&words)) / 2;
        place = place.add(
            Place::new().add(Title::new(title(cpu, marks, entries))).add(thread).add(drawn(
                &words,
                left + indent,
                top + 2,
            )),
        );
    }
    place
}

/// `CPU 12: VM 100`.
fn title(cpu: CpuId, marks: &Marks<'_>, entries: &[Entry]) -> String {
    let whose = marks.owner(cpu).map(|vm| format!("VM {vm}"));
    let named = || entries.iter().find(|entry| entry.cpus.contains(cpu)).map(|entry| &entry.name);
    let whose = whose.or_else(|| named().cloned()).unwrap_or_else(|| FREE.to_string());
    shown::line(&format!("CPU {}: {whose}", cpu.index())).into_owned()
}

/// One line, whose upper edge is given. Hidden characters are escaped: XML allows few of them.
fn text(words: &str, left: usize, top: usize) -> Text {
    drawn(&shown::line(words), left, top)
}

/// The same of words that are qmpin's own.
fn drawn(words: &str, left: usize, top: usize) -> Text {
    Text::new(words).set("x", left).set("y", top + 14)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss // a line of text has some hundred letters
)]
fn text_width(words: &str) -> usize {
    (words.chars().count() as f64 * LETTER).ceil() as usize
}

fn style(paint: Paint) -> String {
    let fill = match paint {
        Paint::Plain | Paint::Strong | Paint::Faint => "#ffffff",
        Paint::Host => "#c4c4c4",
        Paint::Shared => "#e4e4e4",
        Paint::Vm(at) => VM_FILLS[at % VM_FILLS.len()],
    };
    format!("fill: {fill}")
}
