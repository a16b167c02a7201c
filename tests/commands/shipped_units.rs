//! The test host runs the units that are shipped: no scenario, and no part of its library, has unit text of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

/// What begins a unit, or a drop-in of one.
const SECTIONS: [&str; 4] = ["[Unit]", "[Service]", "[Path]", "[Install]"];
/// Settings that decide what becomes of a unit of qmpin's.
const SETTINGS: [&str; 6] =
    ["ExecStart", "ExecStop", "ExecReload", "ExecCondition", "Restart", "WatchdogSec"];

fn python_files() -> Vec<PathBuf> {
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host");
    let folders = ["lib", "scenarios"].map(|folder| host.join(folder));
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|suffix| suffix == "py")).collect()
}

/// The lines of a text that bring unit text, and not only name a setting in words or read it.
fn unit_text(text: &str) -> Vec<String> {
    let is_setting = |line: &str| {
        let setting = SETTINGS.iter().find_map(|setting| line.split_once(setting));
        // `Exec...=` followed by a command; a property that is read is named without a sign of equality.
        setting
            .is_some_and(|(_, rest)| rest.trim_start_matches(char::is_alphabetic).starts_with('='))
    };
    let is_quoted_prose =
        |line: &str| line.trim_start().starts_with('#') || line.contains("\"\"\"");
    let brings = |line: &&str| {
        SECTIONS.iter().any(|section| line.contains(section))
            || (is_setting(line) && !is_quoted_prose(line))
    };
    text.lines().filter(brings).map(str::to_owned).collect()
}

#[test]
fn no_scenario_brings_unit_text_of_its_own() {
    let files = python_files();
    assert!(files.len() > 40, "the scenarios are looked for elsewhere: {files:?}");
    let found: Vec<String> = files
        .iter()
        .flat_map(|path| {
            let lines = unit_text(&fs::read_to_string(path).unwrap());
            lines.into_iter().map(|line| format!("{}: {}", path.display(), line.trim()))
        })
        .collect();
    assert!(
        found.is_empty(),
        "the shipped files of integration/systemd are to be used:\n{}",
        found.join("\n")
    );
}

#[test]
fn unit_text_is_recognised() {
    for text in [
        "TEXT = \"\"\"\n[Service]\nType=notify\n",
        "slow.write_text(\"[Service]\\nExecStopPost=/bin/sleep 4\\n\")",
        "[\"systemd-run\", \"-p\", \"ExecStopPost=/bin/true\"]",
        "Restart=on-failure",
        "WatchdogSec={watchdog_s}",
    ] {
        assert!(!unit_text(text).is_empty(), "{text}");
    }
    for text in
        ["service.show(\"ExecMainStatus\")", "# RestartSec= has passed", "unit.show(\"NRestarts\")"]
    {
        assert_eq!(unit_text(text), [""; 0], "{text}");
    }
}
