//! The host-wide knobs on a made-up host: a pure function of the leases, undone whole from any crash
//! point. The kernel's own part (refusals, partitions) is seen on the test host.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use qmpin::apply::HostApplied;
use qmpin::cpuset::CpuSet;
use qmpin::discover;
use qmpin::ids::{Pid, Tid};
use qmpin::journal::HostJournal;
use qmpin::leases::Lease;
use qmpin::places::{Place, Value};
use qmpin::policy::{Knob, Level, VfioIrqs};
use qmpin::render::host_refusal;
use qmpin::sched::Sched as _;
use qmpin::supervise::{HostKnobs, HostReport};
use qmpin::sysroot::SysRoot;
use support::made_up::{BOOT, BOUND, MOVABLE, World, set};

const ONLINE: &str = "0-7";
const KTHREADS: [(i32, &str, &str); 4] = [
    (KTHREADD, "kthreadd", "0-7"),
    (20, "kcompactd0", "0-3"),
    (21, "kswapd1", "4-7"),
    (30, "ksoftirqd/5", "5"),
];
const KTHREADD: i32 = 2;
const CHILDREN: &str = "proc/2/task/2/children";
const CHILDREN_BEFORE: &str = "20 21 30 ";
/// The pid of one that comes later.
const PSIMON: i32 = 40;

impl World {
    fn new() -> World {
        let world = World::empty();
        for (path, text) in [
            ("sys/devices/system/cpu/online", "0-7\n"),
            ("proc/irq/default_smp_affinity", "ff\n"),
            ("proc/irq/0/smp_affinity_list", "0-7\n"),
            ("proc/irq/24/smp_affinity_list", "0-3\n"),
            ("proc/irq/25/smp_affinity_list", "5\n"),
            ("sys/devices/virtual/workqueue/cpumask", "ff\n"),
            ("proc/sys/vm/stat_interval", "1\n"),
            ("proc/sys/kernel/numa_balancing", "1\n"),
            ("proc/sys/kernel/watchdog_cpumask", "0-7\n"),
            (CHILDREN, CHILDREN_BEFORE),
        ] {
            world.write(path, text);
        }
        for cpu in 0..8 {
            let of_cpu = format!("sys/devices/system/cpu/cpu{cpu}");
            for (name, text) in [
                ("cpufreq/scaling_available_governors", "performance powersave\n"),
                ("cpufreq/scaling_governor", "powersave\n"),
                ("cpuidle/state1/latency", "2\n"),
                ("power/pm_qos_resume_latency_us", "0\n"),
            ] {
                world.write(&format!("{of_cpu}/{name}"), text);
            }
        }
        for (pid, comm, mask) in KTHREADS {
            world.kernel_thread(pid, comm, mask);
        }
        world
    }

    fn kernel_thread(&self, pid: i32, comm: &str, mask: &str) {
        let flags = if comm.contains('/') { BOUND } else { MOVABLE };
        self.thread(pid, comm, flags, mask);
    }

    /// A kernel thread that was not there before: it has its parent's mask.
    fn psimon_is_born(&self) {
        self.kernel_thread(PSIMON, "psimon", &self.mask(KTHREADD).to_string());
        self.write(CHILDREN, &format!("{CHILDREN_BEFORE}{PSIMON} "));
    }

    /// All that may change, by what it means.
    fn picture(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        for top in ["proc/irq", "proc/sys", "sys"] {
            picture_of(&self.path(top), &mut picture);
        }
        for (pid, mask) in self.masks.of.borrow().iter() {
            picture.insert(format!("thread {pid}"), mask.to_string());
        }
        picture
    }

    /// What differs from an earlier picture.
    fn changed_since(&self, before: &BTreeMap<String, String>) -> Vec<String> {
        let now = self.picture();
        assert!(now.keys().eq(before.keys()), "something came or went");
        let changed = now.iter().filter(|(key, value)| before[*key] != **value);
        changed.map(|(key, value)| format!("{key}: {} → {value}", before[key])).collect()
    }

