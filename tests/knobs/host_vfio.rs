//! Interrupts of devices that are passed through to a VM, on a made-up host.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

use std::fs;

use crate::support::made_up::{World, set};
use qmpin::discover;
use qmpin::ids::Pid;
use qmpin::policy::{Knob, Level, VfioIrqs};
use qmpin::sysroot::SysRoot;

/// This process as a QEMU that has the device 0000:0a:00.0, on node 0 (CPUs 0-3), and the device's
/// interrupts. `/dev/null` stands for the device file: it is a character device on every machine.
fn pass_through(world: &World, irqs: &[(u32, &str)]) {
    let root = world.root.root();
    let us = std::process::id();
    let stat = fs::read_to_string(format!("/proc/{us}/stat")).expect("we live");
    world.write(&format!("proc/{us}/stat"), &stat);
    world.write("sys/devices/virtual/vfio/12/name", "");
    world.write("sys/kernel/iommu_groups/12/devices/0000:0a:00.0", "");
    world.write("sys/bus/pci/devices/0000:0a:00.0/local_cpulist", "0-3\n");
    for (path, to) in [
        ("sys/dev/char/1:3", "../../devices/virtual/vfio/12"),
        ("dev/vfio/12", "/dev/null"),
        (&format!("proc/{us}/fd/5"), root.join("dev/vfio/12").to_str().expect("text")),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
        std::os::unix::fs::symlink(to, path).expect("linked");
    }
    for (number, cpus) in irqs {
        turn_on(world, *number, cpus);
    }
}

/// The guest turns an interrupt of its device on.
fn turn_on(world: &World, number: u32, cpus: &str) {
    world.write(&format!("proc/irq/{number}/smp_affinity_list"), &format!("{cpus}\n"));
    world.write(&format!("sys/bus/pci/devices/0000:0a:00.0/msi_irqs/{number}"), "");
    let actions = format!("vfio-msix[{number}](0000:0a:00.0)\n");
    world.write(&format!("sys/kernel/irq/{number}/actions"), &actions);
}

fn turn_off(world: &World, number: u32) {
    for path in [format!("proc/irq/{number}"), format!("sys/kernel/irq/{number}")] {
        fs::remove_dir_all(world.path(&path)).expect("removed");
    }
    let msi = format!("sys/bus/pci/devices/0000:0a:00.0/msi_irqs/{number}");
    fs::remove_file(world.path(&msi)).expect("removed");
}

#[test]
fn interrupts_of_a_vms_own_devices_go_where_its_policy_says_and_come_back() {
    for (to, expected) in [
        // The iothreads' part of the device's node.
        (VfioIrqs::Iothreads, ["0-1", "0-1"]),
        (VfioIrqs::Vcpus, ["4-5", "4-5"]),
        (VfioIrqs::Leave, ["0-7", "5"]),
    ] {
        let world = World::new();
        pass_through(&world, &[(40, "0-7"), (41, "5")]);
        let before = world.picture();
        world.lease_with("100", "4-5", Level::Exclusive.knobs(), |lease| {
            lease.vfio_irqs = to;
            lease.iothreads = set("0-1,6-7");
            lease.vcpus = serde_json::from_str("[[0,4],[1,5]]").expect("pins");
        });
        assert!(!world.reconcile().fell_short());
        let found = [40, 41].map(|irq| world.read(&format!("proc/irq/{irq}/smp_affinity_list")));
        assert_eq!(found, expected, "{to:?}");
        assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "0-3,6-7", "the host's own");
        assert!(world.reconcile().applied.is_empty(), "a second time there is nothing to do");
        world.forget("100");
        world.reconcile();
        assert_eq!(world.changed_since(&before), [""; 0], "{to:?}");
        assert_eq!(world.journal(), None);
    }
}

#[test]
fn without_irqs_a_vms_own_devices_are_as_any_other_to_its_neighbour() {
    let world = World::new();
    pass_through(&world, &[(40, "0-7")]);
    world.lease_with("100", "4-5", [Knob::Kthreads], |lease| lease.vfio_irqs = VfioIrqs::Vcpus);
    world.reconcile();
    assert_eq!(world.read("proc/irq/40/smp_affinity_list"), "0-7");
    let neighbour = discover::process_key(&SysRoot::live(), Pid(1)).expect("it lives");
    world.lease_with("101", "2-3", [Knob::Irqs], |lease| lease.qemu = neighbour);
    world.reconcile();
    assert_eq!(world.read("proc/irq/40/smp_affinity_list"), "0-1,4-7");
}

/// A guest turns MSI-X on and off as it boots. What is created while VMs are kept free has a mask of qmpin's
/// making.
#[test]
fn an_interrupt_that_the_guest_turns_on_later_is_moved_and_let_out_in_the_end() {
    let world = World::new();
    pass_through(&world, &[(40, "0-7")]);
    world.lease_with("100", "4-5", Level::Exclusive.knobs(), |lease| lease.iothreads = set("1-2"));
    world.reconcile();
    assert_eq!(world.read("proc/irq/default_smp_affinity"), "000000cf");
    turn_off(&world, 40);
    turn_on(&world, 41, "0-3,6-7");
    turn_on(&world, 42, "0-3");
    turn_on(&world, 43, "6");
    world.reconcile();
    for (irq, before) in [(41, "0-7"), (42, "0-3"), (43, "6")] {
        assert_eq!(world.read(&format!("proc/irq/{irq}/smp_affinity_list")), "1-2");
        let record = format!(
            r#"{{"original":{{"place":{{"cpu_list":"proc/irq/{irq}/smp_affinity_list"}},"value":{{"cpus":"{before}"}}}}}}"#
        );
        let journal = world.journal().expect("a journal");
        let intent = format!(r#""from":{{"cpus":"{before}"}},"to":{{"cpus":"1-2"}}"#);
        assert!(journal.contains(&record) || journal.contains(&intent), "{irq}: {journal}");
    }
    world.forget("100");
    world.reconcile();
    for (irq, before) in [(41, "0-7"), (42, "0-3"), (43, "6")] {
        assert_eq!(world.read(&format!("proc/irq/{irq}/smp_affinity_list")), before);
    }
    assert_eq!(world.journal(), None);
}

/// Where its policy leaves it, it is what it would be without qmpin, also after the guest has turned it on anew.
#[test]
fn released_interrupt_gets_the_default_mask() {
    let world = World::new();
    pass_through(&world, &[(40, "0-7")]);
    world.lease_with("100", "4-5", Level::Exclusive.knobs(), |lease| {
        lease.vfio_irqs = VfioIrqs::Leave;
    });
    world.reconcile();
    turn_off(&world, 40);
    turn_on(&world, 40, "0-3,6-7");
    turn_on(&world, 41, "6");
    world.reconcile();
    let found = [40, 41].map(|irq| world.read(&format!("proc/irq/{irq}/smp_affinity_list")));
    assert_eq!(found, ["0-7", "6"]);
    world.reconcile();
    world.forget("100");
    world.reconcile();
    let found = [40, 41].map(|irq| world.read(&format!("proc/irq/{irq}/smp_affinity_list")));
    assert_eq!(found, ["0-7", "6"]);
    assert_eq!(world.journal(), None);
}
