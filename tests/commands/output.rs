//! Where the output goes decides how it looks: the journal wants priorities, a terminal may have colour.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use crate::support::qemu::QemuOptions;
use crate::support::run::{Stage, finish, needs_two_cpus};
use crate::support::{hosts, skipped};

/// Runs the rest of its words as systemd runs a service: standard error is a stream whose name is known.
const AS_A_SERVICE: &str =
    "exec 2>\"$1\"; shift; JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec \"$@\"";

#[test]
fn lines_for_the_journal_begin_with_their_priority() {
    needs_two_cpus!("lines_for_the_journal_begin_with_their_priority");
    let stage = Stage::new(&QemuOptions { vcpus: 2, ..QemuOptions::default() });
    let log = stage.place.path().join("log");
    let before = ["sh", "-c", AS_A_SERVICE, "sh", log.to_str().unwrap()];
    stage.run_under(&before, &["attach", "100", "--once", "--share"]).says(0, &[]);
    let text = fs::read_to_string(&log).unwrap();
    for (priority, word) in [("<6>", "vCPU"), ("<4>", "share")] {
        let mut lines = text.lines().filter(|line| line.starts_with(priority));
        assert!(lines.any(|line| line.contains(word)), "no {priority} with `{word}`: {text}");
    }
    let is_known = |line: &str| ["<4>", "<6>"].iter().any(|known| line.starts_with(known));
    assert!(text.lines().all(is_known), "{text}");
    // Another stream than the one that is named is no process's journal.
    let done = stage.run_under(&["env", "JOURNAL_STREAM=1:1"], &["detach", "100", "-v"]);
    done.says(0, &["restored"]);
    assert!(!done.err.contains('<'), "{done:?}");
}

#[test]
fn colour_is_for_terminals_and_no_color_is_honoured() {
    let test = "colour_is_for_terminals_and_no_color_is_honoured";
    if crate::support::clean::command("script").arg("--version").output().is_err() {
        return skipped(test, "no script(1) to make a terminal");
    }
    let host = hosts::ryzen_5900x().tree().unwrap();
    let host = host.path().display();
    let words = format!("{} topology --sysroot {host}", env!("CARGO_BIN_EXE_qmpin"));
    let seen = |terminal: bool, no_color: Option<&str>| {
        let mut command = if terminal {
            let mut command = crate::support::clean::command("script");
            command.args(["-qec", &words, "/dev/null"]);
            command
        } else {
            let mut command = crate::support::clean::command("sh");
            command.args(["-c", &words]);
            command
        };
        command.env_remove("NO_COLOR").env("TERM", "xterm").stdin(std::process::Stdio::null());
        command.envs(no_color.map(|value| ("NO_COLOR", value)));
        let done = finish(&mut command);
        done.says(0, &["LLC 1"]);
        done.out.contains('\u{1b}')
    };
    assert!(seen(true, None));
    assert!(seen(true, Some("")), "set to nothing is not set: no-color.org");
    assert!(!seen(true, Some("1")));
    assert!(!seen(false, None));
}

#[test]
fn a_picture_goes_into_a_file_or_to_standard_output() {
    let host = hosts::ryzen_5900x().tree().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.svg");
    let draw = |to: &str| {
        let mut command = crate::support::clean::command(env!("CARGO_BIN_EXE_qmpin"));
        command.args(["topology", "--sysroot"]).arg(host.path()).args(["--svg", to]);
        let done = finish(&mut command);
        done.says(0, &[]);
        done.out
    };
    assert_eq!(draw(file.to_str().unwrap()), "");
    let drawn = fs::read_to_string(&file).unwrap();
    assert!(drawn.starts_with("<svg ") && drawn.contains("LLC 1 · 32 MiB"), "{drawn}");
    assert_eq!(draw("-"), drawn);
}
