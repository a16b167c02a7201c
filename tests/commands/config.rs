//! `qmpin config`: the merged policy with its origins, and every bad file by name.

#![allow(clippy::expect_used)] // that is how a test says no

use std::fs;
use std::path::Path;

use serde_json::Value;

struct World(tempfile::TempDir);

#[derive(Debug)]
struct Done {
    code: Option<i32>,
    out: String,
}

impl World {
    fn new() -> World {
        World(tempfile::tempdir().expect("a folder"))
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    fn config(&self, words: &[&str]) -> Done {
        let mut command = crate::support::clean::command(env!("CARGO_BIN_EXE_qmpin"));
        command.arg("config").args(words).arg("--sysroot").arg(self.0.path());
        let done = command.output().expect("it runs");
        Done { code: done.status.code(), out: String::from_utf8_lossy(&done.stdout).into_owned() }
    }

    fn file(&self, path: &str) -> String {
        self.0.path().join(path).display().to_string()
    }
}

#[test]
fn each_value_is_shown_with_its_origin_and_the_later_file_wins() {
    let world = World::new();
    world.write(
        "etc/qmpin/qmpin.toml",
        "isolation = \"strict\"\noverflow = \"refuse\"\n[host]\nreserved = \"0-1\"\n",
    );
    world.write("etc/pve/qmpin/100.toml", "cache = \"large\"\noverflow = \"shared\"\n");
    world.write("etc/qmpin/100.toml", "\nvcpus = \"4-7\"\n");
    let done = world.config(&["show", "100", "--json", "--isolation", "pinned"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let document: Value = serde_json::from_str(&done.out).expect("a document");
    assert_eq!(document["schema"], "qmpin.config/1");
    let row = |key: &str| {
        let rows = document["values"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["key"] == key).expect("listed");
        (row["value"].clone(), row["origin"].as_str().expect("an origin").to_owned())
    };
    let said = |value: &str, origin: String| (Value::from(value), origin);
    assert_eq!(row("isolation"), said("pinned", "--isolation".to_owned()));
    assert_eq!(row("overflow"), said("shared", world.file("etc/pve/qmpin/100.toml:2")));
    assert_eq!(row("vcpus"), said("4-7", world.file("etc/qmpin/100.toml:2")));
    assert_eq!(row("host.reserved"), said("0-1", world.file("etc/qmpin/qmpin.toml:4")));
    assert_eq!(row("share"), (Value::Bool(false), "default".to_owned()));
    assert_eq!(row("host.shared"), (Value::Null, "default".to_owned()));
}

#[test]
fn what_is_shown_can_be_used_as_a_policy() {
    let world = World::new();
    world
        .write("etc/qmpin/100.toml", "isolation = \"strict\"\nnoise = false\nsched = \"fifo:3\"\n");
    let shown = world.config(&["show", "100"]).out;
    // The host's part belongs in another file.
    let (of_vm, of_host) = shown.split_once("[host]").expect("both parts");
    world.write("etc/qmpin/100.toml", of_vm);
    world.write("etc/qmpin/qmpin.toml", &format!("[host]{of_host}"));
    assert_eq!(world.config(&["check"]).code, Some(0));
    let without_origin = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split('#').next().unwrap_or(line).trim().to_owned()).collect()
    };
    assert_eq!(without_origin(&world.config(&["show", "100"]).out), without_origin(&shown));
}

#[test]
fn every_bad_file_is_named_and_not_the_first_alone() {
    let world = World::new();
    assert_eq!(world.config(&["check"]).code, Some(0), "no file is good");
    world.write("etc/qmpin/100.toml", "isolation = \"pinned\"\n");
    let done = world.config(&["check"]);
    assert!(done.code == Some(0) && done.out.contains("etc/qmpin/100.toml"), "{done:?}");
    world.write("etc/qmpin/101.toml", "\nvcpu = \"1\"\n");
    world.write("etc/qmpin/102.toml", "share = ");
    world.write("etc/qmpin/two words.toml", "");
    world.write("etc/pve/qmpin/100.toml", "vcpus = \"1-3\"\n");
    let done = world.config(&["check"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    for (path, reason) in [
        ("etc/qmpin/101.toml:2", "did you mean `vcpus`?"),
        ("etc/qmpin/102.toml:1", ""),
        ("etc/qmpin/two words.toml", "no VM can have that name"),
        ("etc/pve/qmpin/100.toml:1", "every node"),
    ] {
        let named = |line: &&str| line.contains(&world.file(path)) && line.contains(reason);
        assert!(done.out.lines().any(|line| named(&line)), "{path}: {done:?}");
    }
    assert_eq!(done.out.lines().count(), 4, "{done:?}");
    let json = world.config(&["check", "--json"]);
    let document: Value = serde_json::from_str(&json.out).expect("a document");
    let files = document["files"].as_array().expect("files");
    let bad = files.iter().filter(|file| file["reason"].is_string()).count();
    // The good one is listed, too.
    assert_eq!((json.code, bad, files.len()), (Some(1), 4, 5), "{json:?}");
    let one = world.config(&["check", "100"]);
    assert!(one.code == Some(1) && one.out.lines().count() == 1, "{one:?}");
    assert_eq!(world.config(&["show", "101"]).code, Some(2));
    assert!(Path::new(&world.file("etc/qmpin/101.toml")).exists());
}
