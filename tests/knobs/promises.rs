//! What others were promised, as it is read on made-up hosts.
#![allow(clippy::expect_used)] // that is how a test says no

use qmpin::cgroups::CgroupTree;
use qmpin::discover::{Known, promises};
use qmpin::ids::Pid;
use qmpin::promises::{Promises, Strength};

use crate::support::made_up::{MOVABLE, World, set};

const CGROUP: &str = "sys/fs/cgroup";

/// A host of 24 CPUs with a VM as process 500, which qmpin is about to attach.
fn host() -> World {
    let world = World::empty();
    world.write("sys/devices/system/cpu/online", "0-23\n");
    world.write("sys/devices/system/cpu/isolated", "\n");
    world.write("sys/devices/system/cpu/nohz_full", "(null)\n");
    world.write(&format!("{CGROUP}/cpuset.cpus.effective"), "0-23\n");
    process(&world, 500, "CPU 0/KVM", "qemu.slice/100.scope", "3");
    world.write(&format!("{CGROUP}/qemu.slice/100.scope/cgroup.procs"), "500\n");
    for group in ["qemu.slice", "system.slice", "user.slice"] {
        limit(&world, group, "cpuset.cpus", "");
        limit(&world, group, "cpuset.cpus.exclusive", "");
    }
    world
}

fn limit(world: &World, group: &str, file: &str, text: &str) {
    world.write(&format!("{CGROUP}/{group}/{file}"), &format!("{text}\n"));
}

fn process(world: &World, pid: i32, comm: &str, cgroup: &str, cpus: &str) {
    world.thread(pid, comm, 0, cpus);
    world.write(&format!("proc/{pid}/cgroup"), &format!("0::/{cgroup}\n"));
}

fn known(limits: &[(&str, &str)]) -> Known {
    let limits = limits.iter().map(|(group, cpus)| ((*group).to_owned(), set(cpus)));
    Known { processes: vec![Pid(500)], qemus: vec![Pid(500)], limits: limits.collect() }
}

fn read(world: &World, known: &Known) -> Promises {
    let tree = CgroupTree::of(&world.root);
    promises(&world.root, &world.masks, &tree, known)
}

/// Each as "hard: who: CPUs", sorted.
fn said(promises: &Promises) -> Vec<String> {
    let strength = |strength| if strength == Strength::Hard { "hard" } else { "soft" };
    let made = promises.made.iter();
    let mut said: Vec<String> = made
        .map(|made| format!("{}: {}: {}", strength(made.strength), made.what, made.cpus))
        .collect();
    said.sort();
    said
}

#[test]
fn a_host_where_nobody_wants_anything_has_promised_nothing() {
    let world = host();
    process(&world, 600, "nginx", "system.slice/nginx.service", "0-23");
    world.thread(40, "kworker/3:1", MOVABLE, "3");
    assert_eq!(read(&world, &known(&[])), Promises::default());
}

#[test]
fn a_unit_with_cpus_of_its_own_is_named_with_its_file() {
    let world = host();
    limit(&world, "system.slice/rt.service", "cpuset.cpus", "16");
    limit(&world, "lxc/105", "cpuset.cpus", "4-5");
    limit(&world, "lxc", "cpuset.cpus", "0-23");
    // Its own threads have no more than that, and are no promise beside it.
    limit(&world, "system.slice/rt.service", "cpuset.cpus.effective", "16");
    process(&world, 601, "rt", "system.slice/rt.service", "16");
    let found = said(&read(&world, &known(&[])));
    assert_eq!(
        found,
        ["soft: lxc/105 (cpuset.cpus): 4-5", "soft: system.slice/rt.service (cpuset.cpus): 16"]
    );
}

#[test]
fn what_qmpin_has_limited_counts_as_it_was_before() {
    let world = host();
    limit(&world, "system.slice", "cpuset.cpus", "0-11,20-23");
    limit(&world, "user.slice", "cpuset.cpus", "0-11,20-23");
    limit(&world, "system.slice", "cpuset.cpus.effective", "0-11,20-23");
    process(&world, 602, "nginx", "system.slice/nginx.service", "0-11,20-23");
    let before = known(&[("system.slice", "0-23"), ("user.slice", "0-15")]);
    assert_eq!(said(&read(&world, &before)), ["soft: user.slice (cpuset.cpus): 0-15"]);
}

#[test]
fn a_partition_or_exclusive_cpus_of_another_program_are_hard() {
    let world = host();
    limit(&world, "kubepods.slice", "cpuset.cpus", "0-23");
    limit(&world, "kubepods.slice/pod", "cpuset.cpus.exclusive", "8-9");
    limit(&world, "dpdk", "cpuset.cpus", "12-13");
    limit(&world, "dpdk", "cpuset.cpus.effective", "12-13");
    limit(&world, "dpdk", "cpuset.cpus.partition", "root");
    let found = said(&read(&world, &known(&[])));
    assert_eq!(
        found,
        [
            "hard: dpdk (cpuset.cpus.partition): 12-13",
            "hard: kubepods.slice/pod (cpuset.cpus.exclusive): 8-9"
        ]
    );
}

