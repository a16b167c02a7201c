//! Standard output and standard error. The one place that prints.

use std::borrow::Cow;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::error::{Failure, Kind};
use crate::shown;

/// Whether lists in sentences are shown whole, as `--verbose` asks for.
static SHOWS_ALL: AtomicBool = AtomicBool::new(false);

/// Has lists in sentences shown whole from now on, or cut where a line is too long.
pub(super) fn show_all(all: bool) {
    SHOWS_ALL.store(all, Ordering::Relaxed);
}

/// The width that a line of a message may have; `None`: any.
pub(super) fn columns() -> Option<usize> {
    (!SHOWS_ALL.load(Ordering::Relaxed)).then_some(shown::COLUMNS_MAX)
}

/// Prints one sentence on standard output: a line, whose lists are cut where it is too long.
///
/// # Errors
/// As [`text`].
pub(super) fn sentence(sentence: &str) -> Result<(), Failure> {
    text(&format!("{}\n", fitted(&shown::line(sentence))))
}

fn fitted(line: &str) -> Cow<'_, str> {
    columns().map_or(Cow::Borrowed(line), |columns| shown::cut(line, columns))
}

/// Prints a text on standard output, hidden characters escaped.
///
/// # Errors
/// A failure where it cannot be written. A reader that has gone (`qmpin threads 100 | head -1`) is
/// none.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    written(io::stdout().write_all(shown::block(text).as_bytes()))
}

/// Prints a text that has colours on standard output; its pieces from outside are escaped already.
///
/// # Errors
/// As [`text`].
pub(super) fn painted(text: &str) -> Result<(), Failure> {
    written(io::stdout().write_all(shown::painted(text).as_bytes()))
}

/// Prints a whole document of a format with escapes of its own on standard output, as it is.
///
/// # Errors
/// As [`text`].
pub(super) fn document(document: &str) -> Result<(), Failure> {
    written(io::stdout().write_all(document.as_bytes()))
}

/// Prints a document on standard output: one line.
///
/// # Errors
/// As [`text`].
pub(super) fn json(document: &impl Serialize) -> Result<(), Failure> {
    let mut line =
        serde_json::to_string(document).map_err(|error| Failure::new(Kind::Bug, error))?;
    line.push('\n');
    written(io::stdout().write_all(shown::json(&line).as_bytes()))
}

/// Prints an answer on standard output: the document as JSON where that is wanted, else the text that is made of it.
///
/// # Errors
/// As [`text()`].
pub(super) fn answer<T: Serialize>(
    is_json: bool,
    document: &T,
    to_text: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    if is_json { json(document) } else { text(&to_text(document)) }
}

/// Prints a message on standard error, hidden characters escaped, lists cut where a line is too long.
pub(super) fn error(text: &str) {
    let text = shown::block(text);
    let lines: Vec<Cow<'_, str>> = text.lines().map(fitted).collect();
    let _ = writeln!(io::stderr(), "{}", lines.join("\n"));
}

fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => {
            Err(Failure::new(Kind::Partial, format!("could not write to standard output: {error}")))
        }
        Ok(()) => Ok(()),
    }
}