    fn lease(&self, vm: &str, exclusive: &str, knobs: impl IntoIterator<Item = Knob>) {
        self.lease_with(vm, exclusive, knobs, |_| ());
    }

    fn lease_with(
        &self,
        vm: &str,
        exclusive: &str,
        knobs: impl IntoIterator<Item = Knob>,
        change: impl FnOnce(&mut Lease),
    ) {
        let mut lease = World::lease_of(vm, exclusive, knobs);
        change(&mut lease);
        self.state.write_lease(&lease).expect("written");
    }

    fn strict(&self, vm: &str, exclusive: &str) {
        self.lease(vm, exclusive, Level::Strict.knobs());
    }

    fn forget(&self, vm: &str) {
        self.state.forget(&vm.parse().expect("a name")).expect("forgotten");
    }

    fn reconcile(&self) -> HostReport {
        self.reconcile_with(&mut HostKnobs::default())
    }

    fn reconcile_with(&self, knobs: &mut HostKnobs) -> HostReport {
        let host = self.host();
        let lock = self.state.lock_leases().expect("locked");
        knobs.remember(host, &self.state, BOOT, &lock).expect("remembered");
        knobs.reconcile(host, &self.state, BOOT, &lock).expect("reconciled")
    }

    fn remember(&self) {
        let host = self.host();
        let lock = self.state.lock_leases().expect("locked");
        HostKnobs::default().remember(host, &self.state, BOOT, &lock).expect("remembered");
    }

    fn journal(&self) -> Option<String> {
        fs::read_to_string(self.state.host_journal_path()).ok()
    }
}

/// Masks may be written in more ways than one.
fn is_mask(path: &Path) -> bool {
    let is_sysctl = path.ends_with("watchdog_cpumask");
    !is_sysctl && (path.ends_with("cpumask") || path.ends_with("default_smp_affinity"))
}

fn picture_of(folder: &Path, picture: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            picture_of(&path, picture);
            continue;
        }
        let text = fs::read_to_string(&path).expect("there").trim().to_owned();
        // Masks may be written in more ways than one.
        let mask = CpuSet::parse_cpumask(&text).filter(|_| is_mask(&path));
        picture.insert(path.display().to_string(), mask.map_or(text, |mask| mask.to_string()));
    }
}

#[test]
fn everything_movable_leaves_the_vms_cpus_and_comes_back() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-5");
    let report = world.reconcile();
    assert!(!report.fell_short());
    assert_eq!(report.bound, BTreeMap::from([("ksoftirqd".to_owned(), 1)]));
    assert_eq!(world.read("proc/irq/default_smp_affinity"), "000000cf");
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    assert_eq!(world.read("proc/irq/24/smp_affinity_list"), "0-3", "not concerned");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "0-3,6-7", "it had no other CPU");
    assert_eq!(world.read("sys/devices/virtual/workqueue/cpumask"), "000000cf");
    assert_eq!(world.read("proc/sys/vm/stat_interval"), "120");
    assert_eq!(world.read("proc/sys/kernel/numa_balancing"), "0");
    assert_eq!(world.read("proc/sys/kernel/watchdog_cpumask"), "0-3,6-7");
    for (cpu, governor, latency) in [(4, "performance", "2"), (6, "powersave", "0")] {
        let of_cpu = format!("sys/devices/system/cpu/cpu{cpu}");
        assert_eq!(world.read(&format!("{of_cpu}/cpufreq/scaling_governor")), governor);
        assert_eq!(world.read(&format!("{of_cpu}/power/pm_qos_resume_latency_us")), latency);
    }
    assert_eq!(world.mask(20), set("0-3"));
    assert_eq!(world.mask(21), set("6-7"));
    assert_eq!(world.mask(30), set("5"), "bound");
    assert!(world.reconcile().applied.is_empty(), "a second time there is nothing to do");
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

