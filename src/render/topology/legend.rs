//! Below the picture: what the marks mean, which CPUs are offline, what is not known.
//!
//! ```text
//! · free                   1-5,13-17
//! # reserved for the host  0,12
//! A VM 100                 6-11,18-23
//! ```

use crate::cpuset::CpuSet;
use crate::promises::{Promise, Strength};
use crate::render::paint::{Line, Paint, flow};
use crate::shown;

use super::marks::{FREE, HARD, ISOLATED, Marks, OTHERS, RESERVED, SHARED, SOFT, letter};
use super::{Picture, count};

/// So many VMs get a line each with their CPUs; more are set one after the other.
const VMS_WITH_LINES_MAX: usize = 8;

/// So many promises to other programs get a line each.
const PROMISES_WITH_LINES_MAX: usize = 8;

/// So many unknown things are written out.
const UNKNOWN_MAX: usize = 4;

/// A mark and what it means; that of offline CPUs, which have none, is a blank.
pub(super) struct Entry {
    pub(super) mark: char,
    pub(super) paint: Paint,
    pub(super) name: String,
    pub(super) cpus: CpuSet,
}

/// All of them.
pub(super) fn entries(picture: &Picture<'_>, marks: &Marks<'_>) -> Vec<Entry> {
    let host = of_the_host(picture, marks);
    host.into_iter().chain(vms(picture)).chain(offline(picture)).collect()
}

pub(super) fn draw(picture: &Picture<'_>, marks: &Marks<'_>, width: usize) -> Vec<Line> {
    let vms = vms(picture);
    let mut entries = of_the_host(picture, marks);
    let offline = offline(picture);
    let mut crowd = Vec::new();
    if vms.len() > VMS_WITH_LINES_MAX {
        crowd = vms;
    } else {
        entries.extend(vms);
    }
    entries.extend(offline);
    let mut lines = table(&entries, width);
    let crowd = crowd.into_iter().map(|entry| sample(&entry)).collect();
    lines.append(&mut flow(crowd, "  ", 0, width));

    let unknown = &picture.topology.unknown;
    for line in unknown.iter().take(UNKNOWN_MAX) {
        let text = format!("{}: {}", line.what, line.reason);
        lines.append(&mut sentence("not known: ", &text, width));
    }
    if unknown.len() > UNKNOWN_MAX {
        let more = count(unknown.len() - UNKNOWN_MAX, "more thing");
        lines.append(&mut sentence("not known: ", &more, width));
    }
    lines
}

/// What the host's own marks mean, as far as they are drawn.
fn of_the_host(picture: &Picture<'_>, marks: &Marks<'_>) -> Vec<Entry> {
    let online = picture.topology.online();
    let entry = |(mark, paint, name): (char, Paint, &str)| Entry {
        mark,
        paint,
        name: name.to_owned(),
        cpus: online.iter().filter(|cpu| marks.of(*cpu).0 == mark).collect(),
    };
    let kinds = [
        (RESERVED, Paint::Host, "reserved for the host"),
        (SHARED, Paint::Shared, "shared by all VMs"),
        (FREE, Paint::Plain, "free"),
        (ISOLATED, Paint::Plain, "isolated at boot, free"),
    ];
    let kinds = kinds.into_iter().map(entry).filter(|entry| !entry.cpus.is_empty());
    kinds.chain(promised(picture, marks)).collect()
}

/// Who has been promised what, as far as that is drawn.
fn promised(picture: &Picture<'_>, marks: &Marks<'_>) -> Vec<Entry> {
    let made = &picture.promises.made;
    let entry = |promise: &Promise| {
        let (mark, paint) = match promise.strength {
            Strength::Hard => (HARD, Paint::Host),
            Strength::Soft => (SOFT, Paint::Shared),
        };
        let cpus = promise.cpus.iter().filter(|cpu| marks.of(*cpu).0 == mark).collect();
        Entry { mark, paint, name: promise.what.clone(), cpus }
    };
    let drawn = made.iter().map(entry).filter(|entry| !entry.cpus.is_empty());
    let mut entries: Vec<Entry> = drawn.collect();
    if entries.len() > PROMISES_WITH_LINES_MAX {
        let rest = entries.split_off(PROMISES_WITH_LINES_MAX - 1);
        let cpus = rest.iter().fold(CpuSet::EMPTY, |all, entry| all | entry.cpus);
        let name = format!("{} others", rest.len());
        entries.push(Entry { mark: SOFT, paint: Paint::Shared, name, cpus });
    }
    entries
}

