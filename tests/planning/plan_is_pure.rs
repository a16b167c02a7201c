//! `src/plan` decides from what it is given and nothing else: it reads no file, asks no clock and
//! throws no dice. The words below must not be in its sources.

use std::fs;
use std::path::Path;

/// What a planner has no business with.
const IMPURE: [&str; 20] = [
    "std::fs",
    "std::net",
    "std::os",
    "std::io",
    "std::env",
    "std::process",
    "std::time",
    "std::thread",
    "tokio",
    "nix::",
    "rustix",
    "tracing",
    "rand",
    "HashMap", // its order is random; so is a set's
    "HashSet",
    "crate::qmp",
    "crate::sysroot",
    "crate::sched",
    "crate::discover",
    "println!",
];

#[test]
fn the_planner_imports_nothing_impure() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plan");
    let folders = [folder.join("host"), folder.join("partition"), folder.clone()];
    let mut found = Vec::new();
    let mut files = 0;
    for entry in folders.iter().flat_map(|folder| fs::read_dir(folder).expect("a folder")) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            assert!(folders.contains(&path), "{} is not looked at", path.display());
            continue;
        }
        let text = fs::read_to_string(&path).expect("a source file");
        let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).expect("ours").display();
        files += 1;
        for (at, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let words = IMPURE.iter().filter(|word| has_word(code, word));
            found.extend(words.map(|word| format!("{name}:{}: {word}", at + 1)));
        }
    }
    assert!(files > 5, "only {files} files in {}", folder.display());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Whether the word stands in the line, and not as the end or beginning of another.
fn has_word(line: &str, word: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let ends_open = word.ends_with([':', '!']);
        !before.is_some_and(letter) && (ends_open || !after.is_some_and(letter))
    })
}
