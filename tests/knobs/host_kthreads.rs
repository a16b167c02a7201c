//! Kernel threads that are not among the children of their parent when these are read, as may be where others end at
//! that moment: they are kernel threads by their flag.

#![allow(clippy::expect_used)] // a test may end

use crate::support::host_world::{CHILDREN, CHILDREN_BEFORE, KTHREADS};
use crate::support::made_up::{BOOT, BOUND, MOVABLE, World, set};
use qmpin::ids::StartTicks;
use qmpin::knobs::host::keep::HostKnobs;
use qmpin::leases::Lease;
use qmpin::threads::ProcessKey;

/// One that is in no list.
const LEFT_OUT: i32 = 22;

fn world() -> World {
    let world = World::new();
    world.thread(LEFT_OUT, "kswapd2", MOVABLE, "2-5");
    world.thread(23, "ksoftirqd/4", BOUND, "4");
    world.thread(500, "kvm", 0, "0-7");
    world
}

/// What the kernel does as a partition comes: each is on all other CPUs.
fn exclusion_mask(world: &World, others: &str) {
    for tid in KTHREADS.map(|(tid, ..)| tid).into_iter().chain([LEFT_OUT]) {
        if tid != 30 {
            world.masks.of().insert(tid, set(others));
        }
    }
}

#[test]
fn one_that_is_left_out_before_there_is_a_partition_has_its_own_mask_back() {
    let world = world();
    let before = world.picture();
    world.strict("100", "4-7");
    world.remember();
    exclusion_mask(&world, "0-3");
    let mut knobs = HostKnobs::default();
    world.reconcile_with(&mut knobs);
    assert_eq!(world.mask(LEFT_OUT), set("2-3"));
    world.forget("100");
    exclusion_mask(&world, "0-7");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.changed_since(&before), [""; 0]);
}

#[test]
fn one_that_is_left_out_of_a_look_stays_where_it_is() {
    let world = world();
    world.strict("100", "4-7");
    let mut knobs = HostKnobs::default();
    world.reconcile_with(&mut knobs);
    for children in ["", "30 ", "20 30 ", CHILDREN_BEFORE] {
        world.write(CHILDREN, children);
        let report = world.reconcile_with(&mut knobs);
        assert_eq!(report.applied.len(), 0, "{children:?}: {:?}", report.applied);
        assert_eq!(world.mask(21), set("0-3"), "{children:?}");
    }
}

#[test]
fn one_that_comes_later_and_is_always_left_out_is_found_in_the_end() {
    let world = world();
    world.strict("100", "4-7");
    let mut knobs = HostKnobs::default();
    world.reconcile_with(&mut knobs);
    world.thread(24, "kswapd3", MOVABLE, "0-7");
    let looks = (1..100).find(|_| {
        knobs.reconcile(world.host(), &world.state, BOOT).expect("reconciled");
        world.mask(24) == set("0-3")
    });
    assert!(looks.is_some_and(|looks| looks > 1), "{looks:?}");
}

/// Two VMs end at the same moment: the one restores masks while the other's partition is still there.
#[test]
fn what_the_partition_of_another_vm_that_ends_cuts_is_restored_by_that_vm() {
    let world = world();
    let before = world.picture();
    let own = world.mask(21);
    let with_partition = |vm: &str, exclusive: &str| {
        world.strict(vm, exclusive);
        let name = vm.parse().expect("a name");
        let lease = world.state.lease(&name).expect("readable").expect("a lease");
        Lease { partition: Some(format!("qemu.slice/{vm}.scope")), ..lease }
    };
    let leases = [with_partition("100", "4-5"), with_partition("101", "6-7")];
    for lease in &leases {
        world.state.write_lease(lease).expect("written");
    }
    world.masks.partition("4-7");
    let mut knobs = [HostKnobs::default(), HostKnobs::default()];
    for one in &mut knobs {
        world.reconcile_with(one);
    }
    assert_eq!(world.mask(21), set("0-3"));
    // 101's QEMU has ended, and nothing else about it has been done yet.
    let ended = ProcessKey { start: StartTicks(1), ..leases[1].qemu };
    world.state.write_lease(&Lease { qemu: ended, ..leases[1].clone() }).expect("written");
    world.masks.partition("6-7");
    world.forget("100");
    let report = world.reconcile_with(&mut knobs[0]);
    let left = report.applied.iter().filter(|one| one.is_left_changed());
    assert_eq!(left.count(), 0, "{:?}", report.applied);
    assert_eq!(world.mask(21), own - set("6-7"));
    assert!(world.journal().is_some(), "101 finds in it what is left");
    world.masks.partition("");
    world.forget("101");
    let report = world.reconcile_with(&mut knobs[1]);
    assert!(report.applied.iter().all(|one| !one.is_left_changed()), "{:?}", report.applied);
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
    // 100's supervisor, which lives a moment longer, does not write it again.
    world.reconcile_with(&mut knobs[0]);
    assert_eq!(world.journal(), None);
}
