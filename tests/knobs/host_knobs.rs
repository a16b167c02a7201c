//! The host-wide knobs on a made-up host: a pure function of the leases, undone whole from any crash
//! point. The kernel's own part (refusals, partitions) is seen on the test host.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::host_world::{
    CHILDREN, CHILDREN_BEFORE, KTHREADD, KTHREADS, ONLINE, PSIMON, is_mask,
};
use crate::support::made_up::{BOOT, BOUND, MOVABLE, World, set};
use qmpin::discover::process_key;
use qmpin::ids::{Pid, StartTicks, Tid};
use qmpin::journal::{Memory, Record};
use qmpin::knobs::host::journal::HostJournal;
use qmpin::knobs::host::keep::{Due, HostKnobs};
use qmpin::knobs::host::outcome::HostApplied;
use qmpin::knobs::host::places::{Place, Value};
use qmpin::knobs::host::refusal::host_refusal;
use qmpin::knobs::host::report::HostReport;
use qmpin::policy::{Knob, Level};
use qmpin::sched::Sched as _;
use qmpin::sysroot::SysRoot;
use qmpin::threads::ThreadKey;

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
fn external_change_is_kept_and_named() {
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
fn external_change_while_attached_is_corrected_and_counted() {
    let world = World::new();
    let mut knobs = HostKnobs::default();
    world.strict("100", "4-5");
    assert!(world.reconcile_with(&mut knobs).drifted.is_empty(), "the first time");
    let drifted = |report: HostReport| {
        report.drifted.iter().map(ToString::to_string).collect::<Vec<String>>()
    };
    world.write("proc/irq/0/smp_affinity_list", "4");
    world.write("proc/sys/vm/stat_interval", "3");
    let places = ["/proc/irq/0/smp_affinity_list", "/proc/sys/vm/stat_interval"];
    assert_eq!(drifted(world.reconcile_with(&mut knobs)), places);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    // A neighbour comes, and what it has changed is found as it goes: that was qmpin.
    world.strict("101", "2-3");
    world.reconcile();
    world.forget("101");
    assert_eq!(drifted(world.reconcile_with(&mut knobs)), [""; 0]);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
}

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
    world.masks.refuse(21, nix::libc::EINVAL);
    let report = world.reconcile();
    assert!(report.fell_short());
    let said = "thread 21 (kswapd1): 4-7 → 0-3 was refused: Invalid argument (os error 22)";
    assert_eq!(report.refusals(), [said]);
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
    world.masks.refuse_none();
    // It was there all the time: no process has asked again.
    assert!(was_refused(21));
    world.reconcile();
    assert!(!was_refused(21));
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), Vec::<String>::new());
}

