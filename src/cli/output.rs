//! Standard output and standard error. The one place that prints.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::error::{Failure, Kind};
use crate::shown;

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
        serde_json::to_string(document).map_err(|error| Failure::from_error(Kind::Bug, error))?;
    line.push('\n');
    written(io::stdout().write_all(shown::json(&line).as_bytes()))
}

/// Prints a message on standard error, hidden characters escaped.
pub(super) fn error(text: &str) {
    let _ = writeln!(io::stderr(), "{}", shown::block(text));
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
