//! Interrupts that are created while VMs are kept free of them, on a made-up host.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

use crate::support::made_up::World;

fn irq(world: &World, number: u32) -> String {
    world.read(&format!("proc/irq/{number}/smp_affinity_list"))
}

fn turn(world: &World, number: u32, cpus: &str) {
    world.write(&format!("proc/irq/{number}/smp_affinity_list"), &format!("{cpus}\n"));
}

/// The kernel gives it the mask of new ones, which has no CPU of a VM's, and would leave it there.
#[test]
fn interrupt_created_with_the_exclusion_mask_is_restored() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    turn(&world, 60, "0-3,6-7");
    turn(&world, 61, "6");
    world.reconcile();
    assert_eq!((irq(&world, 60), irq(&world, 61)), ("0-3,6-7".to_owned(), "6".to_owned()));
    world.strict("101", "2-3");
    world.reconcile();
    assert_eq!(irq(&world, 60), "0-1,6-7");
    world.forget("101");
    world.reconcile();
    assert_eq!(irq(&world, 60), "0-3,6-7");
    // No process has seen it before the last VM went.
    turn(&world, 62, "0-3,6-7");
    world.forget("100");
    assert!(!world.reconcile().fell_short());
    let found = [60, 61, 62].map(|number| irq(&world, number));
    assert_eq!(found, ["0-7", "6", "0-7"], "another program moved 61");
    assert_eq!(world.journal(), None);
}

#[test]
fn an_interrupt_of_a_devices_node_is_let_out_on_that_node() {
    let world = World::new();
    for (node, cpus) in [("node0", "0-5\n"), ("node1", "6-7\n")] {
        world.write(&format!("sys/devices/system/node/{node}/cpulist"), cpus);
    }
    world.strict("100", "4-5");
    world.reconcile();
    for (number, node, cpus) in [(60, "0", "0-3"), (61, "1", "6-7"), (62, "-1", "0-3")] {
        world.write(&format!("proc/irq/{number}/node"), node);
        turn(&world, number, cpus);
    }
    world.reconcile();
    world.forget("100");
    world.reconcile();
    assert_eq!([60, 61, 62].map(|number| irq(&world, number)), ["0-5", "6-7", "0-3"]);
    assert_eq!(world.journal(), None);
}

/// What is there before new ones go elsewhere was not created so, whatever it looks like.
#[test]
fn interrupt_that_looks_new_keeps_its_external_mask() {
    let world = World::new();
    turn(&world, 60, "0-3,6-7");
    turn(&world, 61, "0-1,4-7");
    turn(&world, 62, "0-1,6-7");
    let before = world.picture();
    world.strict("100", "4-5");
    world.reconcile();
    world.strict("101", "2-3");
    world.reconcile();
    world.reconcile();
    assert_eq!(irq(&world, 61), "0-1,6-7");
    // By now it is what new ones get.
    world.forget("100");
    world.reconcile();
    world.reconcile();
    assert_eq!([60, 61, 62].map(|number| irq(&world, number)), ["0-1,6-7", "0-1,4-7", "0-1,6-7"]);
    world.forget("101");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

#[test]
fn later_external_change_of_an_interrupt_is_kept_and_named() {
    let world = World::new();
    let named = || {
        let applied = world.reconcile().applied.into_iter();
        let steps = applied.map(|one| format!("{:?}", one.step));
        let mut named: Vec<String> = steps.filter(|step| step.starts_with("LeaveAlone")).collect();
        named.retain(|step| step.contains("/irq/"));
        named.len()
    };
    turn(&world, 60, "0-3,6-7");
    world.strict("100", "4-5");
    assert_eq!(named(), 0);
    turn(&world, 60, "1");
    turn(&world, 61, "0-3,6-7");
    assert_eq!(named(), 1, "60, which no program has written");
    turn(&world, 61, "2");
    world.forget("100");
    assert_eq!(named(), 1, "61, which was created so");
    assert_eq!((irq(&world, 60), irq(&world, 61)), ("1".to_owned(), "2".to_owned()));
    assert_eq!(world.journal(), None);
}
