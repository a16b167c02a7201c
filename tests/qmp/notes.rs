//! `proto-notes/` against the tests: every row of its tables that names a test names one that
//! exists, and every event it names is in a transcript.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::transcript;
use qmpin::qmp::EVENTS_KNOWN;

fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The cells of the rows of all tables whose last column is headed `test`.
fn rows(note: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(package().join("proto-notes").join(note)).unwrap();
    let mut rows = Vec::new();
    let mut holds_tests = false;
    for line in text.lines() {
        let Some(inner) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else {
            holds_tests &= line.starts_with("|-");
            continue;
        };
        let cells: Vec<String> = inner.split(" | ").map(str::to_owned).collect();
        if cells.last().unwrap() == "test" {
            holds_tests = true;
        } else if holds_tests {
            rows.push(cells);
        }
    }
    assert!(rows.len() > 5, "{note}: no table with tests");
    rows
}

fn unquoted(cell: &str) -> &str {
    cell.strip_prefix('`')
        .and_then(|cell| cell.strip_suffix('`'))
        .unwrap_or_else(|| panic!("not one name in backticks: {cell}"))
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The names of all functions that follow a test attribute.
fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    rust_files(&package().join("src/qmp"), &mut files);
    rust_files(&package().join("tests/qmp"), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        let mut after_attribute = false;
        for line in text.lines().map(str::trim_start) {
            let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
            if let (true, Some(function)) = (after_attribute, function) {
                names.insert(function.split('(').next().unwrap().to_owned());
            }
            after_attribute = line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        }
    }
    names
}

#[test]
fn every_row_of_the_notes_is_held_by_a_test() {
    let tests = tests();
    assert!(tests.len() > 60, "{}", tests.len());
    for note in ["events.md", "quirks.md"] {
        for row in rows(note) {
            let test = unquoted(row.last().unwrap());
            assert!(tests.contains(test), "{note}: no test is called {test}");
        }
    }
}

#[test]
fn every_event_of_the_notes_is_known_and_in_a_transcript() {
    let heard: BTreeSet<String> = transcript::all()
        .iter()
        .flat_map(|transcript| transcript.events().into_iter().map(str::to_owned))
        .collect();
    let mut noted = BTreeSet::new();
    for row in rows("events.md") {
        let event = unquoted(&row[0]).to_owned();
        assert!(EVENTS_KNOWN.contains(&event.as_str()), "{event} is not in EVENTS_KNOWN");
        assert!(noted.insert(event));
    }
    assert_eq!(noted, heard, "the notes and the transcripts name different events");
}
