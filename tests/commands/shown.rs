//! Names and bytes from outside: whatever they are, a terminal shows them and does not obey them, JSON is JSON, and a
//! picture is well-formed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use proptest::prelude::*;

use qmpin::cpuset::CpuSet;
use qmpin::render::{Color, Owners, Picture, TopologyDocument};
use qmpin::sysroot::SysRoot;

use crate::support::hosts;
use crate::support::run::finish;

/// The files of a host that topology is read from, each of which can be spoilt.
const FILES: [&str; 15] = [
    "cpu/cpu0/topology/core_cpus_list",
    "cpu/cpu0/topology/package_cpus_list",
    "cpu/cpu0/topology/die_cpus_list",
    "cpu/cpu0/topology/physical_package_id",
    "cpu/cpu0/topology/die_id",
    "cpu/cpu0/cache/index3/level",
    "cpu/cpu0/cache/index3/type",
    "cpu/cpu0/cache/index3/shared_cpu_list",
    "cpu/cpu0/cache/index3/size",
    "cpu/present",
    "cpu/cpu1/topology/core_cpus_list",
    "node/online",
    "node/node0/cpulist",
    "node/node0/meminfo",
    "node/node0/distance",
];

/// What XML 1.0 forbids, what a terminal obeys, what hides or turns text around, and what is no UTF-8.
const ODD: [&[u8]; 16] = [
    b"\x1b[2J",
    b"\x00",
    b"\x07\x08\x0b",
    b"\x7f",
    b"\xc2\x9b31m",
    b"\xef\xbf\xbe",
    b"\xef\xbf\xbf",
    b"\xf0\x9f\xbf\xbe",
    b"\xe2\x80\xae",
    b"\xe2\x81\xa6",
    b"\xe2\x80\x8b",
    b"\xf3\xa0\x81\x81",
    b"\xff\xfe",
    b"<&>]]>\"'",
    b"\xe2\x80\xa8",
    b"0-1",
];

fn odd_text() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::sample::select(ODD.to_vec()).prop_map(<[u8]>::to_vec),
        any::<Vec<u8>>().prop_map(|bytes| bytes.into_iter().take(8).collect()),
        "[0-9,K -]{0,4}".prop_map(String::into_bytes),
    ];
    prop::collection::vec(piece, 1..6).prop_map(|pieces| pieces.concat())
}

/// Whether a terminal shows all of it: nothing but the ends of lines is obeyed.
fn is_shown(text: &str) -> bool {
    text.split('\n').all(|line| qmpin::shown::line(line) == line)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_spoilt_host_has_a_well_formed_picture_and_plain_text(
        spoilt in prop::collection::vec((prop::sample::select(FILES.to_vec()), odd_text()), 1..4),
    ) {
        let tree = hosts::two_cpus().tree().unwrap();
        for (path, bytes) in &spoilt {
            fs::write(tree.path().join("sys/devices/system").join(path), bytes).unwrap();
        }
        let topology = qmpin::discover::read_topology(&SysRoot::at(tree.path())).unwrap();
        let owners = Owners::none();
        let picture = Picture {
            topology: &topology,
            owners: &owners,
            reserved: CpuSet::EMPTY,
            shared: CpuSet::EMPTY,
            promises: &qmpin::promises::Promises::default(),
            width: 60,
            color: Color::Never,
        };
        let svg = picture.draw_svg();
        prop_assert!(roxmltree::Document::parse(&svg).is_ok(), "{svg}");
        let nbsp = |text: &str| text.replace('\u{a0}', " ");
        prop_assert!(is_shown(&nbsp(&svg)), "{svg:?}");
        let drawn = picture.draw();
        prop_assert!(is_shown(&drawn), "{drawn:?}");
        prop_assert!(drawn.lines().all(|line| line.chars().count() <= 60), "{drawn}");
        let json = serde_json::to_string(&TopologyDocument::new(&topology, &owners)).unwrap();
        let shown = qmpin::shown::json(&json);
        prop_assert!(is_shown(&shown), "{shown:?}");
        let same = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        prop_assert_eq!(same(&shown), same(&json));
    }
}

/// Runs qmpin and returns all it has printed, which must be shown in full.
fn printed(args: &[&str]) -> String {
    let mut command = crate::support::clean::command(env!("CARGO_BIN_EXE_qmpin"));
    let done = finish(command.args(args));
    let text = done.out.clone() + &done.err;
    assert!(is_shown(&text), "{args:?}: {text:?}");
    text
}

#[test]
fn words_of_other_programs_are_shown_and_not_obeyed() {
    let odd = "x\x1b[2J\u{9b}31m\u{202e}y";
    let shown = "x\\u{1b}[2J\\u{9b}31m\\u{202e}y";
    // The command line, of which the parser itself strips colours and the like; values; paths.
    let stripped = "x\\u{9b}31m\\u{202e}y";
    for args in [&["status", odd][..], &["plan", "100", "--vcpus", odd], &[odd]] {
        let text = printed(args);
        assert!(text.contains(stripped) || text.contains(shown), "{text}");
    }
    assert!(printed(&["topology", "--sysroot", odd]).contains(shown));
    assert!(printed(&["threads", "vm", "--qmp", &format!("/run/{odd}")]).contains(shown));
    // Two lines in one word are one line.
    let split = printed(&["threads", "vm", "--qmp", "/run/a\nhint: all is well"]);
    assert!(split.contains("/run/a\\nhint"), "{split}");
    // A policy file's keys and values.
    let dir = tempfile::tempdir().unwrap();
    let toml = "\"x\\u001b[2J\\u009b31m\\u202ey\"";
    for text in [format!("{toml} = 1\n"), format!("vcpus = {toml}\n"), format!("cores = {toml}\n")]
    {
        fs::write(dir.path().join("qmpin.toml"), text).unwrap();
        let config = dir.path().to_str().unwrap();
        let text = printed(&["config", "show", "100", "--config-dir", config]);
        // A value is shown as it stands in the file.
        assert!(text.contains(shown) || text.contains(toml), "{text}");
    }
    // A host's files.
    let host = hosts::two_cpus().tree().unwrap();
    let list = "sys/devices/system/cpu/cpu0/topology/core_cpus_list";
    fs::write(host.path().join(list), odd).unwrap();
    let root = host.path().to_str().unwrap();
    for args in [&["-vv"][..], &["--json"], &["--svg", "-"]] {
        let args = [&["topology", "--sysroot", root], args].concat();
        let mut command = crate::support::clean::command(env!("CARGO_BIN_EXE_qmpin"));
        let done = finish(command.args(&args));
        let text = (done.out.clone() + &done.err).replace('\u{a0}', " ");
        assert!(is_shown(&text), "{args:?}: {text:?}");
        let names_it = text.contains("\\u{202e}y");
        assert!(names_it || args.contains(&"--json"), "{args:?}: {text}");
    }
}