#[test]
fn the_level_decides_what_is_touched() {
    for (knobs, path) in [
        (vec![Knob::Irqs], "proc/irq/0/smp_affinity_list"),
        (vec![Knob::Workqueues], "sys/devices/virtual/workqueue/cpumask"),
        (vec![Knob::Noise], "proc/sys/vm/stat_interval"),
        (vec![Knob::Power], "sys/devices/system/cpu/cpu4/cpufreq/scaling_governor"),
    ] {
        let world = World::new();
        let before = world.picture();
        world.lease("100", "4-5", knobs.clone());
        world.reconcile();
        let full = world.path(path).display().to_string();
        let changed: Vec<String> = world
            .picture()
            .into_iter()
            .filter(|entry| before.get(&entry.0) != Some(&entry.1))
            .map(|entry| entry.0)
            .collect();
        assert!(changed.contains(&full), "{knobs:?}: {changed:?}");
        let of_knob = |path: &String| match knobs[0] {
            Knob::Irqs => path.contains("/irq/"),
            Knob::Workqueues => path.contains("workqueue"),
            Knob::Noise => path.contains("/sys/"),
            _ => path.contains("/cpu4/") || path.contains("/cpu5/"),
        };
        assert!(changed.iter().all(of_knob), "{knobs:?}: {changed:?}");
    }
    let world = World::new();
    let before = world.picture();
    world.lease("100", "4-5", Level::Pinned.knobs());
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

#[test]
fn the_order_of_coming_and_going_does_not_matter() {
    let world = World::new();
    let before = world.picture();
    let vms = [("100", "4-5"), ("101", "2-3"), ("102", "6")];
    for (vm, exclusive) in vms {
        world.strict(vm, exclusive);
    }
    world.reconcile();
    let all = world.picture();
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        // One by one to the end, and back in the same order.
        for at in order {
            world.forget(vms[at].0);
            world.reconcile();
        }
        assert_eq!(world.changed_since(&before), [""; 0], "{order:?}");
        assert_eq!(world.journal(), None);
        for at in order {
            world.strict(vms[at].0, vms[at].1);
            world.reconcile();
        }
        assert_eq!(world.changed_since(&all), [""; 0], "{order:?}");
    }
}

#[test]
fn it_grows_back_to_the_original_and_not_to_the_last_value() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.strict("101", "2-3");
    world.reconcile();
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-1,6-7");
    world.forget("100");
    world.reconcile();
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-1,4-7");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "5");
    assert_eq!(world.mask(21), set("4-7"));
}

#[test]
fn what_somebody_else_has_changed_is_left_and_named() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.write("proc/irq/0/smp_affinity_list", "1\n");
    world.masks.set_affinity(Tid(21), &set("2")).expect("set");
    world.forget("100");
    let report = world.reconcile();
    let named: Vec<String> = report
        .applied
        .iter()
        .map(|applied| format!("{:?}", applied.step))
        .filter(|step| step.starts_with("LeaveAlone"))
        .collect();
    assert_eq!(named.len(), 2, "{named:?}");
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "1");
    assert_eq!(world.mask(21), set("2"));
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "5");
    assert_eq!(world.journal(), None);
}

/// `kernel/cgroup/cpuset.c` sets every kernel thread it may to all CPUs that are not isolated.
#[test]
fn masks_that_the_kernel_has_changed_for_a_partition_come_back() {
    for knobs in [Level::Strict.knobs(), [Knob::Partition].into()] {
        let world = World::new();
        let before = world.picture();
        world.lease("100", "4-5", knobs);
        // The kernel does it between these two looks.
        world.remember();
        for built in ["0-3,6-7", ONLINE] {
            for (pid, comm, _) in KTHREADS {
                if !comm.contains('/') {
                    world.masks.set_affinity(Tid(pid), &set(built)).expect("set");
                }
            }
            if built == ONLINE {
                world.forget("100");
            }
            world.reconcile();
            assert_eq!(world.mask(20), set("0-3"), "its own CPUs, and not all others");
        }
        assert_eq!(world.changed_since(&before), [""; 0]);
    }
}

