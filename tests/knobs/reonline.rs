//! Taking CPUs offline and online again, on a made-up host: what stands against it, and that a CPU comes
//! back wherever qmpin is killed. What the kernel does with masks meanwhile is seen on the test host.

#![allow(clippy::expect_used, clippy::panic)] // a test may end

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::made_up::{BOOT, BOUND, MOVABLE, World, set};
use qmpin::cgroups::CgroupTree;
use qmpin::cpuset::CpuSet;
use qmpin::ids::{CpuId, StartTicks, Tid};
use qmpin::knobs::ground::Host;
use qmpin::knobs::host::journal::HostJournal;
use qmpin::knobs::host::keep::HostKnobs;
use qmpin::knobs::host::memory::{HostMemory, HostRecord};
use qmpin::knobs::host::places::{Place, Value};
use qmpin::knobs::reonline::apply::{Cycled, cycle};
use qmpin::knobs::reonline::plan::{Beforehand, Facts, Never, choose};
use qmpin::knobs::reonline::read::{reonline_facts, switch};
use qmpin::leases::Lease;
use qmpin::policy::Knob;
use qmpin::sched::Sched;
use qmpin::threads::ThreadKey;

fn cpu(number: usize) -> CpuId {
    CpuId::from_index(number).expect("a CPU")
}

impl World {
    fn with_switches() -> World {
        let world = World::empty();
        world.write("sys/devices/system/cpu/online", "0-7\n");
        for cpu in 1..8 {
            world.write(&format!("sys/devices/system/cpu/cpu{cpu}/online"), "1\n");
        }
        for (node, cpus) in [(0, "0-3"), (1, "4-7")] {
            world.write(&format!("sys/devices/system/node/node{node}/cpulist"), cpus);
        }
        world.irq(24, "0-7", 0o644);
        world.write("proc/irq/default_smp_affinity", "ff\n");
        world.write("proc/self/cgroup", "0::/user.slice\n");
        world.thread(2, "kthreadd", MOVABLE, "0-7");
        world.thread(20, "kcompactd1", MOVABLE, "4-7");
        world.thread(30, "ksoftirqd/5", BOUND, "5");
        world.thread(31, "kworker/5:1-events", BOUND, "5");
        world.thread(500, "kvm", 0, "0-7");
        world.thread(600, "two", 0, "5-6");
        world.write("proc/2/task/2/children", "20 30 31 ");
        for (file, text) in [
            ("cpuset.cpus", ""),
            ("cpuset.cpus.exclusive", ""),
            ("cpuset.cpus.partition", "member"),
        ] {
            world.write(&format!("sys/fs/cgroup/qemu.slice/{file}"), text);
        }
        world
    }

    fn irq(&self, number: u32, cpus: &str, mode: u32) {
        let path = format!("proc/irq/{number}/smp_affinity_list");
        self.write(&path, cpus);
        fs::set_permissions(self.path(&path), fs::Permissions::from_mode(mode)).expect("a mode");
    }

    fn reonline_lease(&self, vm: &str, exclusive: &str) -> Lease {
        let lease = World::lease_of(vm, exclusive, [Knob::Reonline]);
        self.state.write_lease(&lease).expect("written");
        lease
    }

    fn facts_with(&self, others: &[Lease], memory: &HostMemory) -> Facts {
        let tree = CgroupTree::of(&self.root);
        reonline_facts(&self.root, &self.masks, &tree, &set("4-7"), others, memory).expect("facts")
    }

    fn facts(&self) -> Facts {
        self.facts_with(&[], &HostMemory::default())
    }

    /// What is left out of CPUs 4 to 7, in words.
    fn left_out(&self, others: &[Lease]) -> Vec<String> {
        let facts = self.facts_with(others, &HostMemory::default());
        let choice = choose(&set("4-7"), &facts, Beforehand::Done).expect("a choice");
        choice.left_out.iter().map(|(cpu, blocker)| format!("{cpu}: {blocker}")).collect()
    }

    fn open(&self) -> HostJournal {
        HostJournal::open(&self.state.host_journal_path(), BOOT).expect("a journal")
    }

    fn cycle(&self, at: usize) -> Cycled {
        let kept = [Place::CpuList("proc/irq/24/smp_affinity_list".to_owned())];
        let done = cycle(self.host(), &mut self.open(), cpu(at), &kept);
        done.expect("a journal").cycled
    }

