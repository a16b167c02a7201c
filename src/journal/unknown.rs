//! Lines of a journal that this qmpin does not know how to undo: it leaves them where they are and names them.

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A line that is no record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownLine {
    /// Its number in the file; the first is 1.
    pub number: usize,
    /// Why it is unknown.
    pub kind: UnknownKind,
    /// The line, without its end.
    pub(super) text: Vec<u8>,
}

/// Why a line is unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnknownKind {
    /// It is JSON, but of a kind that this version does not write: a newer qmpin wrote it.
    Newer,
    /// It is no JSON.
    Damaged,
}

/// The unknown lines of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownLines {
    /// The journal's path.
    pub path: PathBuf,
    /// The lines, in their order.
    pub lines: Vec<UnknownLine>,
}

impl UnknownLine {
    pub(super) fn of(number: usize, line: &[u8]) -> UnknownLine {
        let kind = match serde_json::from_slice::<Value>(line) {
            Ok(Value::Object(_)) => UnknownKind::Newer,
            _ => UnknownKind::Damaged,
        };
        UnknownLine { number, kind, text: line.to_owned() }
    }
}

impl UnknownLines {
    /// Those of the file at `path`; `None` where there are none.
    #[must_use]
    pub fn of(path: &Path, lines: &[UnknownLine]) -> Option<UnknownLines> {
        let (path, lines) = (path.to_owned(), lines.to_owned());
        (!lines.is_empty()).then_some(UnknownLines { path, lines })
    }

    fn numbers(&self, kind: UnknownKind) -> Option<String> {
        let of_kind = self.lines.iter().filter(|line| line.kind == kind);
        let numbers: Vec<String> = of_kind.map(|line| line.number.to_string()).collect();
        let cut = numbers.iter().take(NUMBERS_MAX).cloned().collect::<Vec<_>>().join(", ");
        match numbers.len() {
            0 => None,
            1 => Some(format!("line {cut}")),
            len if len > NUMBERS_MAX => Some(format!("{len} lines ({cut}, ...)")),
            _ => Some(format!("lines {cut}")),
        }
    }
}

/// How many numbers a message lists.
const NUMBERS_MAX: usize = 5;

/// A sentence or two: what is not undone, why, and what to do.
impl fmt::Display for UnknownLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let newer = self.numbers(UnknownKind::Newer).map(|lines| {
            format!("{path}: a newer qmpin wrote {lines}, so it is not undone: run `detach` of that version")
        });
        let damaged = self.numbers(UnknownKind::Damaged).map(|lines| {
            format!("{path}: {lines} cannot be read, so it is not undone: the file stays until you delete it")
        });
        let sentences: Vec<String> = newer.into_iter().chain(damaged).collect();
        f.write_str(&sentences.join("; "))
    }
}
