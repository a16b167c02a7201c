//! The picture of `qmpin topology` and its JSON document. `QMPIN_BLESS=1` writes the pictures anew;
//! then look at them.

#![allow(clippy::expect_used)] // helpers of tests say no as tests do

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use qmpin::cpuset::CpuSet;
use qmpin::ids::CpuId;
use qmpin::promises::{Promise, Promises, Strength};
use qmpin::render::{Color, Owners, Picture, TopologyDocument};
use qmpin::topology::Topology;

use crate::support::fake_host::FakeHost;
use crate::support::hosts;

fn set(text: &str) -> CpuSet {
    text.parse().expect("a cpulist")
}

fn owners(vms: &[(&str, &str)]) -> Owners {
    vms.iter().map(|(name, cpus)| (name.parse().expect("a VM name"), set(cpus))).collect()
}

fn draw(topology: &Topology, owners: &Owners, width: usize) -> String {
    let (reserved, shared) = (CpuSet::EMPTY, CpuSet::EMPTY);
    let promises = &Promises::default();
    Picture { topology, owners, reserved, shared, promises, width, color: Color::Never }.draw()
}

/// Compares with `tests/pictures/NAME.txt`.
#[track_caller]
fn golden(name: &str, host: &FakeHost, reserved: &str, shared: &str, vms: &[(&str, &str)]) {
    let (topology, owners) = (host.topology(), owners(vms));
    let picture = Picture {
        topology: &topology,
        owners: &owners,
        reserved: set(reserved),
        shared: set(shared),
        promises: &Promises::default(),
        width: 80,
        color: Color::Never,
    };
    let drawn = picture.draw();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/pictures/{name}.txt"));
    if std::env::var_os("QMPIN_BLESS").is_some() {
        fs::write(&path, &drawn).expect("the picture written");
    }
    let expected = fs::read_to_string(&path).expect("the picture; QMPIN_BLESS=1 makes it");
    assert!(drawn == expected, "{name} is now drawn as\n{drawn}\nand not as\n{expected}");

    // Colours change nothing but colours.
    let colored = Picture { color: Color::Always, ..picture }.draw();
    assert_ne!(colored, drawn);
    assert_eq!(without_colors(&colored), drawn);
}

