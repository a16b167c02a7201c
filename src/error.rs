//! What a command ends with: a kind (and so an exit code), a sentence, its causes, and a hint.
//!
//! Stages have error types of their own, one variant per thing attempted; at the edge they become
//! a [`Failure`], which is printed once, chain and all.

use std::error::Error as StdError;
use std::fmt;

use crate::shown;

/// Why a command did not do what was asked; each has its exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The answer is no: drift, an infeasible plan, a VM that another process has attached.
    No,
    /// The command line or a policy file is wrong.
    Usage,
    /// There is no such VM, or it does not run.
    NoVm,
    /// The kernel does not permit it.
    Permission,
    /// QEMU could not be asked, or did not answer as it must.
    Qmp,
    /// Some of it was done; the report says what was not.
    Partial,
    /// A bug in qmpin.
    Bug,
}

impl Kind {
    /// The exit code that scripts and systemd units see.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::No => 1,
            Kind::Usage => 2,
            Kind::NoVm => 3,
            Kind::Permission => 4,
            Kind::Qmp => 5,
            Kind::Partial => 6,
            Kind::Bug => 70,
        }
    }
}

/// The end of a command that did not succeed.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    message: String,
    hints: Vec<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Failure {
    /// A failure with a sentence and no cause below it.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into(), hints: Vec::new(), source: None }
    }

    /// A failure whose sentence and causes are those of `error`.
    #[must_use]
    pub fn from_error(kind: Kind, error: impl StdError + Send + Sync + 'static) -> Failure {
        let source = error.source().map(|source| Chained::boxed(source));
        Failure { kind, message: error.to_string(), hints: Vec::new(), source }
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
        let mut text = format!("error: {}", shown::line(&self.message));
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(&format!("\ncaused by: {}", shown::line(&error.to_string())));
            cause = error.source();
        }
        for hint in &self.hints {
            text.push_str(&format!("\nhint: {}", shown::line(hint)));
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// An error and its causes in one line, for a log.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// An owned copy of a borrowed chain of causes, as texts.
#[derive(Debug)]
struct Chained {
    text: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Chained {
    fn boxed(error: &dyn StdError) -> Box<dyn StdError + Send + Sync> {
        Box::new(Chained { text: error.to_string(), source: error.source().map(Chained::boxed) })
    }
}

impl fmt::Display for Chained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Chained {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
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
            Failure::from_error(Kind::Qmp, Outer(std::io::Error::other("inner"))).hint("try again");
        assert_eq!(failure.report(), "error: outer\ncaused by: inner\nhint: try again");
        assert_eq!(failure.kind().exit_code(), 5);
    }
}
