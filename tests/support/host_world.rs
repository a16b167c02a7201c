//! A made-up host with everything that its knobs change. For the tests that ask for it by name: others have worlds of
//! their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qmpin::cpuset::CpuSet;
use qmpin::journal::Memory;
use qmpin::knobs::host::keep::HostKnobs;
use qmpin::knobs::host::report::HostReport;
use qmpin::leases::Lease;
use qmpin::policy::{Knob, Level};

use crate::support::made_up::{BOOT, BOUND, MOVABLE, World};

pub(crate) const ONLINE: &str = "0-7";
pub(crate) const KTHREADS: [(i32, &str, &str); 4] = [
    (KTHREADD, "kthreadd", "0-7"),
    (20, "kcompactd0", "0-3"),
    (21, "kswapd1", "4-7"),
    (30, "ksoftirqd/5", "5"),
];
pub(crate) const KTHREADD: i32 = 2;
pub(crate) const CHILDREN: &str = "proc/2/task/2/children";
pub(crate) const CHILDREN_BEFORE: &str = "20 21 30 ";
/// The pid of one that comes later.
pub(crate) const PSIMON: i32 = 40;

impl World {
    pub(crate) fn new() -> World {
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
                ("cpufreq/energy_performance_preference", "balance_performance\n"),
                ("cpuidle/state0/name", "POLL\n"),
                ("cpuidle/state0/latency", "0\n"),
                ("cpuidle/state0/disable", "0\n"),
                ("cpuidle/state1/name", "C1\n"),
                ("cpuidle/state1/latency", "2\n"),
                ("cpuidle/state1/disable", "0\n"),
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

    pub(crate) fn kernel_thread(&self, pid: i32, comm: &str, mask: &str) {
        let flags = if comm.contains('/') { BOUND } else { MOVABLE };
        self.thread(pid, comm, flags, mask);
    }

    /// A kernel thread that was not there before: it has its parent's mask.
    pub(crate) fn psimon_is_born(&self) {
        self.kernel_thread(PSIMON, "psimon", &self.mask(KTHREADD).to_string());
        self.write(CHILDREN, &format!("{CHILDREN_BEFORE}{PSIMON} "));
    }

    /// All that may change, by what it means.
    pub(crate) fn picture(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        for top in ["proc/irq", "proc/sys", "sys"] {
            picture_of(&self.path(top), &mut picture);
        }
        for (pid, mask) in self.masks.of().iter() {
            picture.insert(format!("thread {pid}"), mask.to_string());
        }
        picture
    }

    /// What differs from an earlier picture.
    pub(crate) fn changed_since(&self, before: &BTreeMap<String, String>) -> Vec<String> {
        let now = self.picture();
        assert!(now.keys().eq(before.keys()), "something came or went");
        let changed = now.iter().filter(|(key, value)| before[*key] != **value);
        changed.map(|(key, value)| format!("{key}: {} → {value}", before[key])).collect()
    }

    pub(crate) fn lease(&self, vm: &str, exclusive: &str, knobs: impl IntoIterator<Item = Knob>) {
        self.lease_with(vm, exclusive, knobs, |_| ());
    }

    pub(crate) fn lease_with(
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

    pub(crate) fn strict(&self, vm: &str, exclusive: &str) {
        self.lease(vm, exclusive, Level::Strict.knobs());
    }

    pub(crate) fn forget(&self, vm: &str) {
        self.state.forget(&vm.parse().expect("a name")).expect("forgotten");
    }

    pub(crate) fn reconcile(&self) -> HostReport {
        self.reconcile_with(&mut HostKnobs::default())
    }

    pub(crate) fn reconcile_with(&self, knobs: &mut HostKnobs) -> HostReport {
        let host = self.host();
        let lock = self.state.lock_host().expect("locked");
        knobs.remember(host, &self.state, BOOT, &lock).expect("remembered");
        drop(lock);
        knobs.reconcile(host, &self.state, BOOT).expect("reconciled")
    }

    pub(crate) fn remember(&self) {
        let host = self.host();
        let lock = self.state.lock_host().expect("locked");
        HostKnobs::default().remember(host, &self.state, BOOT, &lock).expect("remembered");
    }

    /// A VM goes, and the host has its kernel threads.
    pub(crate) fn take_over(&self, vm: &Memory) {
        let lock = self.state.lock_host().expect("locked");
        let taken = HostKnobs::default().take_over(&self.root, &self.state, BOOT, vm, &lock);
        taken.expect("taken over");
    }

    pub(crate) fn journal(&self) -> Option<String> {
        fs::read_to_string(self.state.host_journal_path()).ok()
    }
}

/// Masks may be written in more ways than one.
pub(crate) fn is_mask(path: &Path) -> bool {
    let is_sysctl = path.ends_with("watchdog_cpumask");
    !is_sysctl && (path.ends_with("cpumask") || path.ends_with("default_smp_affinity"))
}

/// All files below a folder, by what they mean.
pub(crate) fn picture_of(folder: &Path, picture: &mut BTreeMap<String, String>) {
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