#[test]
fn what_the_kernel_would_not_do_is_remembered_until_it_does() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-7");
    world.masks.stubborn.borrow_mut().insert(21);
    let report = world.reconcile();
    assert!(report.fell_short());
    let was_refused = |pid: i32| {
        let journal = world.state.host_journal_path();
        let memory = HostJournal::read(&journal, BOOT).expect("a journal");
        let others = Value::Cpus(set("0-3"));
        memory.originals().any(|(place, _)| {
            matches!(place, Place::Thread(key) if key.tid == Tid(pid))
                && memory.was_tried(place, &others)
                && memory.was_refused(place, &others)
        })
    };
    assert!(was_refused(21) && !was_refused(KTHREADD));
    world.masks.stubborn.borrow_mut().clear();
    // It was there all the time: nobody has asked again.
    assert!(was_refused(21));
    world.reconcile();
    assert!(!was_refused(21));
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), Vec::<String>::new());
}

#[test]
fn what_cannot_be_read_for_a_while_is_not_forgotten() {
    let world = World::new();
    let before = world.picture();
    let mut knobs = HostKnobs::default();
    world.strict("100", "4-7");
    world.reconcile_with(&mut knobs);
    // As that of an offline CPU, which answers EBUSY; a folder answers EISDIR.
    let governor = world.path("sys/devices/system/cpu/cpu7/cpufreq/scaling_governor");
    fs::remove_file(&governor).expect("removed");
    fs::create_dir(&governor).expect("made");
    world.strict("100", "4-6");
    let report = world.reconcile_with(&mut knobs);
    assert!(!report.fell_short() && report.refusals().is_empty(), "{report:?}");
    world.forget("100");
    let left = world.reconcile_with(&mut knobs).applied;
    let left: Vec<String> =
        left.iter().filter(|one| one.is_left_changed()).filter_map(host_refusal).collect();
    assert!(
        left.len() == 1 && left[0].contains("cpu7/cpufreq/scaling_governor cannot be put back"),
        "{left:?}"
    );
    assert!(world.journal().is_some());
    fs::remove_dir(&governor).expect("removed");
    fs::write(&governor, "performance\n").expect("written");
    world.reconcile();
    assert_eq!(world.changed_since(&before), Vec::<String>::new());
    assert_eq!(world.journal(), None);
}

#[test]
fn an_interrupt_or_thread_that_comes_later_is_moved_too_and_one_that_goes_is_forgotten() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.write("proc/irq/60/smp_affinity_list", "0-7\n");
    fs::remove_dir_all(world.path("proc/irq/25")).expect("removed");
    fs::remove_dir_all(world.path("proc/21")).expect("removed");
    world.masks.of.borrow_mut().remove(&21);
    world.reconcile();
    assert_eq!(world.read("proc/irq/60/smp_affinity_list"), "0-3,6-7");
    world.forget("100");
    assert!(!world.reconcile().fell_short());
    assert_eq!(world.read("proc/irq/60/smp_affinity_list"), "0-7");
    assert_eq!(world.journal(), None);
}

/// A kernel thread that is born as a partition is built has a mask of the kernel's making when it is
/// first seen, and would keep it for good.
#[test]
fn a_kernel_thread_born_behind_the_fence_is_let_out() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.psimon_is_born();
    world.strict("101", "2-3");
    world.reconcile();
    assert_eq!(world.mask(PSIMON), set("0-1,6-7"));
    world.forget("101");
    world.reconcile();
    assert_eq!(world.mask(PSIMON), set("0-3,6-7"));
    // As the kernel does when a partition goes.
    world.masks.set_affinity(Tid(PSIMON), &set(ONLINE)).expect("set");
    world.forget("100");
    world.reconcile();
    assert_eq!(world.mask(PSIMON), set(ONLINE));
    assert_eq!(world.journal(), None);
}

