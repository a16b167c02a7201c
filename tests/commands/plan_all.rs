//! `qmpin plan --all`: every VM of a host at once, and what is left.

#![allow(clippy::expect_used)] // that is how a test says no

use serde_json::{Value, json};

use crate::world::World;

fn policy(world: &World, vm: u32, text: &str) {
    world.write(&format!("etc/qmpin/{vm}.toml"), text);
}

fn attached(world: &World, vm: u32, exclusive: &str, vcpus: &[(u32, u32)]) {
    let lease = json!({
        "schema": "qmpin.lease/1", "vm": vm.to_string(), "boot_id": "b", "qemu": {"pid": 1, "start": 1},
        "exclusive": exclusive, "emulator": "0", "iothreads": "0", "vcpus": vcpus,
    });
    world.write(&format!("run/qmpin/{vm}.lease"), &lease.to_string());
}

fn all(world: &World, code: i32, words: &[&str]) -> Value {
    world.document(code, &[&["plan", "--all"], words].concat())
}

/// What is said of each VM: state and CPUs.
fn of_vms(document: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let vms = document["vms"].as_array().expect("rows").iter();
    vms.map(|vm| [&vm["vm"], &vm["state"], &vm["exclusive"]].map(text).join(" ")).collect()
}

#[test]
fn the_largest_vm_is_placed_first_and_what_is_left_is_counted() {
    let world = World::new();
    world.vm(100, "cores: 2\n");
    policy(&world, 100, "");
    world.vm(101, "cores: 5\n");
    policy(&world, 101, "");
    world.vm(102, "cores: 1\n");
    world.write("etc/systemd/system/multi-user.target.wants/qmpin@102.path", "");
    world.vm(103, "cores: 4\n");
    let document = all(&world, 0, &[]);
    assert_eq!(document["schema"], "qmpin.plan-all/1");
    // 103 has no policy and is not enabled.
    assert_eq!(
        of_vms(&document),
        ["101 planned 6-10,18-22", "100 planned 1-2,13-14", "102 planned 11,23"]
    );
    assert_eq!(document["vms"][0]["plan"]["schema"], "qmpin.plan/1");
    assert_eq!(
        document["left"],
        json!([
            {"llc": 0, "node": 0, "cpus": "0-5,12-17", "free": "3-5,15-17", "free_cores": 3,
                "largest_vm_vcpus": 6},
            {"llc": 1, "node": 1, "cpus": "6-11,18-23", "free": "", "free_cores": 0, "largest_vm_vcpus": 0},
        ])
    );
    assert_eq!(document["largest_vm_vcpus"], 6);
    let text = String::from_utf8(world.run(&["plan", "--all"]).stdout).expect("text");
    for words in
        ["VM   STATE", "101  planned", "CPUs 6-11,18-23", "6 vCPUs", "LLC 1", " #  reserved"]
    {
        assert!(text.contains(words), "{words} is missing in\n{text}");
    }
}

#[test]
fn attached_vms_stay_unless_they_are_to_be_placed_anew() {
    let world = World::new();
    world.vm(100, "cores: 4\n");
    policy(&world, 100, "");
    world.vm(110, "cores: 2\n");
    attached(&world, 110, "6-7,18-19", &[(0, 6), (1, 7)]);
    let document = all(&world, 0, &[]);
    assert_eq!(of_vms(&document), ["110 attached 6-7,18-19", "100 planned 8-11,20-23"]);
    assert_eq!(
        (&document["vms"][0]["plan"], &document["vms"][0]["vcpu_count"]),
        (&json!(null), &json!(2))
    );
    assert_eq!(
        of_vms(&all(&world, 0, &["--replan"])),
        ["100 planned 6-9,18-21", "110 planned 10-11,22-23"]
    );
}

#[test]
fn what_does_not_fit_or_is_not_known_is_said_and_the_rest_is_planned() {
    let world = World::new();
    world.vm(100, "cores: 40\n");
    policy(&world, 100, "");
    world.vm(101, "cores: 2\n");
    policy(&world, 101, "vcpus = \"8-9\"\n");
    policy(&world, 102, "");
    world.vm(103, "cores: many\n");
    policy(&world, 103, "");
    world.vm(104, "cores: 2\n");
    policy(&world, 104, "vcpu = 1\n");
    // On another node of the cluster.
    world.write("etc/pve/qmpin/105.toml", "");
    let document = all(&world, 1, &[]);
    let reason = |vm: &str| -> String {
        let rows = document["vms"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["vm"] == vm).expect("listed");
        row["reason"].as_str().unwrap_or_default().to_owned()
    };
    assert!(reason("100").contains("40 vCPUs need a CPU each"), "{document}");
    assert!(reason("100").contains("--share would do"), "{document}");
    assert!(reason("102").contains("qemu-server/102.conf"), "{document}");
    assert!(reason("103").contains("cores: many"), "{document}");
    assert!(reason("104").contains("104.toml:1"), "{document}");
    let by_state = |state: &str| -> Vec<String> {
        of_vms(&document).into_iter().filter(|row| row.contains(state)).collect()
    };
    assert_eq!(by_state("planned"), ["101 planned 8-9"]);
    assert_eq!(by_state("infeasible"), ["100 infeasible "]);
    assert_eq!(document["vms"].as_array().map(Vec::len), Some(5));
}

/// Who is started first leaves the others what they are to have, where it loses nothing by that.
#[test]
fn one_vm_is_planned_as_it_is_among_all() {
    let world = World::new();
    let alone = |vm: &str| world.document(0, &["plan", vm]);
    world.vm(100, "cores: 2\n");
    policy(&world, 100, "");
    assert_eq!(alone("100")["exclusive"], "6-7,18-19");
    world.vm(101, "cores: 5\n");
    world.write("etc/systemd/system/multi-user.target.wants/qmpin@101.path", "");
    assert_eq!(of_vms(&all(&world, 0, &[]))[1], "100 planned 1-2,13-14");
    assert_eq!(alone("100")["exclusive"], "1-2,13-14");
    // Where that costs something it has what is best for it.
    world.vm(100, "cores: 4\nargs: -smp 12,cores=6,threads=2\n");
    assert_eq!(alone("100")["exclusive"], "6-11,18-23");
}

#[test]
fn it_is_drawn_as_a_picture_too() {
    let world = World::new();
    world.vm(100, "cores: 2\n");
    policy(&world, 100, "");
    let svg = String::from_utf8(world.run(&["plan", "--all", "--svg", "-"]).stdout).expect("text");
    let drawn = roxmltree::Document::parse(&svg).expect("well-formed");
    let texts: Vec<&str> = drawn.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.iter().any(|text| text.contains("100")), "{texts:?}");
    for words in [["--svg", "x", "--json"].as_slice(), &["100"], &["--explain"], &["--vcpus", "1"]]
    {
        assert_eq!(
            world.run(&[&["plan", "--all"], words].concat()).status.code(),
            Some(2),
            "{words:?}"
        );
    }
    let empty = World::new();
    let text = String::from_utf8(empty.run(&["plan", "--all"]).stdout).expect("text");
    assert!(text.starts_with("no VM of this host has a policy"), "{text}");
}