#[test]
fn what_is_attached_is_no_promise() {
    let world = host();
    // What qmpin has built for the VM, in its slice and its scope.
    limit(&world, "qemu.slice", "cpuset.cpus.exclusive", "12-15");
    limit(&world, "qemu.slice/100.scope", "cpuset.cpus.exclusive", "12-15");
    limit(&world, "qemu.slice/100.scope/vcpus", "cpuset.cpus.partition", "isolated");
    limit(&world, "qemu.slice/100.scope/emulator", "cpuset.cpus", "0-11");
    world.write(&format!("{CGROUP}/qemu.slice/100.scope/cgroup.procs"), "500\n501\n");
    // What Proxmox starts beside QEMU, and a VM that was pinned by hand.
    process(&world, 501, "swtpm", "qemu.slice/100.scope", "2");
    process(&world, 510, "kvm", "qemu.slice/101.scope", "6-7");
    assert_eq!(said(&read(&world, &known(&[]))), ["soft: 101.scope (tid 510): 6-7"]);
}

#[test]
fn a_vm_without_a_unit_of_its_own_makes_nothing_beside_it_its_own() {
    let world = host();
    process(&world, 500, "CPU 0/KVM", "user.slice/session-3.scope", "3");
    process(&world, 512, "poll", "user.slice/session-3.scope", "14");
    assert_eq!(said(&read(&world, &known(&[]))), ["soft: session-3.scope (tid 512): 14"]);
}

#[test]
fn a_host_without_cpusets_has_promised_what_threads_have_chosen() {
    let world = host();
    std::fs::remove_dir_all(world.path(CGROUP)).expect("removed");
    process(&world, 600, "nginx", "", "0-23");
    process(&world, 700, "poll", "", "2");
    assert_eq!(said(&read(&world, &known(&[]))), ["soft: poll (tid 700): 2"]);
}

#[test]
fn a_thread_with_a_mask_of_its_own_is_named_with_its_unit() {
    let world = host();
    process(&world, 512, "lcore-worker-14", "system.slice/dp.service", "14");
    process(&world, 513, "lcore-worker-14", "system.slice/dp.service", "14");
    process(&world, 514, "lcore-worker-15", "system.slice/dp.service", "15");
    process(&world, 700, "a script", "", "2");
    let found = said(&read(&world, &known(&[])));
    assert_eq!(
        found,
        [
            "soft: a script (tid 700): 2",
            "soft: dp.service (tid 512 and 1 more): 14",
            "soft: dp.service (tid 514): 15"
        ]
    );
}

#[test]
fn what_the_command_line_isolates_is_no_choice_of_each_process() {
    let world = host();
    world.write("proc/cmdline", "root=/dev/vda isolcpus=2-11 quiet\n");
    world.write("sys/devices/system/cpu/isolated", "2-11\n");
    world.write("sys/devices/system/cpu/nohz_full", "2-12,99\n");
    process(&world, 600, "nginx", "system.slice/nginx.service", "0-1,13-23");
    limit(&world, "system.slice", "cpuset.cpus.effective", "0-15");
    process(&world, 601, "cron", "system.slice/cron.service", "0-1,13-15");
    process(&world, 602, "poll", "system.slice/dp.service", "4");
    let found = read(&world, &known(&[]));
    assert_eq!(
        (found.isolated, said(&found)),
        (set("2-12"), vec!["soft: dp.service (tid 602): 4".to_owned()],)
    );
}

#[test]
fn cpus_of_a_partition_that_look_isolated_were_not_isolated_at_boot() {
    let world = host();
    world.write("proc/cmdline", "root=/dev/vda quiet\n");
    world.write("sys/devices/system/cpu/isolated", "2-11\n");
    assert_eq!(read(&world, &known(&[])), Promises::default());
}

#[test]
fn damaged_files_promise_nothing_and_do_no_harm() {
    let world = host();
    world.write("sys/devices/system/cpu/isolated", "5-\u{0}");
    limit(&world, "system.slice", "cpuset.cpus", "all of them");
    world.write("proc/603/stat", "603 (x");
    world.write("proc/603/task/603/stat", "603 (x");
    world.masks.of().insert(603, set("3"));
    assert_eq!(read(&world, &known(&[])), Promises::default());
}

#[test]
fn a_great_many_are_bounded_and_the_hard_ones_are_kept() {
    let world = host();
    for at in 0..100 {
        let unit = format!("system.slice/many{at}.service");
        limit(&world, &unit, "cpuset.cpus", &(at % 20).to_string());
    }
    limit(&world, "user.slice/a", "cpuset.cpus.exclusive", "23");
    let found = read(&world, &known(&[]));
    assert!(found.made.len() <= 64, "{}", found.made.len());
    assert_eq!(found.hard(), set("23"));
}