/// It has its parent's mask, and nobody has seen it before the last VM went.
#[test]
fn a_worker_that_was_seen_before_the_kernel_had_bound_it_is_the_kernels() {
    let world = World::new();
    world.kernel_thread(PSIMON, "kworker-new", "0-7");
    world.write(CHILDREN, &format!("{CHILDREN_BEFORE}{PSIMON} "));
    world.strict("100", "4-7");
    world.reconcile();
    world.thread(PSIMON, "kworker/5:1", BOUND, "0-3");
    world.masks.stubborn.borrow_mut().insert(PSIMON);
    world.forget("100");
    let report = world.reconcile();
    assert!(!report.applied.iter().any(HostApplied::is_left_changed), "{report:?}");
    assert_eq!(world.journal(), None);
}

#[test]
fn kernel_threads_are_found_where_the_kernel_has_no_list_of_them() {
    let world = World::new();
    fs::remove_file(world.path(CHILDREN)).expect("removed");
    // Not one of the kernel's, whatever its name.
    world.thread(600, "kswapd9", 0, "0-7");
    let before = world.picture();
    world.strict("100", "4-7");
    world.reconcile();
    assert_eq!((world.mask(21), world.mask(600)), (set("0-3"), set("0-7")));
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), Vec::<String>::new());
}

#[test]
fn a_kernel_thread_born_at_the_very_end_is_let_out() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.psimon_is_born();
    world.forget("100");
    world.reconcile();
    assert_eq!(world.mask(PSIMON), set(ONLINE));
    assert_eq!(world.journal(), None);
}

/// `0-3` is what the kernel leaves where CPUs 4-7 are taken away; and it is what kcompactd0 always had.
#[test]
fn a_mask_that_looks_like_a_fence_is_kept() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-5");
    world.reconcile();
    world.strict("101", "6-7");
    world.reconcile();
    world.forget("101");
    world.reconcile();
    let journal = world.journal().expect("a journal");
    // As the kernel does when the last partition goes.
    for pid in [2, 20, 21] {
        world.masks.set_affinity(Tid(pid), &set(ONLINE)).expect("set");
    }
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
    // And once more, as after a kill just before the file went.
    fs::write(world.state.host_journal_path(), journal).expect("written");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
}

/// Killed before, between and after its writes: the journal is cut at every line, and the writes that
/// a line allows are carried out up to any number.
#[test]
fn a_journal_that_somebody_removes_is_written_again_from_memory() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-7");
    let mut knobs = HostKnobs::default();
    world.reconcile_with(&mut knobs);
    assert!(!world.changed_since(&before).is_empty());
    fs::remove_file(world.state.host_journal_path()).expect("removed");
    world.reconcile_with(&mut knobs);
    assert!(world.journal().is_some(), "it is there again");
    fs::remove_file(world.state.host_journal_path()).expect("removed");
    world.forget("100");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.changed_since(&before), Vec::<String>::new());
    assert_eq!(world.journal(), None);
}

#[test]
fn from_every_crash_point_all_comes_back() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-5");
    world.reconcile();
    let journal = world.journal().expect("a journal");
    let after = world.picture();
    world.forget("100");
    world.reconcile();
    let changed: Vec<&String> = after.keys().filter(|key| before[*key] != after[*key]).collect();
    assert!(changed.len() > 10, "{changed:?}");
    let lines: Vec<&str> = journal.lines().collect();
    let set_to = |key: &str, value: &str| {
        if let Some(pid) = key.strip_prefix("thread ") {
            let tid = Tid(pid.parse().expect("a pid"));
            world.masks.set_affinity(tid, &set(value)).expect("set");
        } else {
            let is_mask = is_mask(Path::new(key));
            let text = if is_mask { set(value).to_cpumask() } else { value.to_owned() };
            fs::write(key, text).expect("written");
        }
    };
    // Nothing is written before the last line is there.
    for cut in 0..lines.len() {
        fs::write(
            world.state.host_journal_path(),
            lines[..cut].join("\n") + if cut > 0 { "\n" } else { "" },
        )
        .expect("cut");
        world.reconcile();
        assert_eq!(world.changed_since(&before), [""; 0], "cut at line {cut}");
        assert_eq!(world.journal(), None, "cut at line {cut}");
    }
    for done in 0..=changed.len() {
        for key in &changed[..done] {
            set_to(key, &after[*key]);
        }
        fs::write(world.state.host_journal_path(), &journal).expect("written");
        world.reconcile();
        assert_eq!(world.changed_since(&before), [""; 0], "after {done} writes");
        assert_eq!(world.journal(), None, "after {done} writes");
    }
}