    fn reconcile_all(&self) {
        HostKnobs::default().reconcile(self.host(), &self.state, BOOT).expect("reconciled");
    }
}

#[test]
fn reonline_is_possible_where_every_thread_has_another_cpu() {
    let world = World::with_switches();
    assert_eq!(world.left_out(&[]), [""; 0]);
    assert_eq!(world.facts().never, None);
}

#[test]
fn each_that_would_lose_something_stands_against_it() {
    let world = World::with_switches();
    world.thread(601, "alone", 0, "5");
    assert_eq!(world.left_out(&[]), ["5: thread 601 (alone) may run nowhere else"]);
    world.thread(601, "alone", MOVABLE, "5");
    assert_eq!(world.left_out(&[]).len(), 1, "a kernel thread that could be elsewhere");
    world.thread(601, "kpktgend_5", BOUND, "5");
    assert_eq!(world.left_out(&[]), ["5: thread 601 (kpktgend_5) may run nowhere else"]);
    // One that is allowed on an offline CPU beside has no other now.
    world.thread(601, "alone", 0, "6,9");
    assert_eq!(world.left_out(&[]).len(), 1);
    world.thread(601, "gone", 0, "0-3");
    world.irq(40, "7", 0o644);
    assert_eq!(world.left_out(&[]), ["7: interrupt 40 may fire nowhere else"]);
    world.irq(40, "7", 0o444);
    assert_eq!(world.left_out(&[]), [""; 0], "the kernel looks after it");
    let other = world.reonline_lease("101", "6");
    assert_eq!(world.left_out(&[other]), ["6: VM 101 has it"]);
    fs::remove_file(world.path("sys/devices/system/cpu/cpu4/online")).expect("gone");
    assert_eq!(world.left_out(&[]), ["4: the kernel has no switch for it"]);
    let facts = world.facts();
    let first = choose(&set("0"), &facts, Beforehand::Done).expect("a choice");
    assert_eq!(first.taken, [cpu(0)], "of CPUs that were not asked about nothing is known");
    let root = world.root.clone();
    let tree = CgroupTree::of(&root);
    let facts = reonline_facts(&root, &world.masks, &tree, &set("0"), &[], &HostMemory::default());
    let first = choose(&set("0"), &facts.expect("facts"), Beforehand::Done).expect("a choice");
    assert_eq!(first.left_out[0].1.to_string(), "it is the machine's first");
}

#[test]
fn what_a_partition_or_resctrl_group_has_is_theirs() {
    let world = World::with_switches();
    let group = "sys/fs/cgroup/qemu.slice/101.scope/vcpus";
    world.write(&format!("{group}/cpuset.cpus"), "6\n");
    world.write(&format!("{group}/cpuset.cpus.exclusive"), "6-7\n");
    for state in ["isolated", "root", "isolated invalid (Cpu list in cpuset.cpus not exclusive)"] {
        world.write(&format!("{group}/cpuset.cpus.partition"), state);
        let left = world.left_out(&[]);
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(left[0], "6: the partition qemu.slice/101.scope/vcpus has it");
    }
    world.write(&format!("{group}/cpuset.cpus.partition"), "member\n");
    assert_eq!(world.left_out(&[]), [""; 0]);
    world.write("sys/fs/resctrl/cpus_list", "0-7\n");
    world.write("sys/fs/resctrl/info/last_cmd_status", "ok\n");
    assert_eq!(world.left_out(&[]), [""; 0], "the first group has whatever comes");
    world.write("sys/fs/resctrl/games/cpus_list", "4\n");
    world.write("sys/fs/resctrl/mon_groups/seen/cpus_list", "5\n");
    let left = world.left_out(&[]);
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left[0].ends_with("sys/fs/resctrl/games has it"), "{left:?}");
}

#[test]
fn a_kernel_that_forgets_is_known_by_its_files() {
    let world = World::with_switches();
    world.write("proc/self/cgroup", "3:cpu,cpuset:/x\n0::/\n");
    assert_eq!(world.facts().never, Some(Never::CpusetV1));
    world.write("proc/self/cgroup", "0::/\n");
    let slice = world.path("sys/fs/cgroup/qemu.slice/cpuset.cpus.exclusive");
    fs::remove_file(slice).expect("gone");
    assert_eq!(world.facts().never, Some(Never::OldKernel));
    world.write("sys/fs/cgroup/qemu.slice/cpuset.cpus.exclusive", "");
    assert_eq!(world.facts().never, None);
    world.thread(20, "kcompactd1", MOVABLE, "4-5");
    assert_eq!(world.facts().never, Some(Never::Kcompactd("kcompactd1".to_owned())));
    // Moved away for a VM: what it had before is what it goes back to.
    let place = Place::Thread(ThreadKey { tid: Tid(20), start: StartTicks(77) });
    let memory = HostMemory::of(&[HostRecord::Original { place, value: Value::Cpus(set("4-7")) }]);
    assert_eq!(world.facts_with(&[], &memory).never, None);
}

