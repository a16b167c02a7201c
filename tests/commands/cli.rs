//! What is said to a wrong word, a wrong file and a wrong folder: which, where, why, what next; and
//! nothing is touched.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::symlink;

use crate::support::qemu::{QemuOptions, wait_until};
use crate::support::run::{POLICY, Place, Stage, finish, needs_two_cpus};

#[test]
fn wrong_words_are_wrong_usage() {
    let place = Place::new();
    for (words, say) in [
        (&[][..], "Usage"),
        (&["pin"], "unrecognized subcommand"),
        (&["attach"], "<VM>"),
        (&["attach", "../100"], "is not a VM name"),
        (&["attach", "a b"], "is not a VM name"),
        (&["attach", ""], "is not a VM name"),
        (&["attach", "100", "101"], "unexpected argument"),
        (&["attach", "100", "--vcpus", "6-3"], "ends before it begins"),
        (&["attach", "100", "--vcpus", ""], "names no CPU"),
        (&["attach", "100", "--vcpus", "99999"], "99999"),
        (&["attach", "100", "--overflow", "drop"], "possible values"),
        (&["attach", "100", "--channel", "x"], "possible values"),
        (&["attach", "100", "--once", "--dry-run"], "cannot be used with"),
        (&["attach", "100", "--wait-s", "0"], "1..=3600"),
        (&["attach", "100", "--wait-s", "x"], "invalid"),
        (&["detach"], "<VM>"),
        (&["detach", "100", "--all"], "cannot be used with"),
        (&["threads", "100", "--quiet", "--verbose"], "cannot be used with"),
        (&["plan", "100", "--sysroot", "/nonexistent"], "--sysroot /nonexistent: not a folder"),
        (&["threads", "100", "--sysroot", "/nonexistent"], "not a folder"),
        (&["topology", "--sysroot", "/nonexistent"], "not a folder"),
        (&["topology", "--svg", "/nonexistent/x.svg"], "/nonexistent/x.svg: No such file"),
        (&["topology", "--svg", "x.svg", "--json"], "cannot be used with"),
    ] {
        let done = finish(&mut place.command(&[], place.path(), words));
        assert!(done.out.is_empty(), "{words:?}: {done:?}");
        assert!(!done.err.contains("panicked"), "{words:?}: {done:?}");
        done.says(2, &[say]);
    }
    for words in [&["--help"][..], &["--version"], &["attach", "--help"]] {
        let done = finish(&mut place.command(&[], place.path(), words));
        assert!(done.err.is_empty(), "{done:?}");
        done.says(0, &["qmpin"]);
    }
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn a_bad_policy_is_named_with_its_line_and_nothing_is_touched() {
    needs_two_cpus!("a_bad_policy_is_named_with_its_line_and_nothing_is_touched");
    let stage = Stage::new(&QemuOptions { iothreads: 1, ..QemuOptions::default() });
    let before = stage.masks();
    let huge = format!("# {}\n", "x".repeat(300 << 10));
    let deep = format!("vcpus = {}1{}\n", "[".repeat(100_000), "]".repeat(100_000));
    for (name, text, place, why) in [
        ("qmpin.toml", "share = true\nvcpus = \"1-\"\n", ":2:", "vcpus"),
        ("qmpin.toml", "share = true\n\nvcpu = \"1\"\n", ":3:", "did you mean `vcpus`?"),
        ("100.toml", "[host]\nreserved = \"0\"\n", ":1:", "belongs in qmpin.toml"),
        ("100.toml", "share = 1\n", ":1:", "true or false"),
        ("100.toml", "check_interval_s = 0\n", ":1:", "1 to 3600"),
        ("100.toml", "check_interval_s = 99999999999999999999\n", ":1:", ""),
        ("100.toml", "iothreads = \"0-99999\"\n", ":1:", "iothreads"),
        ("100.toml", "what is this\n", ":1:", ""),
        ("100.toml", "\0", ":1:", ""),
        ("100.toml", &deep, ":1:", ""),
        ("100.toml", &huge, "", "larger than"),
    ] {
        stage.place.config("qmpin.toml", POLICY);
        let path = stage.place.config(name, text);
        let named = format!("{}{place}", path.display());
        for command in
            [&["attach", "100"][..], &["attach", "100", "--once"], &["plan", "100", "--json"]]
        {
            let done = stage.run(command);
            assert!(done.out.is_empty(), "{done:?}");
            assert!(done.err.len() < 2000, "{}", done.err.len());
            done.says(2, &[&named, why, "hint: nothing was changed"]);
        }
        // Looking and restoring need no policy.
        stage.run(&["threads", "100"]).says(0, &[]);
        stage.run(&["detach", "100"]).says(0, &[]);
        fs::remove_file(&path).unwrap();
        stage.assert_untouched(&before);
    }
    let path = stage.place.config("100.toml", [0xff, 0xfe]);
    let named = path.display().to_string();
    stage.run(&["attach", "100"]).says(2, &["could not read the policy", &named, "not UTF-8"]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    stage.run(&["attach", "100"]).says(2, &["could not read the policy", &named, "directory"]);
    fs::remove_dir(&path).unwrap();
    symlink(&path, &path).unwrap();
    stage.run(&["attach", "100"]).says(2, &["could not read the policy", &named, "symbolic link"]);
    fs::remove_file(&path).unwrap();
    // Good TOML that this machine cannot serve.
    for (text, why) in [
        ("vcpus = \"1000\"\n", "1000"),
        ("vcpus = \"0\"\n", "reserved"),
        ("emulator = \"1000\"\n", "1000"),
    ] {
        let path = stage.place.config("100.toml", text);
        let done = stage.run(&["attach", "100"]);
        let code = done.code;
        assert!(matches!(code, Some(1 | 2)), "{text}: {done:?}");
        assert!(done.err.contains(why), "{text}: {done:?}");
        println!("{text:?}: {code:?} {}", done.err);
        fs::remove_file(&path).unwrap();
        stage.assert_untouched(&before);
    }
}

#[test]
fn a_state_folder_that_cannot_be_is_named() {
    needs_two_cpus!("a_state_folder_that_cannot_be_is_named");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let state = stage.place.state();
    let named = state.display().to_string();
    fs::write(&state, "").unwrap();
    stage.run(&["attach", "100"]).says(6, &["could not create", &named]);
    stage.run(&["detach", "100"]).says(6, &["could not", &named]);
    stage.run(&["detach", "--all"]).says(6, &["could not", &named]);
    fs::remove_file(&state).unwrap();
    symlink("/proc/nowhere", &state).unwrap();
    stage.run(&["attach", "100"]).says(6, &["could not create", &named]);
    fs::remove_file(&state).unwrap();
    assert_eq!(stage.masks(), before);
}

#[test]
fn garbage_in_the_state_folder_is_named_and_nothing_is_lost() {
    needs_two_cpus!("garbage_in_the_state_folder_is_named_and_nothing_is_lost");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let state = stage.place.state();
    fs::create_dir(&state).unwrap();
    let journal = state.join("100.journal");
    let named = journal.display().to_string();
    for garbage in [&b"garbage"[..], b"{}\n", b"\n", b"{\"schema\":\"other/1\"}\n", b"[1]\n"] {
        fs::write(&journal, garbage).unwrap();
        for command in [&["attach", "100"][..], &["attach", "100", "--once"], &["detach", "100"]] {
            stage.run(command).says(6, &[&named, "is not a journal", "keep a copy", "remove it"]);
            assert_eq!(fs::read(&journal).unwrap(), garbage);
        }
        assert_eq!(stage.masks(), before);
    }
    fs::write(&journal, [0xff, 0xfe, b'\n']).unwrap();
    stage.run(&["detach", "100"]).says(6, &[&named, "is not a journal"]);
    fs::remove_file(&journal).unwrap();
    // Begun and no more: the process that wrote it was killed before anything was moved.
    for torn in ["", "{\"sch", "{\"schema\":\"qmpin.journal/1\",\"vm\":\"1"] {
        fs::write(&journal, torn).unwrap();
        stage.run(&["detach", "100"]).says(0, &["not attached"]);
        stage.assert_untouched(&before);
        fs::write(&journal, torn).unwrap();
        stage.attach(&[]).end();
        stage.assert_untouched(&before);
    }

    // A line in the middle: the rest still counts, and it is said which.
    stage.attach(&[]).kill();
    let text = fs::read_to_string(&journal).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut spoilt = lines[..2].join("\n");
    spoilt.push_str("\nxxx\n");
    spoilt.push_str(&lines[2..].join("\n"));
    spoilt.push_str("\n{\"inte");
    fs::write(&journal, &spoilt).unwrap();
    stage.run(&["detach", "100"]).says(6, &["100.journal: line 3", "threads restored"]);
    assert_eq!(stage.masks(), before);
    fs::remove_file(&journal).unwrap();
    stage.run(&["detach", "100"]).says(0, &[]);
    stage.assert_untouched(&before);

    // Leases: one's own is written anew. What another VM has is not known, so nothing is taken, and its file stays.
    for garbage in ["", "{", "[]", "{\"schema\":\"other/1\"}", "\u{0}"] {
        fs::write(state.join("100.lease"), garbage).unwrap();
        let attached = stage.attach(&[]);
        wait_until("the lease is named", || attached.lines_with("100.lease") > 0);
        attached.end();
        stage.assert_untouched(&before);
        fs::write(state.join("101.lease"), garbage).unwrap();
        stage.run(&["attach", "100"]).says(1, &["101.lease", "delete it if no qmpin runs"]);
        assert_eq!(stage.masks(), before);
        assert_eq!(fs::read_to_string(state.join("101.lease")).unwrap(), garbage);
        fs::write(state.join("100.lease"), garbage).unwrap();
        stage.run(&["detach", "100"]).says(0, &[]);
        assert!(stage.place.left_behind().contains(&"101.lease".to_owned()));
        fs::remove_file(state.join("101.lease")).unwrap();
        stage.run(&["detach", "100"]).says(0, &[]);
        stage.assert_untouched(&before);
    }
    // Its own lease spoilt behind the supervisor's back: it is ended all the same.
    let mut attached = stage.attach(&[]);
    fs::write(state.join("100.lease"), "garbage").unwrap();
    stage.run(&["detach", "100"]).says(0, &[]);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    stage.assert_untouched(&before);
}

#[test]
fn standard_output_that_is_full_or_gone_is_no_bug() {
    let stage = Stage::new(&QemuOptions::default());
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for command in [&["threads", "100"][..], &["threads", "100", "--json"], &["topology"]] {
        let output = stage.command(command).stdout(full()).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(6), "{err}");
        assert!(err.contains("could not write to standard output: No space left"), "{err}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = stage.command(command).stdout(writer).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), err.as_str()), (Some(0), ""));
    }
}