#[test]
fn a_journal_of_another_boot_is_nobodys() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-5");
    world.reconcile();
    let journal = world.journal().expect("a journal").replace(BOOT, "the-boot-before");
    world.forget("100");
    world.reconcile();
    fs::write(world.state.host_journal_path(), journal).expect("written");
    assert!(world.reconcile().applied.is_empty());
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

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

/// A guest turns MSI-X on and off as it boots. What is born while VMs are kept free has a mask of qmpin's
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

/// irqbalance as its sock_handle is: it answers `setup`, takes `settings cpus` without a word, and does as
/// it was told when it scans.
#[derive(Clone)]
struct FakeIrqbalance(Arc<Mutex<Balancer>>);

#[derive(Default)]
struct Balancer {
    banned: CpuSet,
    told: Option<String>,
    /// All that it was ever told.
    heard: Vec<String>,
    /// What it answers instead.
    answer: Option<&'static str>,
    /// Before which requests, counted from now, it scans.
    scans: Vec<usize>,
}

impl Balancer {
    fn scan(&mut self) {
        match self.told.take() {
            Some(cpus) if cpus == "NULL" => self.banned = CpuSet::EMPTY,
            Some(cpus) => self.banned = set(&cpus),
            None => {}
        }
    }
}

impl FakeIrqbalance {
    /// Runs as this very process, and bans these CPUs by its own choice.
    fn start(world: &World, banned: &str) -> FakeIrqbalance {
        let us = std::process::id();
        let stat = fs::read_to_string(format!("/proc/{us}/stat")).expect("we live");
        let (open, close) = (stat.find('(').expect("a name"), stat.rfind(')').expect("a name"));
        let stat = format!("{}(irqbalance{}", &stat[..open], &stat[close..]);
        world.write(&format!("proc/{us}/stat"), &stat);
        let folder = world.path("run/irqbalance");
        fs::create_dir_all(&folder).expect("made");
        let path = folder.join(format!("irqbalance{us}.sock"));
        let listener = UnixListener::bind(path).expect("bound");
        let balancer = Balancer { banned: set(banned), ..Balancer::default() };
        let fake = FakeIrqbalance(Arc::new(Mutex::new(balancer)));
        let serving = fake.clone();
        std::thread::spawn(move || {
            for line in listener.incoming() {
                let mut line = line.expect("a line");
                let mut request = [0; 500];
                let Ok(length) = line.read(&mut request) else { continue };
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let _ = line.write_all(serving.answer(&request).as_bytes());
            }
        });
        fake
    }

    fn answer(&self, request: &str) -> String {
        let mut it = self.0.lock().expect("no panic");
        let is_scan = it.scans.first() == Some(&0);
        it.scans.retain(|at| *at > 0);
        it.scans.iter_mut().for_each(|at| *at -= 1);
        if is_scan {
            it.scan();
        }
        if let Some(cpus) = request.strip_prefix("settings cpus ") {
            it.told = Some(cpus.to_owned());
            it.heard.push(cpus.to_owned());
            return String::new();
        }
        assert_eq!(request, "setup");
        let answer = || format!("SLEEP 1 BANNED {}", it.banned.to_cpumask());
        it.answer.map_or_else(answer, str::to_owned)
    }

    /// The end of its interval.
    fn scan(&self) {
        self.0.lock().expect("no panic").scan();
    }

