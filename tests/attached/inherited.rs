//! The tests' children do not depend on who runs the tests: `nohup tests/run`, a strict umask, few files, a service.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Command, Stdio};

use crate::support::clean;

/// Set where this binary runs as the child of [`a_child_has_what_a_login_has`].
const SPOILT: &str = "QMPIN_TEST_SPOILT";

/// As the worst of shells would start the tests.
const SPOIL: &str = "trap '' HUP INT TERM USR1 PIPE; umask 077; ulimit -S -n 64; exec \"$@\" <&-";

#[test]
fn a_child_has_what_a_login_has() {
    let me = std::env::current_exe().unwrap();
    let mut spoilt = Command::new("sh");
    spoilt.args(["-c", SPOIL, "sh"]).arg(me);
    spoilt
        .args(["inherited::in_a_spoilt_process", "--exact", "--nocapture"])
        .stdout(Stdio::piped());
    for name in [SPOILT, "NOTIFY_SOCKET", "JOURNAL_STREAM", "NO_COLOR", "COLUMNS", "QMPIN_X"] {
        spoilt.env(name, "1");
    }
    spoilt.env("LC_ALL", "de_DE.UTF-8").env("TERM", "dumb");
    let done = spoilt.output().unwrap();
    let out = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && out.contains("looked at a child"), "{done:?}");
}

#[test]
fn in_a_spoilt_process() {
    if std::env::var_os(SPOILT).is_none() {
        return;
    }
    let look = "grep SigIgn /proc/self/status; umask; ulimit -S -n; env; readlink /proc/self/fd/0";
    let done = clean::command("sh").args(["-c", look]).output().unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    let mut lines = text.lines();
    let ignored = lines.next().and_then(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    // Those beyond are the C library's own.
    assert_eq!(ignored & 0x7fff_ffff, 0, "{text}");
    assert_eq!((lines.next(), lines.next()), (Some("0022"), Some("1024")), "{text}");
    for line in lines.filter(|line| *line != "/dev/null") {
        let name = line.split('=').next().unwrap();
        assert!(
            [
                "PATH",
                "HOME",
                "USER",
                "TMPDIR",
                "LC_ALL",
                "PWD",
                "_",
                "LLVM_PROFILE_FILE",
                "SHLVL",
                "OLDPWD"
            ]
            .contains(&name),
            "{line}"
        );
    }
    assert!(text.contains("LC_ALL=C.UTF-8") && text.ends_with("/dev/null\n"), "{text}");
    println!("looked at a child");
}
