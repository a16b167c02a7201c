//! A mask that is restored is read back: what the kernel has made of it is what counts.

#![allow(clippy::expect_used)] // a test may end

use std::io;

use crate::support::made_up::{Masks, World, set};
use qmpin::cpuset::CpuSet;
use qmpin::ids::{Pid, StartTicks, Tid};
use qmpin::journal::{Baseline, Intent, Memory, Record};
use qmpin::knobs::affinity::decide::{Around, Kind, is_back};
use qmpin::knobs::affinity::restore::{RestoreReport, restore_process};
use qmpin::knobs::host::memory::{HostMemory, HostRecord};
use qmpin::sched::Sched;
use qmpin::threads::{ProcessKey, ThreadKey};

const QEMU: i32 = 500;
const START: StartTicks = StartTicks(77);
const BEFORE: &str = "0-7";
const OURS: &str = "4";

/// A kernel that makes this of the mask it is given.
struct Makes<'a>(&'a Masks, &'a dyn Fn(CpuSet) -> CpuSet);

impl Sched for Makes<'_> {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        self.0.affinity(tid)
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        self.0.set_affinity(tid, &self.1(*cpus))
    }
}

fn restored(world: &World, makes: &dyn Fn(CpuSet) -> CpuSet) -> RestoreReport {
    world.write("sys/devices/system/cpu/online", "0-6\n");
    world.thread(QEMU, "kvm", 0, OURS);
    let thread = ThreadKey { tid: Tid(QEMU), start: START };
    let (from, to) = (set(BEFORE), set(OURS));
    let memory = Memory::of(&[
        Record::Baseline(Baseline { main: from, threads: vec![(thread.tid, START, from)] }),
        Record::Intent(Intent { thread, from, to }),
    ]);
    let process = ProcessKey { pid: Pid(QEMU), start: START };
    let sched = Makes(&world.masks, makes);
    let host = HostMemory::default();
    restore_process(&world.root, &sched, process, &memory, &host).expect("looked at")
}

#[test]
fn change_that_the_kernel_did_not_make_is_reported() {
    for (makes, now) in [(OURS, "4"), ("0-3", "0-3"), ("", "none")] {
        let report = restored(&World::empty(), &|_| set(makes));
        assert_eq!((report.masks.put_back.len(), report.masks.failed.len()), (0, 1), "{makes:?}");
        assert!(!report.is_complete(), "{makes:?}");
        let said = report.masks.failed.first().expect("one").error.to_string();
        assert_eq!(said, format!("it is {now} all the same"));
    }
}

#[test]
fn offline_cpus_and_those_that_the_cpuset_does_not_have_are_not_missed() {
    let world = World::empty();
    world.write(&format!("proc/{QEMU}/cgroup"), "0::/qemu.slice/100.scope\n");
    world.write("sys/fs/cgroup/qemu.slice/100.scope/cpuset.cpus.effective", "0-3\n");
    for makes in [BEFORE, "0-6", "0-3"] {
        let report = restored(&world, &|_| set(makes));
        assert_eq!((report.masks.put_back.len(), report.masks.failed.len()), (1, 0), "{makes}");
        assert!(report.is_complete(), "{makes}");
    }
}

#[test]
fn what_the_cpuset_leaves_by_then_counts() {
    let world = World::empty();
    world.write(&format!("proc/{QEMU}/cgroup"), "0::/qemu.slice/100.scope\n");
    let effective = "sys/fs/cgroup/qemu.slice/100.scope/cpuset.cpus.effective";
    world.write(effective, "0-6\n");
    let report = restored(&world, &|_| {
        world.write(effective, "0-1\n");
        set("0-1")
    });
    assert!(report.is_complete(), "{:?}", report.masks.failed);
}

/// The kernel gives its own threads no CPU that another VM's partition has.
#[test]
fn of_the_kernels_threads_cpus_of_vms_that_stay_are_not_missed() {
    let host = HostMemory::of(&[HostRecord::Off(set("2-3")), HostRecord::Off(set("4-5"))]);
    let around = Around { online: set("0-6"), limits: &[], host: &host };
    for (kind, found, is) in [
        (Kind::OfKernel, "0-1,4-6", true),
        (Kind::OfKernel, "0-1,6", true),
        (Kind::OfKernel, "0-4,6", false),
        (Kind::OfKernel, "4", false),
        (Kind::OfProcess, "0-1,4-6", false),
        (Kind::OfProcess, "0-6", true),
    ] {
        assert_eq!(is_back(&set(BEFORE), kind, &set(found), &around), is, "{kind:?} {found}");
    }
}