#[test]
fn a_cpu_is_online_again_and_nothing_is_remembered() {
    let world = World::with_switches();
    assert!(matches!(world.cycle(5), Cycled::Done));
    assert_eq!(world.read("sys/devices/system/cpu/cpu5/online"), "1");
    assert!(world.open().memory().is_empty());
    let text = fs::read_to_string(world.state.host_journal_path()).expect("a journal");
    let at = |word: &str| text.find(word).expect("a line");
    assert!(at("intent") < at("settled"), "{text}");
    world.reconcile_all();
    assert!(!world.state.host_journal_path().exists());
}

/// A kernel that has given a thread all CPUs, and accepts a mask without applying it.
struct Deaf(AtomicBool);

impl Sched for Deaf {
    fn affinity(&self, _: Tid) -> io::Result<CpuSet> {
        Ok(set(if self.0.swap(true, Ordering::Relaxed) { "0-7" } else { "4-5" }))
    }

    fn set_affinity(&self, _: Tid, _: &CpuSet) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_did_not_come_back_with_the_cpu_is_not_taken_for_done() {
    let world = World::with_switches();
    let place = Place::Thread(ThreadKey { tid: Tid(600), start: StartTicks(77) });
    let deaf = Deaf(AtomicBool::new(false));
    let mut journal = world.open();
    let host = Host { sched: &deaf, ..world.host() };
    let report = cycle(host, &mut journal, cpu(5), std::slice::from_ref(&place));
    let report = report.expect("a journal");
    assert!(matches!(report.cycled, Cycled::Done));
    let [left] = &*report.put_back else { panic!("{:?}", report.put_back) };
    assert!(left.is_left_changed(), "{left:?}");
    assert_eq!(journal.memory().original(&place), Some(&Value::Cpus(set("4-5"))));
}

#[test]
fn killed_anywhere_the_next_qmpin_brings_the_cpu_online() {
    let world = World::with_switches();
    world.cycle(5);
    let whole = fs::read_to_string(world.state.host_journal_path()).expect("a journal");
    let lines: Vec<&str> = whole.lines().collect();
    let intent = lines.iter().position(|line| line.contains("intent")).expect("an intent");
    let settled = lines.iter().position(|line| line.contains("settled")).expect("it is settled");
    assert!(intent < settled, "{lines:?}");
    for others in [false, true] {
        for cut in 0..=lines.len() {
            // It is offline only between these two.
            let states: &[&str] =
                if (intent + 1..=settled).contains(&cut) { &["1", "0"] } else { &["1"] };
            for now in states {
                if others {
                    world.reonline_lease("101", "2-3");
                }
                let text = lines[..cut].join("\n") + if cut > 0 { "\n" } else { "" };
                fs::write(world.state.host_journal_path(), text).expect("cut");
                world.write("sys/devices/system/cpu/cpu5/online", now);
                world.reconcile_all();
                let why = format!("cut at {cut}, {now}, {others}");
                assert_eq!(world.read("sys/devices/system/cpu/cpu5/online"), "1", "{why}");
                let left = world.open();
                assert!(left.memory().original(&switch(cpu(5))).is_none(), "{why}");
                assert_eq!(world.read("proc/irq/24/smp_affinity_list"), "0-7", "{why}");
                if others {
                    world.state.forget(&"101".parse().expect("a name")).expect("forgotten");
                    world.reconcile_all();
                }
                assert!(!world.state.host_journal_path().exists(), "{why}");
            }
        }
    }
}

#[test]
fn cpu_taken_offline_externally_stays_offline() {
    let world = World::with_switches();
    let place = switch(cpu(5));
    let value = Value::Word("1".to_owned());
    world.open().append(vec![HostRecord::Original { place, value }]).expect("a line");
    world.write("sys/devices/system/cpu/cpu5/online", "0");
    world.reconcile_all();
    assert_eq!(world.read("sys/devices/system/cpu/cpu5/online"), "0");
}
