//! A made-up host: files in a folder, and threads whose masks are kept in memory. What the kernel itself does is seen
//! on the test host.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use qmpin::cpuset::CpuSet;
use qmpin::discover;
use qmpin::ids::{Pid, Tid};
use qmpin::knobs::ground::Host;
use qmpin::leases::{Lease, StateDir};
use qmpin::policy::Knob;
use qmpin::sched::Sched;
use qmpin::sysroot::SysRoot;

use crate::support::made_up_units::{Systemd, Tree};

pub(crate) const BOOT: &str = "this-boot";
/// `PF_KTHREAD`, and that with `PF_NO_SETAFFINITY`.
pub(crate) const MOVABLE: u32 = 0x20_0000;
pub(crate) const BOUND: u32 = 0x420_0000;

pub(crate) fn set(list: &str) -> CpuSet {
    list.parse().expect("a cpulist")
}

/// Threads' masks.
#[derive(Default)]
pub(crate) struct Masks {
    of: Mutex<BTreeMap<i32, CpuSet>>,
    /// Threads that cannot be moved although nothing about them says so, and what the kernel says to it.
    stubborn: Mutex<BTreeMap<i32, i32>>,
    /// The CPUs of partitions, which the kernel takes out of every mask that is set.
    partitions: Mutex<CpuSet>,
}

impl Masks {
    pub(crate) fn of(&self) -> MutexGuard<'_, BTreeMap<i32, CpuSet>> {
        self.of.lock().expect("sound")
    }

    /// From now on the kernel refuses to move this thread, with this error.
    pub(crate) fn refuse(&self, tid: i32, errno: i32) {
        self.stubborn.lock().expect("sound").insert(tid, errno);
    }

    /// From now on partitions have these CPUs.
    pub(crate) fn partition(&self, cpus: &str) {
        *self.partitions.lock().expect("sound") = set(cpus);
    }

    /// From now on every thread can be moved.
    pub(crate) fn refuse_none(&self) {
        self.stubborn.lock().expect("sound").clear();
    }
}

impl Sched for Masks {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        let gone = || io::Error::from_raw_os_error(nix::libc::ESRCH);
        self.of().get(&tid.0).copied().ok_or_else(gone)
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        if let Some(errno) = self.stubborn.lock().expect("sound").get(&tid.0) {
            return Err(io::Error::from_raw_os_error(*errno));
        }
        self.of().insert(tid.0, *cpus - *self.partitions.lock().expect("sound"));
        Ok(())
    }
}

pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(crate) root: SysRoot,
    pub(crate) masks: Masks,
    /// It has no group but the root's.
    pub(crate) cgroups: Tree,
    /// It knows no unit.
    pub(crate) systemd: Systemd,
    pub(crate) state: StateDir,
}

impl World {
    /// With nothing in it.
    pub(crate) fn empty() -> World {
        let dir = tempfile::tempdir().expect("a folder");
        let state = StateDir::at(dir.path().join("run/qmpin"));
        state.create().expect("made");
        let root = SysRoot::at(dir.path());
        let (masks, cgroups, systemd) = (Masks::default(), Tree::of(&root), Systemd::of(&root));
        let world = World { dir, root, masks, cgroups, systemd, state };
        // Two processes that live there, too, as QEMUs of leases.
        for pid in [1, std::process::id()] {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("there");
            world.write(&format!("proc/{pid}/stat"), &stat);
        }
        world
    }

    pub(crate) fn host(&self) -> Host<'_> {
        let World { root, masks, cgroups, systemd, .. } = self;
        Host { root, sched: masks, cgroups, units: systemd }
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).expect("there").trim().to_owned()
    }

    pub(crate) fn thread(&self, tid: i32, comm: &str, flags: u32, cpus: &str) {
        // Fields 4 to 8, flags, 10 to 21, start (`man 5 proc_pid_stat`).
        let (to_flags, to_start) = ("0 ".repeat(5), "0 ".repeat(12));
        let stat = format!("{tid} ({comm}) S {to_flags}{flags} {to_start}77 0\n");
        self.write(&format!("proc/{tid}/stat"), &stat);
        self.write(&format!("proc/{tid}/task/{tid}/stat"), &stat);
        self.masks.of().insert(tid, set(cpus));
    }

    pub(crate) fn mask(&self, tid: i32) -> CpuSet {
        self.masks.of()[&tid]
    }

    /// The lease of a VM that lives.
    pub(crate) fn lease_of(
        vm: &str,
        exclusive: &str,
        knobs: impl IntoIterator<Item = Knob>,
    ) -> Lease {
        let us = Pid(i32::try_from(std::process::id()).expect("a pid"));
        let qemu = discover::process_key(&SysRoot::live(), us).expect("we live");
        Lease {
            exclusive: set(exclusive),
            emulator: set("0"),
            iothreads: set("0"),
            knobs: knobs.into_iter().collect(),
            ..Lease::new(vm.parse().expect("a name"), BOOT.to_owned(), qemu)
        }
    }
}
