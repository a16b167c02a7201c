//! What a check comes to: its severity, the reason, and the command that fixes it.

use serde::Serialize;

/// How much a finding matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// There is nothing to fix.
    Fine,
    /// It could not be read, so it is neither good nor bad.
    Unknown,
    /// A choice with two sides. The reason says what is gained and what is lost; a command is optional.
    Info,
    /// It adds latency, and what fixes it loses nothing, or only what the reason names.
    Costs,
}

impl Severity {
    /// The coarser word of the first version of the document.
    #[must_use]
    pub fn health(self) -> Health {
        if self == Severity::Costs { Health::Costs } else { Health::Fine }
    }
}

/// Whether something has to be fixed. It decides the exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Nothing is known that has to be fixed.
    Fine,
    /// It adds latency.
    Costs,
}

/// The result of one check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Advice {
    /// Its short name. Several results may have the same.
    pub check: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// A sentence, with the numbers.
    pub reason: String,
    /// The command that fixes it, or what belongs in the VM's configuration. `None`: there is nothing to do, or no
    /// command does it.
    pub mend: Option<String>,
}

/// Returns a result with which nothing is to be done.
pub(super) fn fine(check: &'static str, reason: impl Into<String>) -> Advice {
    Advice { check, severity: Severity::Fine, reason: reason.into(), mend: None }
}

/// Returns a result that says why nothing is known.
pub(super) fn unknown(check: &'static str, reason: impl Into<String>) -> Advice {
    Advice { check, severity: Severity::Unknown, reason: reason.into(), mend: None }
}

/// Returns a result that describes a choice.
pub(super) fn info(check: &'static str, reason: impl Into<String>, mend: Option<String>) -> Advice {
    Advice { check, severity: Severity::Info, reason: reason.into(), mend }
}

/// Returns a result that has to be fixed.
pub(super) fn costs(
    check: &'static str,
    reason: impl Into<String>,
    mend: Option<String>,
) -> Advice {
    Advice { check, severity: Severity::Costs, reason: reason.into(), mend }
}