/// The CPUs that are offline, which the picture does not show and which so have no mark.
fn offline(picture: &Picture<'_>) -> Option<Entry> {
    let cpus: CpuSet =
        picture.topology.cpus.iter().filter(|cpu| !cpu.online).map(|cpu| cpu.id).collect();
    let entry = Entry { mark: ' ', paint: Paint::Plain, name: "offline".to_owned(), cpus };
    (!cpus.is_empty()).then_some(entry)
}

/// The VMs by their letters; those after the letters are one entry.
fn vms(picture: &Picture<'_>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut others = 1;
    for (at, (name, cpus)) in picture.owners.iter().enumerate() {
        let mark = letter(at);
        match entries.last_mut() {
            Some(last) if last.mark == OTHERS => {
                others += 1;
                last.name = format!("{others} other VMs");
                last.cpus |= *cpus;
            }
            _ => {
                let name = format!("VM {name}");
                entries.push(Entry { mark, paint: Paint::Vm(at), name, cpus: *cpus });
            }
        }
    }
    entries
}

/// A mark as it is drawn, and its name.
fn sample(entry: &Entry) -> Line {
    let mut line = Line::painted(entry.paint, format!(" {} ", entry.mark));
    line.push(Paint::Plain, format!(" {}", entry.name));
    line
}

/// The entries with their CPUs in a column, which are broken at commas where they are too long.
fn table(entries: &[Entry], width: usize) -> Vec<Line> {
    let samples: Vec<Line> = entries.iter().map(sample).collect();
    let column = samples.iter().map(Line::width).max().unwrap_or(0) + 2;
    let mut lines = Vec::new();
    for (mut line, entry) in samples.into_iter().zip(entries) {
        line.pad_to(column);
        // Where the names leave little room, the CPUs start anew on the next line.
        let indent = if column + 16 > width { 4 } else { column };
        let cpus = if entry.cpus.is_empty() { "none".to_owned() } else { entry.cpus.to_string() };
        lines.append(&mut broken(line, &cpus, indent, width));
    }
    lines
}

/// A text after a label, broken where it is too long and indented as the label is wide.
fn sentence(label: &str, text: &str, width: usize) -> Vec<Line> {
    let label_width = label.chars().count();
    let indent = if label_width + 16 > width { 2 } else { label_width };
    broken(Line::plain(label), text, indent, width)
}

/// Appends `text` to `line`, broken after blanks, commas and slashes.
fn broken(mut line: Line, text: &str, indent: usize, width: usize) -> Vec<Line> {
    let mut lines = Vec::new();
    // Before it is measured: an escape is wider than what it stands for.
    let text = shown::line(text);
    for part in text.split_inclusive([' ', ',', '/']) {
        let mut part: &str = part;
        if line.width() + part.trim_end().chars().count() > width && line.width() > indent {
            lines.push(std::mem::take(&mut line));
            line.pad_to(indent);
        }
        // A part as long as this is no word, so it may be cut anywhere.
        while line.width() + part.chars().count() > width {
            let room = width.saturating_sub(line.width()).max(1);
            let cut = part.char_indices().nth(room).map_or(part.len(), |(at, _)| at);
            let (head, tail) = part.split_at(cut);
            line.push(Paint::Plain, head);
            part = tail;
            if part.trim_end().is_empty() {
                part = "";
                break;
            }
            lines.push(std::mem::take(&mut line));
            line.pad_to(indent);
        }
        line.push(Paint::Plain, part);
    }
    lines.push(line);
    lines
}
