//! Whether all holds: the document `qmpin.verify/1`, and a table.

use serde::Serialize;

use super::table::table;
use crate::check::verify::{Check, CheckVerdict};
use crate::ids::VmName;
use crate::plan::{Finding, PlacedMemory};
use crate::shown;

/// `verify --json`.
#[derive(Debug, Serialize)]
pub struct VerifyDocument {
    schema: &'static str,
    vm: VmName,
    holds: bool,
    checks: Vec<Check>,
    /// Where the guest's memory is now, relative to its vCPUs; null where that is not known or makes no difference.
    memory: Option<PlacedMemory>,
    #[serde(skip)]
    memory_in_words: Option<String>,
    /// What of the plan in force falls short, as `qmpin plan` prints it. It breaks no promise.
    findings: Vec<Finding>,
}

impl VerifyDocument {
    /// Of the checks that were made, and of the plan's findings.
    #[must_use]
    pub fn new(vm: &VmName, checks: Vec<Check>, findings: Vec<Finding>) -> VerifyDocument {
        let holds = checks.iter().all(|check| check.verdict != CheckVerdict::Broken);
        VerifyDocument {
            schema: "qmpin.verify/1",
            vm: vm.clone(),
            holds,
            checks,
            memory: None,
            memory_in_words: None,
            findings,
        }
    }

    /// With where the guest's memory is, in words and sums.
    #[must_use]
    pub fn with_memory(self, seen: Option<(String, PlacedMemory)>) -> VerifyDocument {
        let (words, memory) = seen.unzip();
        VerifyDocument { memory, memory_in_words: words, ..self }
    }

    /// Whether no promise is broken.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.holds
    }

    /// The table for a terminal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut rows = vec![["CHECK", "VERDICT", ""].map(str::to_owned)];
        rows.extend(self.checks.iter().map(|check| {
            let verdict = match check.verdict {
                CheckVerdict::Holds => "holds",
                CheckVerdict::Broken => "BROKEN",
                CheckVerdict::Refused => "refused",
            };
            [check.check.to_owned(), verdict.to_owned(), check.reason.clone()]
        }));
        let all = if self.holds { "all holds" } else { "not all holds" };
        let mut text = format!("VM {}: {all}\n{}", self.vm, table(&rows));
        if let Some(words) = &self.memory_in_words {
            text.push_str(&format!("memory: {words}\n"));
        }
        if !self.findings.is_empty() {
            text.push_str("the plan in force falls short:\n");
        }
        for finding in &self.findings {
            text.push_str(&format!("  {}\n", shown::line(&finding.to_string())));
        }
        text
    }
}