    fn banned(&self) -> String {
        self.0.lock().expect("no panic").banned.to_string()
    }

    fn heard(&self) -> Vec<String> {
        self.0.lock().expect("no panic").heard.clone()
    }
}

/// Restarted, or stopped: the socket of a process that is not there any more.
fn stop_irqbalance(world: &World) {
    let us = std::process::id();
    fs::remove_file(world.path(&format!("proc/{us}/stat"))).expect("removed");
}

impl World {
    /// As a `detach` does it: reconciles until irqbalance has taken what it was told.
    fn detach(&self, knobs: &mut HostKnobs) -> Vec<HostApplied> {
        let host = self.host();
        let mut applied = self.reconcile_with(knobs).applied;
        knobs.await_irqbalance(host, &self.state, BOOT, &mut applied);
        applied
    }
}

#[test]
fn irqbalance_is_told_once_and_does_in_the_end_what_it_did_before() {
    for before in ["", "0,7"] {
        let world = World::new();
        let irqbalance = FakeIrqbalance::start(&world, before);
        let picture = world.picture();
        let mut knobs = HostKnobs::default();
        world.lease("100", "4-5", [Knob::Irqs]);
        for _ in 0..3 {
            assert!(!world.reconcile_with(&mut knobs).fell_short());
        }
        let told = if before.is_empty() { "4-5" } else { "0,4-5,7" };
        assert_eq!(irqbalance.heard(), [told], "it has not taken it yet, and is not told again");
        assert_eq!(irqbalance.banned(), before);
        irqbalance.scan();
        assert!(world.reconcile_with(&mut knobs).applied.is_empty());
        // A second VM, and one that goes.
        world.lease("101", "2-3", [Knob::Irqs]);
        world.reconcile_with(&mut knobs);
        irqbalance.scan();
        assert_eq!(set(&irqbalance.banned()), set("2-5") | set(before));
        world.forget("101");
        world.reconcile_with(&mut knobs);
        irqbalance.scan();
        assert_eq!(irqbalance.banned(), told);
        world.forget("100");
        if before.is_empty() {
            // The slow timer may come before the end does.
            world.reconcile_with(&mut knobs);
        }
        let scans = irqbalance.clone();
        let scanning = std::thread::spawn(move || {
            while scans.heard().len() < 4 {
                std::thread::yield_now();
            }
            scans.scan();
        });
        let applied = world.detach(&mut knobs);
        scanning.join().expect("scanned");
        assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
        assert_eq!(irqbalance.banned(), before);
        assert_eq!(world.changed_since(&picture), [""; 0]);
        assert_eq!(world.journal(), None);
    }
}

/// What it says at the moment is what was before, and it is about to take what it was told.
#[test]
fn irqbalance_is_told_what_was_before_even_where_it_still_says_so() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile();
    world.forget("100");
    // Another process, as after a kill.
    let applied = world.detach(&mut HostKnobs::default());
    assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    irqbalance.scan();
    assert_eq!(irqbalance.heard(), ["4-5", "NULL"]);
    assert_eq!((irqbalance.banned().as_str(), world.journal()), ("", None));
}

/// It takes what it was told first after it was looked at, and what it is told then before the next look.
#[test]
fn irqbalance_may_scan_between_any_two_requests() {
    // Asked, told, asked; asked, told, asked.
    for scans in [vec![1, 3], vec![1, 4], vec![2, 3], vec![0, 2], vec![1, 8], vec![5, 7]] {
        let world = World::new();
        let before = world.picture();
        let irqbalance = FakeIrqbalance::start(&world, "");
        world.lease("100", "4-5", Level::Exclusive.knobs());
        world.reconcile();
        world.forget("100");
        irqbalance.0.lock().expect("no panic").scans.clone_from(&scans);
        let applied = world.detach(&mut HostKnobs::default());
        assert!(!applied.iter().any(HostApplied::is_left_changed), "{scans:?}: {applied:?}");
        irqbalance.scan();
        assert_eq!(irqbalance.banned(), "", "{scans:?}");
        assert_eq!(world.changed_since(&before), [""; 0], "{scans:?}");
        assert_eq!(world.journal(), None, "{scans:?}");
    }
}

