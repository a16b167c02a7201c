//! `qmpin plan` of a VM that does not run: planned from its Proxmox configuration.

#![allow(clippy::expect_used)] // that is how a test says no

use serde_json::Value;

use crate::world::World;

fn planned(world: &World) -> Value {
    world.document(0, &["plan", "100"])
}

fn cpus(plan: &Value) -> Vec<&str> {
    let rows = plan["vcpus"].as_array().expect("rows").iter();
    rows.map(|row| row["cpus"].as_str().expect("a cpulist")).collect()
}

#[test]
fn a_stopped_vm_is_planned_from_its_configuration() {
    let world = World::new();
    world.vm(
        100,
        "cores: 4\nmemory: 8192\nnuma: 1\nnuma0: cpus=0-3,hostnodes=0,memory=8192,policy=bind\n\
         scsihw: virtio-scsi-single\nscsi0: local:vm-100-disk-0,iothread=1\n\n[old]\ncores: 1\n",
    );
    let plan = planned(&world);
    assert!(
        plan["from"].as_str().is_some_and(|from| from.ends_with("qemu-server/100.conf")),
        "{plan}"
    );
    assert_eq!(cpus(&plan), ["1", "2", "3", "4"], "on the memory's node");
    assert_eq!(plan["memory"]["local_mib"], 8192, "{plan}");
    assert_eq!(plan["iothreads"][0]["iothread"], "iothread-virtioscsi0");
    world.vm(100, "cores: 4\nargs: -smp 4,cores=2,threads=2\n");
    assert_eq!(cpus(&planned(&world)), ["6", "18", "7", "19"], "guest siblings on siblings");
    let text = world.run(&["plan", "100", "--explain"]);
    let text = String::from_utf8(text.stdout).expect("text");
    for words in ["VM 100 does not run; planned from ", "vcpu 1", "guest-siblings", "met"] {
        assert!(text.contains(words), "{words} is missing in\n{text}");
    }
}

#[test]
fn what_does_not_fit_or_cannot_be_known_is_said() {
    let world = World::new();
    let says = |code: i32, words: &[&str]| {
        let done = world.run(&["plan", "100"]);
        let err = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{err}");
        assert!(words.iter().all(|word| err.contains(word)), "{err}");
    };
    says(3, &["VM 100 is not running", "qemu-server/100.conf"]);
    world.vm(100, "cores: many\n");
    says(3, &["VM 100 is not running", "cores: many"]);
    world.vm(100, "cores: 64\n");
    says(1, &["64 vCPUs need a CPU each"]);
    // What would be done now is done to a VM that runs.
    world.vm(100, "cores: 2\n");
    let done = world.run(&["attach", "100", "--dry-run"]);
    assert_eq!(done.status.code(), Some(3), "{done:?}");
}
