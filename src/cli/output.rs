//! Standard output and standard error. The one place that prints.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::error::{Failure, Kind};

/// Prints a text on standard output as it is.
///
/// # Errors
/// A failure where it cannot be written. A reader that has gone (`qmpin threads 100 | head -1`) is
/// none.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    written(io::stdout().write_all(text.as_bytes()))
}

/// Prints a document on standard output: one line.
///
/// # Errors
/// As [`text`].
pub(super) fn json(document: &impl Serialize) -> Result<(), Failure> {
    let mut line =
        serde_json::to_vec(document).map_err(|error| Failure::from_error(Kind::Bug, error))?;
    line.push(b'\n');
    written(io::stdout().write_all(&line))
}

/// Prints a message on standard error.
pub(super) fn error(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
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
