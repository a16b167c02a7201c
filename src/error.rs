//! What a command ends with: a kind (and so an exit code), a sentence, its causes, and a hint.
//!
//! Stages have error types of their own, one variant per thing attempted; at the edge they become
//! a [`Failure`], which is printed once, chain and all.

use std::error::Error as StdError;
use std::fmt;
use std::iter;

use crate::shown;

/// Why a command did not do what was asked; each is its exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// The answer is no: drift, an infeasible plan, a VM that another process has attached.
    No = 1,
    /// The command line or a policy file is wrong.
    Usage = 2,
    /// There is no such VM, or it does not run.
    NoVm = 3,
    /// The kernel does not permit it.
    Permission = 4,
    /// QEMU could not be asked, or did not answer as it must.
    Qmp = 5,
    /// Some of it was done; the report says what was not.
    Partial = 6,
    /// A bug in qmpin.
    Bug = 70,
}

impl Kind {
    /// The exit code that scripts and systemd units see.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        self as u8
    }
}

/// The end of a command that did not succeed.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    error: Box<dyn StdError + Send + Sync>,
    hints: Vec<String>,
}

impl Failure {
    /// A failure whose sentence and causes are those of `error`; a text is a sentence without causes.
    #[must_use]
    pub fn new(kind: Kind, error: impl Into<Box<dyn StdError + Send + Sync>>) -> Failure {
        Failure { kind, error: error.into(), hints: Vec::new() }
    }

    /// Adds the next move for the user; where there are several, each is a line.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hints.push(hint.into());
        self
    }

    /// Which kind it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What to print on standard error: the sentence, each cause, the hints, each on a line of its own. Hidden
    /// characters are escaped.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = format!("error: {}", shown::line(&self.to_string()));
        for cause in causes(self) {
            text.push_str(&format!("\ncaused by: {}", shown::line(&cause.to_string())));
        }
        for hint in &self.hints {
            text.push_str(&format!("\nhint: {}", shown::line(hint)));
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.source()
    }
}

/// An error and its causes in one line, for a log.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    causes(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The causes of an error, the nearest first.
fn causes<'a>(error: &'a dyn StdError) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    iter::successors(error.source(), |&cause| cause.source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn the_chain_is_printed_once_with_the_hint_last() {
        let failure =
            Failure::new(Kind::Qmp, Outer(std::io::Error::other("inner"))).hint("try again");
        assert_eq!(failure.report(), "error: outer\ncaused by: inner\nhint: try again");
        assert_eq!(failure.kind().exit_code(), 5);
    }
}