/// The CPUs of an SVG picture by their titles, `CPU 12: VM 100`. All that is drawn is on the sheet.
fn cpus_in_svg(drawn: &str) -> Vec<(usize, String)> {
    let document = roxmltree::Document::parse(drawn).expect("XML");
    let sheet = document.root_element();
    let number = |node: roxmltree::Node<'_, '_>, name: &str| -> usize {
        node.attribute(name).expect(name).parse().expect("a number")
    };
    let (width, height) = (number(sheet, "width"), number(sheet, "height"));
    let mut cpus = Vec::new();
    for node in sheet.descendants() {
        let shift = |node: &roxmltree::Node<'_, '_>| {
            let text = node
                .attribute("transform")
                .map(|text| text.trim_start_matches("translate(").trim_end_matches(')').to_owned());
            let (left, top) =
                text.as_deref().and_then(|text| text.split_once(' ')).unwrap_or(("0", "0"));
            (left.parse::<usize>().expect("left"), top.parse::<usize>().expect("top"))
        };
        let (left, top) =
            node.ancestors().map(|node| shift(&node)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        match node.tag_name().name() {
            "rect" => {
                let at = |name| node.attribute(name).map_or(0, |_| number(node, name));
                assert!(left + at("x") + number(node, "width") <= width, "{node:?}");
                assert!(top + at("y") + number(node, "height") <= height, "{node:?}");
            }
            "title" => {
                let (cpu, whose) = node
                    .text()
                    .and_then(|text| text.strip_prefix("CPU ")?.split_once(": "))
                    .expect("a CPU");
                cpus.push((cpu.parse().expect("a number"), whose.to_owned()));
            }
            _ => {}
        }
    }
    cpus.sort_unstable();
    cpus
}

fn without_colors(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap_or_default();
    let rest = parts.map(|part| part.split_once('m').map_or(part, |(_, text)| text));
    let plain: String = std::iter::once(first).chain(rest).collect();
    plain.lines().flat_map(|line| [line.trim_end(), "\n"]).collect()
}

#[test]
fn a_5900x_with_two_vms_is_drawn() {
    let vms = [("100", "6-11,18-23"), ("win11", "2-3,14-15")];
    golden("5900x", &hosts::ryzen_5900x(), "0,12", "1,13", &vms);
}

#[test]
fn a_7950x3d_shows_which_ccd_has_the_large_cache() {
    golden("7950x3d", &hosts::ryzen_7950x3d(), "8,24", "", &[("100", "0-7,16-23")]);
}

#[test]
fn a_13900k_shows_both_kinds_of_cores() {
    golden("13900k", &hosts::i9_13900k(), "0-1", "16-19", &[("100", "4-15")]);
}

#[test]
fn an_epyc_of_four_nodes_is_drawn() {
    let vms = [("100", "16-31,80-95"), ("101", "4-7,68-71"), ("102", "32-35"), ("103", "36-39")];
    golden("epyc-4n16l", &hosts::epyc_4n_16l(), "0,64", "1,65", &vms);
}

#[test]
fn a_machine_of_256_cpus_is_drawn() {
    let vms = [("100", "64-127,192-255"), ("101", "8-15,136-143")];
    golden("epyc-2s-256", &hosts::epyc_2s_256(), "0,128", "1,129", &vms);
}

#[test]
fn holes_offline_cpus_and_nodes_without_cpus_or_memory_are_drawn() {
    golden("sparse", &hosts::sparse(), "4,28", "", &[("100", "16,40")]);
}

#[test]
fn unknown_values_are_reported() {
    let dir = hosts::no_numa_no_caches().tree().expect("a tree");
    let root = qmpin::sysroot::SysRoot::at(dir.path());
    let topology = qmpin::discover::read_topology(&root).expect("a topology");
    let picture = draw(&topology, &Owners::none(), 80);
    assert!(picture.contains("not known: the LLC of CPUs 0-7: could not read"), "{picture}");
    assert!(picture.contains("not known: the NUMA nodes"), "{picture}");
    assert!(picture.contains("┌ no known LLC"), "{picture}");
}

#[test]
fn an_owner_shows_on_a_cpu_that_the_host_reserves() {
    let (topology, owners) = (hosts::two_cpus().topology(), owners(&[("100", "0")]));
    let (reserved, shared) = (set("0-1"), set("0"));
    let width = 80;
    let picture = Picture {
        topology: &topology,
        owners: &owners,
        reserved,
        shared,
        promises: &Promises::default(),
        width,
        color: Color::Never,
    }
    .draw();
    assert!(picture.contains("│ 0 A    │ 1 #    │"), "{picture}");
    assert!(!picture.contains('+'), "a mark that is not drawn has no line below: {picture}");
}

#[test]
fn an_svg_says_whose_each_cpu_is_and_what_is_not_known() {
    let topology = hosts::ryzen_5900x().with_offline(&[13]).topology();
    let owners = owners(&[("100", "6-11,18-23"), ("win11", "2,14")]);
    let (reserved, shared) = (set("0,12"), set("1"));
    let picture = Picture {
        topology: &topology,
        owners: &owners,
        reserved,
        shared,
        promises: &Promises::default(),
        width: 80,
        color: Color::Always,
    };
    let drawn = picture.draw_svg();
    let cpus = cpus_in_svg(&drawn);
    let whose =
        |cpu| cpus.iter().find(|(number, _)| *number == cpu).map(|(_, whose)| whose.as_str());
    for (cpu, expected) in [
        (0, Some("reserved for the host")),
        (1, Some("shared by all VMs")),
        (3, Some("free")),
        (13, None),
        (14, Some("VM win11")),
        (23, Some("VM 100")),
    ] {
        assert_eq!(whose(cpu), expected, "CPU {cpu}");
    }
    assert!(!drawn.contains('\x1b'), "colours of a terminal: {drawn}");
    for text in ["node 0 · 64 GiB", "LLC 1 · 32 MiB", "offline: 13", "VM win11: 2,14"] {
        assert!(drawn.contains(text), "{text}: {drawn}");
    }
    let dir = hosts::no_numa_no_caches().tree().expect("a tree");
    let root = qmpin::sysroot::SysRoot::at(dir.path());
    let unknown = qmpin::discover::read_topology(&root).expect("a topology");
    let picture = Picture { topology: &unknown, ..picture };
    assert!(picture.draw_svg().contains("not known: the LLC of CPUs 0-7"));
}

#[test]
fn a_cpu_has_one_owner_the_first() {
    let mut owners = owners(&[("100", "0-3"), ("101", "2-5")]);
    owners.add("100".parse().expect("a VM name"), set("8"));
    assert_eq!(owners.cpus(), set("0-5,8"));
    let name = |cpu| {
        let cpu = CpuId::from_index(cpu).expect("a CPU number");
        owners.of(cpu).map(|vm| vm.as_str().to_owned())
    };
    assert_eq!(name(2).as_deref(), Some("100"));
    assert_eq!(name(4).as_deref(), Some("101"));
    assert_eq!(name(8).as_deref(), Some("100"));
    assert_eq!(name(9), None);
}

#[test]
fn more_vms_than_letters_share_a_mark() {
    let topology = hosts::epyc_2s_256().topology();
    let owners: Owners = (0..120)
        .filter_map(|at| {
            let vm = (100 + at).to_string().parse().ok()?;
            Some((vm, CpuSet::single(CpuId::from_index(at)?)))
        })
        .collect();
    let picture = draw(&topology, &owners, 80);
    assert!(picture.contains(" 51z  52*"), "{picture}");
    assert!(picture.contains(" *  68 other VMs"), "{picture}");
    assert!(picture.lines().count() <= 100);
}

#[test]
fn the_document_keeps_its_contract() {
    let mut host = hosts::ryzen_5900x().with_offline(&[13]);
    host.cpus.retain(|cpu| cpu.id % 12 < 2);
    let topology = host.topology();
    let owners = owners(&[("100", "0,12")]);
    let document = serde_json::to_string(&TopologyDocument::new(&topology, &owners));
    let node = r#"{"node":0,"cpus":"0-1,12","memory_bytes":68719476736,"distances":[10]}"#;
    let expected = [
        r#"{"schema":"qmpin.topology/1","cpus":["#,
        r#"{"cpu":0,"online":true,"package":0,"die":0,"node":0,"llc":0,"core":0,"siblings":"0,12","kind":null,"owner":"100"},"#,
        r#"{"cpu":1,"online":true,"package":0,"die":0,"node":0,"llc":0,"core":1,"siblings":"1","kind":null,"owner":null},"#,
        r#"{"cpu":12,"online":true,"package":0,"die":0,"node":0,"llc":0,"core":0,"siblings":"0,12","kind":null,"owner":"100"},"#,
        r#"{"cpu":13,"online":false,"package":null,"die":null,"node":null,"llc":null,"core":null,"siblings":null,"kind":null,"owner":null}"#,
        r#"],"llcs":[{"llc":0,"cpus":"0-1,12","size_bytes":33554432}],"nodes":["#,
        node,
        "]}",
    ];
    assert_eq!(document.expect("JSON"), expected.concat());

    let hybrid = hosts::i9_13900k().topology();
    let document = serde_json::to_value(TopologyDocument::new(&hybrid, &Owners::none()));
    let document = document.expect("JSON");
    assert_eq!(document["cpus"][0]["kind"], "performance");
    assert_eq!(document["cpus"][31]["kind"], "efficiency");
}

/// The numbers drawn above the legend, which is the last block.
fn numbers_drawn(picture: &str) -> Vec<usize> {
    let is_cell = |line: &&str| {
        line.contains('│') || line.chars().all(|c| c.is_ascii_digit() || " ·A".contains(c))
    };
    let body = picture.rsplit_once("\n\n").map_or("", |(body, _)| body);
    let mut numbers: Vec<usize> = body
        .lines()
        .skip(1)
        .filter(is_cell)
        .flat_map(|line| line.split(|c: char| !c.is_ascii_digit()))
        .filter_map(|number| number.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn no_picture_is_wider_than_the_terminal_or_longer_than_100_lines() {
    for (name, host) in hosts::all() {
        let topology = host.topology();
        for width in [24, 30, 40, 60, 80, 100, 132, 200, 500] {
            let picture = draw(&topology, &Owners::none(), width);
            for line in picture.lines() {
                assert!(line.chars().count() <= width, "{name} at {width}: {line}");
            }
            assert!(width < 80 || picture.lines().count() <= 100, "{name} at {width}");
        }
    }
}

proptest! {
    #[test]
    fn every_online_cpu_is_drawn_once_and_within_the_width(
        host in hosts::any_host(),
        width in 40..160usize,
        owned in prop::collection::vec(0..64usize, 0..20),
    ) {
        let topology = host.topology();
        let owned: CpuSet = owned.into_iter().filter_map(CpuId::from_index).collect();
        let mut owners = Owners::none();
        owners.add("100".parse().expect("a VM name"), owned);
        let picture = draw(&topology, &owners, width);
        for line in picture.lines() {
            prop_assert!(line.chars().count() <= width, "{line}");
            prop_assert_eq!(line.trim_end(), line);
        }
        let online: Vec<usize> = topology.online().iter().map(|cpu| cpu.index()).collect();
        prop_assert_eq!(numbers_drawn(&picture), &online[..], "{}", picture);
        let (reserved, shared) = (CpuSet::EMPTY, CpuSet::EMPTY);
        let owners = &owners;
        let color = Color::Never;
        let promises = &Promises::default();
        let picture = Picture { topology: &topology, owners, reserved, shared, promises, width, color };
        let whose = |cpu: usize| if owned.contains(CpuId::from_index(cpu).expect("a CPU")) { "VM 100" } else { "free" };
        let expected: Vec<(usize, String)> =
            online.into_iter().map(|cpu| (cpu, whose(cpu).to_owned())).collect();
        prop_assert_eq!(cpus_in_svg(&picture.draw_svg()), expected);
    }
}

#[test]
fn what_others_were_promised_is_marked_and_named() {
    let topology = hosts::ryzen_5900x().topology();
    let owners = owners(&[("100", "6-7,18-19")]);
    let promise = |what: &str, cpus: &str, strength| Promise {
        what: what.to_owned(),
        cpus: set(cpus),
        tid: None,
        strength,
    };
    let mut promises = Promises {
        made: vec![
            promise("kubepods.slice (cpuset.cpus.partition)", "8,20", Strength::Hard),
            promise("dp.service (tid 512)", "9", Strength::Soft),
            promise("a VM's", "6", Strength::Soft),
        ],
        isolated: set("1-2,13-14"),
    };
    let draw = |promises: &Promises| {
        let (topology, owners) = (&topology, &owners);
        let (reserved, shared) = (set("0,12"), CpuSet::EMPTY);
        let color = Color::Never;
        Picture { topology, owners, reserved, shared, promises, width: 80, color }.draw()
    };
    let picture = draw(&promises);
    for row in [
        "│  0 # │  1 : │  2 : │  3 · │",
        "│  6 A │  7 A │  8 ! │  9 ~ │",
        " :  isolated at boot, free                  1-2,13-14\n",
        " !  kubepods.slice (cpuset.cpus.partition)  8,20\n",
        " ~  dp.service (tid 512)                    9\n",
    ] {
        assert!(picture.contains(row), "{row} is missing in\n{picture}");
    }
    assert!(!picture.contains("a VM's"), "what is not drawn has no line:\n{picture}");
    let many = (0..20).map(|at| promise(&format!("unit{at}"), "3-4", Strength::Soft));
    promises.made.extend(many);
    let picture = draw(&promises);
    assert_eq!(picture.lines().filter(|line| line.starts_with(" ~ ")).count(), 7, "{picture}");
    assert!(picture.contains(" ~  15 others"), "{picture}");
}