#[test]
fn temporarily_unreadable_place_is_kept() {
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
        left.len() == 1 && left[0].contains("cpu7/cpufreq/scaling_governor cannot be restored"),
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
fn later_interrupts_and_threads_are_moved_and_ended_ones_are_forgotten() {
    let world = World::new();
    world.strict("100", "4-5");
    world.reconcile();
    world.write("proc/irq/60/smp_affinity_list", "0-7\n");
    fs::remove_dir_all(world.path("proc/irq/25")).expect("removed");
    fs::remove_dir_all(world.path("proc/21")).expect("removed");
    world.masks.of().remove(&21);
    world.reconcile();
    assert_eq!(world.read("proc/irq/60/smp_affinity_list"), "0-3,6-7");
    world.forget("100");
    assert!(!world.reconcile().fell_short());
    assert_eq!(world.read("proc/irq/60/smp_affinity_list"), "0-7");
    assert_eq!(world.journal(), None);
}

/// A kernel thread that is created as a partition is built has a mask of the kernel's making when it is
/// first seen, and would keep it for good.
#[test]
fn kernel_thread_created_with_the_exclusion_mask_is_restored() {
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

/// It has its parent's mask, and no process has seen it before the last VM went.
#[test]
fn a_worker_that_was_seen_before_the_kernel_had_bound_it_is_the_kernels() {
    let world = World::new();
    world.kernel_thread(PSIMON, "kworker-new", "0-7");
    world.write(CHILDREN, &format!("{CHILDREN_BEFORE}{PSIMON} "));
    world.strict("100", "4-7");
    world.reconcile();
    world.thread(PSIMON, "kworker/5:1", BOUND, "0-3");
    world.masks.refuse(PSIMON, nix::libc::EINVAL);
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
fn kernel_thread_created_at_the_very_end_is_restored() {
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
fn mask_that_looks_like_an_exclusion_mask_is_kept() {
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

/// Partitions come and go one by one, and what the kernel leaves is then all but the CPUs of any of them.
#[test]
fn exclusion_mask_of_some_vms_is_recognised() {
    let world = World::new();
    for (vm, exclusive) in [("100", "2-3"), ("101", "4-5"), ("102", "6")] {
        world.strict(vm, exclusive);
    }
    world.reconcile();
    let memory = HostJournal::read(&world.state.host_journal_path(), BOOT).expect("a journal");
    let is_fenced_from = |from: &str, mask: &str| {
        memory.has_exclusion_mask(&Value::Cpus(set(mask)), &set(from), &set(ONLINE))
    };
    let has_exclusion_mask = |mask: &str| is_fenced_from(ONLINE, mask);
    for exclusion_mask in ["0-3,6-7", "0-1,4-7", "0-5,7", "0-1,6-7", "0-3,7", "0-1,4-5,7", "0-1,7"]
    {
        assert!(has_exclusion_mask(exclusion_mask), "{exclusion_mask}");
    }
    for mask in [ONLINE, "0-6", "0-3", "0-1", "1,7", "0-2,4-7", "0-4,6-7", "2-3"] {
        assert!(!has_exclusion_mask(mask), "{mask}");
    }
    // Of a mask that another program has set, the kernel leaves the rest.
    assert!(
        is_fenced_from("1-4", "1,4")
            && is_fenced_from("1-4", "1-3")
            && is_fenced_from("3-7", "4-5,7")
    );
    for mask in ["1-4", "1-2", "0,4", "4", "0-3,6-7"] {
        assert!(!is_fenced_from("1-4", mask), "{mask}");
    }
}

/// As long as its VM is attached the host's journal knows nothing of it, and partitions move it all the same.
#[test]
fn a_vms_own_kernel_thread_has_the_mask_back_that_the_vms_journal_knows() {
    const PIT: i32 = 50;
    let world = World::new();
    // Another process that lives.
    let init = process_key(&SysRoot::live(), Pid(1)).expect("it lives");
    let attach = || {
        world.lease_with("100", "6", Level::Pinned.knobs(), |lease| lease.qemu = init);
    };
    world.thread(PIT, "kvm-pit/1", MOVABLE, "0-4");
    world.write(CHILDREN, &format!("{CHILDREN_BEFORE}{PIT} "));
    attach();
    // There is none to take it over as long as nothing is kept from anybody.
    let vm = Memory::of(&[Record::Outside(vec![(Tid(PIT), StartTicks(77), set("0-4"))])]);
    world.take_over(&vm);
    assert_eq!(world.journal(), None);
    world.strict("101", "4-5");
    world.strict("102", "2");
    world.reconcile();
    // The kernel's, as it is between 101's partition and 102's.
    world.masks.set_affinity(Tid(PIT), &set("0-3,6-7")).expect("set");
    world.take_over(&vm);
    world.forget("100");
    world.reconcile();
    assert_eq!(world.mask(PIT), set("0-1,3"));
    // Attached once more, it is the VM's again.
    let remembered = || {
        let memory = HostJournal::read(&world.state.host_journal_path(), BOOT).expect("read");
        let key = ThreadKey { tid: Tid(PIT), start: StartTicks(77) };
        memory.original(&Place::Thread(key)).cloned()
    };
    assert_eq!(remembered(), Some(Value::Cpus(set("0-4"))));
    attach();
    world.reconcile();
    assert_eq!(remembered(), None);
    world.take_over(&vm);
    world.forget("100");
    for (vm, mask) in [("102", "0-3"), ("101", "0-4")] {
        world.forget(vm);
        world.reconcile();
        assert_eq!(world.mask(PIT), set(mask));
    }
    assert_eq!(world.journal(), None);
}

#[test]
fn removed_journal_is_written_again_from_memory() {
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

/// Killed before, between and after its writes: the journal is cut at every line, and the writes that
/// a line allows are carried out up to any number.
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
fn journal_of_another_boot_is_removed() {
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

#[test]
fn nothing_is_taken_from_a_vm_whose_lease_cannot_be_read() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-5");
    world.strict("101", "6");
    world.reconcile();
    let (kept, journal) = (world.picture(), world.journal());
    let path = world.state.lease_path(&"100".parse().expect("a name"));
    let lease = fs::read_to_string(&path).expect("a lease");
    for text in ["", "{", &lease[..lease.len() / 2]] {
        fs::write(&path, text).expect("written");
        world.forget("101");
        let report = world.reconcile();
        assert!(report.fell_short() && report.applied.is_empty(), "{report:?}");
        let said = report.refusals().join("; ");
        assert!(
            said.contains("cannot read the lease of VM 100") && said.contains("100.lease"),
            "{said}"
        );
        assert_eq!((world.picture(), world.journal()), (kept.clone(), journal.clone()));
    }
    fs::write(&path, lease).expect("written");
    world.reconcile();
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
}

#[test]
fn one_pass_over_the_host_serves_all_supervisors_until_the_leases_want_something_else() {
    let world = World::new();
    let minute = Duration::from_secs(60);
    let is_due = |within| {
        HostKnobs::default().is_due(&world.root, &world.state, BOOT, within, Instant::now())
    };
    let is_kept = |within| matches!(is_due(within), Due::NotYet);
    world.lease("100", "4-5", [Knob::Irqs]);
    assert!(!is_kept(minute), "no pass has looked yet");
    world.reconcile();
    assert!(is_kept(minute));
    assert!(!is_kept(Duration::ZERO), "too long ago");
    // Written anew, and another VM.
    for lease in [("100", "4-6"), ("101", "7")] {
        world.lease(lease.0, lease.1, [Knob::Irqs]);
        assert!(!is_kept(minute), "{lease:?}");
        world.reconcile();
        assert!(is_kept(minute), "{lease:?}");
    }
    world.lease_with("100", "4-6", [Knob::Irqs], |lease| lease.emulator = set("2-3"));
    assert!(is_kept(minute), "helpers that move are no matter of the host's");
    // A check that is under way is not waited for.
    world.lease("100", "3-6", [Knob::Irqs]);
    let busy = world.state.try_lock_check().expect("locked").expect("it is free");
    assert!(matches!(is_due(minute), Due::Soon));
    drop(busy);
    let Due::Now(Some(mine)) = is_due(minute) else { panic!("it is due") };
    assert!(matches!(is_due(minute), Due::Soon), "while this one is at it");
    world.reconcile();
    assert!(is_kept(minute), "it is asked without the lock");
    drop(mine);
    for garbage in ["", "{", "{\"began_ms\":18446744073709551615,\"with_devices\":[],\"wanted\":1}"]
    {
        fs::write(world.state.path().join(".host.lock"), garbage).expect("written");
        assert!(!is_kept(minute), "{garbage}");
    }
}

/// On a slow host with many VMs a lease changes again before the check is over: the others do not check it all at once.
#[test]
fn check_of_another_supervisor_is_relied_on_as_long_as_it_comes_to_the_end_of_passes() {
    let world = World::new();
    let (minute, begun) = (Duration::from_secs(60), Instant::now());
    let _busy = world.state.try_lock_check().expect("locked").expect("it is free");
    let mut knobs = HostKnobs::default();
    let mut asked_after = |seconds| {
        let now = begun + Duration::from_secs(seconds);
        knobs.is_due(&world.root, &world.state, BOOT, minute, now)
    };
    world.lease("100", "4", [Knob::Irqs]);
    for after_s in [0, 29] {
        assert!(matches!(asked_after(after_s), Due::Soon), "{after_s}");
    }
    // A pass has come to its end, and another VM has come meanwhile.
    world.reconcile();
    world.lease("101", "5", [Knob::Irqs]);
    for after_s in [31, 59] {
        assert!(matches!(asked_after(after_s), Due::Soon), "{after_s}");
    }
    assert!(matches!(asked_after(62), Due::Now(None)), "that one hangs");
}
