//! The merged policy: the document `qmpin.config/1`, and a policy file that says the same.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::ids::VmName;
use crate::policy::{Entry, Origin, Policy};
use crate::shown;

/// `config show --json`.
#[derive(Debug, Serialize)]
pub struct ConfigDocument<'a> {
    schema: &'static str,
    vm: &'a VmName,
    values: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    /// As in a file: `isolation`, `host.reserved`.
    key: String,
    value: Value,
    /// `default`, a flag, or `path:line`.
    origin: String,
    /// The level that decides, where the key is silent.
    by_level: bool,
}

impl ConfigDocument<'_> {
    /// Of a merged policy.
    #[must_use]
    pub fn of<'a>(vm: &'a VmName, policy: &Policy) -> ConfigDocument<'a> {
        let row = |entry: Entry| Row {
            key: match entry.table.name() {
                None => entry.key.to_owned(),
                Some(table) => format!("{table}.{}", entry.key),
            },
            value: entry.value,
            origin: entry.origin.to_string(),
            by_level: entry.by_level,
        };
        let values = policy.entries().into_iter().map(row).collect();
        ConfigDocument { schema: "qmpin.config/1", vm, values }
    }
}

/// `config check --json`.
#[derive(Debug, Serialize)]
pub struct ConfigCheckDocument {
    schema: &'static str,
    files: Vec<CheckedFile>,
}

#[derive(Debug, Serialize)]
struct CheckedFile {
    path: String,
    /// Why it cannot be used; null where it can.
    reason: Option<String>,
}

impl ConfigCheckDocument {
    /// Of files, and why those that cannot be used cannot.
    pub fn of(files: impl Iterator<Item = (PathBuf, Option<String>)>) -> ConfigCheckDocument {
        // A path that is no UTF-8 has no other face in JSON.
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        let files = files.map(|(at, reason)| CheckedFile { path: path(at), reason }).collect();
        ConfigCheckDocument { schema: "qmpin.config-check/1", files }
    }

    /// Whether all of them can be used.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.files.iter().all(|file| file.reason.is_none())
    }

    /// A line for each bad one; where there is none, a line for all.
    #[must_use]
    pub fn to_text(&self) -> String {
        if !self.is_good() {
            let bad = self.files.iter().filter_map(|file| file.reason.as_ref());
            let lines: Vec<_> = bad.map(|reason| shown::line(reason)).collect();
            return lines.join("\n") + "\n";
        }
        if self.files.is_empty() {
            return "no policy file: every VM has the defaults\n".to_owned();
        }
        let paths = self.files.iter().map(|file| shown::line(&file.path));
        format!("good: {}\n", paths.collect::<Vec<_>>().join(", "))
    }
}

/// A policy file that says what was merged, each line with its origin.
#[must_use]
pub fn config_text(policy: &Policy) -> String {
    let entries = policy.entries();
    let line = |entry: &Entry| match &entry.value {
        Value::Null => format!("# {}: none", entry.key),
        value => format!("{} = {value}", entry.key),
    };
    let width = entries.iter().map(|entry| line(entry).len()).max().unwrap_or(0);
    let mut text = String::new();
    let mut table = None;
    for entry in &entries {
        if entry.table.name() != table {
            table = entry.table.name();
            text.push_str(&format!("\n[{}]\n", table.as_deref().unwrap_or_default()));
        }
        text.push_str(&format!("{:width$}  # {}\n", line(entry), origin(entry)));
    }
    text
}

fn origin(entry: &Entry) -> String {
    match (&entry.origin, entry.by_level) {
        (origin, false) => origin.to_string(),
        (Origin::Default, true) => "default, by isolation".to_owned(),
        (origin, true) => format!("by isolation ({origin})"),
    }
}
