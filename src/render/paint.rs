//! Lines made of painted pieces, whose width in columns is known.
//!
//! Every character that qmpin draws with is one column wide (ASCII, box drawing, `·`), and VM names
//! are ASCII, so a width is a number of characters.

use crate::shown;

/// Whether to write ANSI colours. The command decides: `NO_COLOR`, a terminal or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Color {
    /// Write them.
    Always,
    /// Plain text.
    Never,
}

/// How a piece of text looks: a role, not a colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Paint {
    Plain,
    /// Headings.
    Strong,
    /// Lines and lesser things.
    Faint,
    /// CPUs that belong to the host.
    Host,
    /// CPUs where threads of several VMs meet.
    Shared,
    /// CPUs of the VM of that place in the order of owners.
    Vm(usize),
}

/// Fills that light and dark terminals both show well, each with the text that reads best on it.
const VM_COLORS: [&str; 6] = ["30;46", "30;43", "30;45", "30;42", "97;41", "97;44"];

impl Paint {
    fn code(self) -> &'static str {
        match self {
            Paint::Plain => "",
            Paint::Strong => "1",
            Paint::Faint => "2",
            Paint::Host => "97;100",
            Paint::Shared => "4",
            Paint::Vm(at) => VM_COLORS[at % VM_COLORS.len()],
        }
    }
}

/// One line, piece by piece.
#[derive(Clone, Default, Debug)]
pub(super) struct Line {
    pieces: Vec<(Paint, String)>,
}

impl Line {
    pub(super) fn plain(text: impl Into<String>) -> Line {
        Line::painted(Paint::Plain, text)
    }

    pub(super) fn painted(paint: Paint, text: impl Into<String>) -> Line {
        let mut line = Line::default();
        line.push(paint, text);
        line
    }

    pub(super) fn push(&mut self, paint: Paint, text: impl Into<String>) {
        self.pieces.push((paint, shown::line(&text.into()).into_owned()));
    }

    pub(super) fn append(&mut self, mut other: Line) {
        self.pieces.append(&mut other.pieces);
    }

    /// Its text alone.
    pub(super) fn text(&self) -> String {
        self.pieces.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// Its width in columns.
    pub(super) fn width(&self) -> usize {
        self.pieces.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// Fills it up with blanks.
    pub(super) fn pad_to(&mut self, width: usize) {
        let missing = width.saturating_sub(self.width());
        if missing > 0 {
            self.push(Paint::Plain, " ".repeat(missing));
        }
    }

    /// Writes it and its end, no wider than `width` and without blanks at the end.
    pub(super) fn write(&self, out: &mut String, width: usize, color: Color) {
        let mut left = width;
        let mut line = String::new();
        for (paint, text) in &self.pieces {
            let text: String = text.chars().take(left).collect();
            left -= text.chars().count();
            let code = paint.code();
            if color == Color::Never || code.is_empty() || text.is_empty() {
                line.push_str(&text);
            } else {
                line.push_str(&format!("\x1b[{code}m{text}\x1b[0m"));
            }
        }
        out.push_str(line.trim_end_matches(' '));
        out.push('\n');
    }
}

/// Sets pieces one after another with `gap` between them, each whole, on lines of at most `width`
/// columns; the second and later lines are indented.
pub(super) fn flow(pieces: Vec<Line>, gap: &str, indent: usize, width: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut line = Line::default();
    let mut begun = false;
    for piece in pieces {
        if begun && line.width() + gap.chars().count() + piece.width() > width {
            lines.push(std::mem::take(&mut line));
            line.pad_to(indent);
        } else if begun {
            line.push(Paint::Faint, gap);
        }
        line.append(piece);
        begun = true;
    }
    if begun {
        lines.push(line);
    }
    lines
}