/// A VM that is attached again at once, before irqbalance has taken that there is none.
#[test]
fn irqbalance_is_told_anew_where_it_would_take_back_what_is_wanted_again() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.forget("100");
    world.reconcile_with(&mut knobs);
    assert!(world.journal().is_some(), "not forgotten before it is taken");
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    assert_eq!(irqbalance.heard(), ["4-5", "NULL", "4-5"]);
    assert_eq!(irqbalance.banned(), "4-5");
}

#[test]
fn a_restarted_irqbalance_is_told_anew_and_one_that_has_gone_is_forgotten() {
    let world = World::new();
    let first = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    stop_irqbalance(&world);
    world.reconcile_with(&mut knobs);
    assert!(!world.journal().expect("a journal").ends_with("irqbalance"));
    // Its number again, and another start.
    let us = std::process::id();
    let stat = format!("{us} (irqbalance) S {}99 0\n", "0 ".repeat(18));
    world.write(&format!("proc/{us}/stat"), &stat);
    first.0.lock().expect("no panic").told = None;
    world.reconcile_with(&mut knobs);
    assert_eq!(first.heard(), ["4-5", "4-5"]);
    first.scan();
    stop_irqbalance(&world);
    world.forget("100");
    let applied = world.detach(&mut knobs);
    assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    assert_eq!(world.journal(), None);
}

#[test]
fn an_irqbalance_that_answers_otherwise_is_named_and_the_rest_goes_on() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let before = world.picture();
    irqbalance.0.lock().expect("no panic").answer = Some("SLEEP 1 BANS 00000000");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    let report = world.reconcile_with(&mut knobs);
    assert!(report.fell_short());
    let [untold] = report.untold.as_slice() else { panic!("{:?}", report.untold) };
    assert!(untold.contains("`SLEEP 1 BANS 00000000`"), "{untold}");
    assert_eq!(irqbalance.heard(), [""; 0], "never guessed at");
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    assert!(world.reconcile_with(&mut knobs).untold.is_empty(), "said once");
    world.forget("100");
    world.detach(&mut knobs);
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

/// Told, and then it does not answer any more: its undo is kept for another time.
#[test]
fn an_irqbalance_that_no_longer_answers_is_not_forgotten() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.reconcile_with(&mut knobs);
    irqbalance.0.lock().expect("no panic").answer = Some("");
    world.forget("100");
    let applied = world.detach(&mut HostKnobs::default());
    assert!(applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    assert!(world.journal().is_some());
    irqbalance.0.lock().expect("no panic").answer = None;
    irqbalance.scan();
    world.detach(&mut HostKnobs::default());
    assert_eq!((irqbalance.banned().as_str(), world.journal()), ("", None));
}

/// To put an interrupt back at every look would be to balance against irqbalance.
#[test]
fn an_interrupt_that_irqbalance_has_placed_off_the_vms_stays_there() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.write("proc/irq/0/smp_affinity_list", "2\n");
    world.write("proc/irq/24/smp_affinity_list", "3\n");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "2");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "0-3,6-7", "it has not touched that");
    // On the VM's CPUs it may not stay.
    world.write("proc/irq/0/smp_affinity_list", "4\n");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    world.write("proc/irq/25/smp_affinity_list", "1\n");
    world.forget("100");
    let scanning = std::thread::spawn(move || {
        while irqbalance.heard().len() < 2 {
            std::thread::yield_now();
        }
        irqbalance.scan();
    });
    let applied = world.detach(&mut knobs);
    scanning.join().expect("scanned");
    let named = applied.iter().filter(|one| format!("{:?}", one.step).starts_with("LeaveAlone"));
    assert_eq!(named.count(), 0, "it is irqbalance's to place: {applied:?}");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "1");
    assert_eq!(world.journal(), None);
}
