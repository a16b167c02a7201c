//! What still costs something: the document `qmpin.doctor/1`, and a table with the commands that fix it.

use serde::Serialize;

use super::table::table;
use crate::check::doctor::{Advice, Health, Severity};
use crate::ids::VmName;
use crate::shown;

/// How wide a reason may be before it goes on in the next line; with the columns before it that is a terminal's width.
const REASON_COLUMNS: usize = 92;

/// `doctor --json`.
#[derive(Debug, Serialize)]
pub struct DoctorDocument<'a> {
    schema: &'static str,
    vm: Option<&'a VmName>,
    advice: Vec<Row>,
}

/// One result. `health` is the word of the first version, `severity` the finer one.
#[derive(Debug, Serialize)]
struct Row {
    check: &'static str,
    health: Health,
    severity: Severity,
    reason: String,
    mend: Option<String>,
}

impl DoctorDocument<'_> {
    /// Of what was looked at.
    #[must_use]
    pub fn new(vm: Option<&VmName>, advice: Vec<Advice>) -> DoctorDocument<'_> {
        let row = |Advice { check, severity, reason, mend }| Row {
            check,
            health: severity.health(),
            severity,
            reason,
            mend,
        };
        DoctorDocument {
            schema: "qmpin.doctor/1",
            vm,
            advice: advice.into_iter().map(row).collect(),
        }
    }

    /// Whether there is nothing to mend.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.advice.iter().all(|one| one.health == Health::Fine)
    }

    /// The table for a terminal, and below it a line for each thing that can be mended, what costs first.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut rows = vec![["CHECK", "", ""].map(str::to_owned)];
        for one in &self.advice {
            let severity = match one.severity {
                Severity::Fine => "fine",
                Severity::Unknown => "unknown",
                Severity::Info => "info",
                Severity::Costs => "COSTS",
            };
            let mut begin = [one.check, severity];
            for line in wrapped(&shown::line(&one.reason), REASON_COLUMNS) {
                rows.push([begin[0].to_owned(), begin[1].to_owned(), line]);
                begin = [""; 2];
            }
        }
        let mut text = table(&rows);
        for (severity, note) in [(Severity::Costs, ""), (Severity::Info, " (a choice: see above)")]
        {
            for (mend, checks) in self.mends(severity) {
                text.push_str(&format!(
                    "\n{}{note}:\n    {}\n",
                    checks.join(", "),
                    shown::line(mend)
                ));
            }
        }
        text
    }

    /// The commands of one severity, each with the checks that it fixes.
    fn mends(&self, severity: Severity) -> Vec<(&str, Vec<&str>)> {
        let mut mends: Vec<(&str, Vec<&str>)> = Vec::new();
        for one in self.advice.iter().filter(|one| one.severity == severity) {
            let Some(mend) = &one.mend else { continue };
            // One line may mend several.
            match mends.iter_mut().find(|(known, _)| known == mend) {
                Some((_, checks)) => checks.push(one.check),
                None => mends.push((mend, vec![one.check])),
            }
        }
        mends
    }
}

/// Breaks a sentence into lines at its blanks. A longer word has a line of its own.
fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let Some(line) = lines.last_mut() else { break };
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > columns {
            lines.push(word.to_owned());
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(check: &'static str, severity: Severity, mend: Option<&str>) -> Advice {
        let mend = mend.map(str::to_owned);
        Advice { check, severity, reason: format!("{check} {}", "word ".repeat(30).trim()), mend }
    }

    #[test]
    fn what_costs_comes_first_and_a_choice_is_called_one() {
        let document = DoctorDocument::new(
            None,
            vec![
                advice("one", Severity::Info, Some("sysctl a=1")),
                advice("two", Severity::Costs, Some("args: -k\u{1b}")),
                advice("three", Severity::Costs, Some("args: -k\u{1b}")),
                advice("four", Severity::Unknown, None),
            ],
        );
        assert!(!document.is_fine());
        let text = document.to_text();
        let (costs, choice) =
            text.split_once("\none (a choice: see above):\n    sysctl a=1\n").expect("both");
        assert!(costs.ends_with("\ntwo, three:\n    args: -k\\u{1b}\n"), "{text}");
        assert_eq!(choice, "");
        assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
        assert!(text.contains("four   unknown  four word"), "{text}");
    }

    #[test]
    fn the_first_words_for_health_are_kept() {
        let fine = [Severity::Fine, Severity::Unknown, Severity::Info];
        let advice = fine.iter().map(|severity| advice("one", *severity, None)).collect();
        let document = DoctorDocument::new(None, advice);
        assert!(document.is_fine());
        let json = serde_json::to_value(&document).expect("a document");
        for (row, severity) in
            json["advice"].as_array().expect("rows").iter().zip(["fine", "unknown", "info"])
        {
            assert_eq!((&row["health"], &row["severity"]), (&"fine".into(), &severity.into()));
        }
    }

    #[test]
    fn a_sentence_is_broken_at_its_blanks() {
        assert_eq!(wrapped("a bc def", 4), ["a bc", "def"]);
        assert_eq!(wrapped("abcdef g", 4), ["abcdef", "g"]);
        assert_eq!(wrapped("", 4), [""]);
    }
}
