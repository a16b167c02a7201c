//! Takes a partition back, from the journal alone. It may run twice, and without QEMU or its unit: then
//! only the levels above, and the drop-in, are left.
//!
//! ```text
//!   VM gone: systemd goes first                                           let_systemd_prune
//!   member ─▶ exclusive: vcpus, unit, slices ─▶ threads to the unit ─▶ groups go ─▶ -cpuset
//!     └────────────── take_down, under the leases' lock ──────────────┘
//!   drop-ins ─▶ reload ─▶ systemd takes the controller back               hand_back
//! ```
//!
//! Slices keep what other VMs and other people have in them.

use std::collections::BTreeSet;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup::{self, is_gone};
use crate::discover::tasks::LOOKS_MAX;
use crate::error::chain;
use crate::ids::Tid;
use crate::journal::PartitionUndo;
use crate::knobs::host::slices::apply::{files, lifts, remove};
use crate::knobs::partition::apply::{Refused, set_cpus, write};
use crate::knobs::partition::drop_ins::{drop_in_new, is_our_drop_in};
use crate::knobs::partition::plan::level_target;
use crate::services;
use crate::site::{Group, Share, levels};
use crate::sysroot::SysRoot;
use crate::systemd::{SystemdError, UnitState, Units};

/// How often it looks again for threads that are about to end: those can no longer be moved, and the group
/// stays until they have.
const ENDING_LOOKS_MAX: usize = 100;
/// Between two of these.
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// How long systemd has to take down the unit of a VM that has ended. It takes milliseconds.
const PRUNING_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks whether it has.
const PRUNING_PAUSE: Duration = Duration::from_millis(10);

/// What came of it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PartitionRestore {
    /// The cgroup whose partition it was, where there was one.
    pub taken_back: Option<String>,
    /// What could not be restored.
    pub refused: Vec<Refused>,
    /// What another program has changed since and is left so, in sentences.
    pub foreign: Vec<String>,
}

/// Lets systemd take down the unit of a VM that has ended, where it is about to. It removes the groups in it
/// first, gives up where one of them is removed meanwhile, and then leaves the unit's own for good
/// (`cg_trim`, `src/basic/cgroup-util.c`); no other program can remove that one safely, since the VM may be
/// started anew at any moment.
pub fn let_systemd_prune(cgroups: &dyn Cgroups, undo: &PartitionUndo) {
    wait_for_pruning(cgroups, &undo.cgroup, PRUNING_LIMIT);
}

/// Whether it is gone within the limit, or lived in again.
fn wait_for_pruning(cgroups: &dyn Cgroups, unit: &str, limit: Duration) -> bool {
    let events = format!("{unit}/cgroup.events");
    let started = Instant::now();
    while cgroups.read(&events).is_ok_and(|now| now.lines().any(|line| line == "populated 0")) {
        if started.elapsed() >= limit {
            return false;
        }
        thread::sleep(PRUNING_PAUSE);
    }
    true
}

/// Takes down what is in the cgroup tree. `shares` are the other VMs' partitions.
pub fn take_down(cgroups: &dyn Cgroups, undo: &PartitionUndo, shares: &[Share]) -> Vec<Refused> {
    let mut refused = Vec::new();
    let mut keep = |done: Result<(), Refused>| refused.extend(done.err());
    let unit = undo.cgroup.as_str();
    let vcpus = Group::Vcpus.below(unit);
    let partition = format!("{vcpus}/cpuset.cpus.partition");
    if cgroups.read(&partition).is_ok_and(|now| now != "member") {
        keep(write(cgroups, &partition, "member", |now| now == "member"));
    }
    keep(shrink(cgroups, &vcpus, CpuSet::EMPTY));
    for level in levels(unit).into_iter().rev() {
        let found = cgroup::set(cgroups, level, "cpuset.cpus.exclusive");
        keep(shrink(cgroups, level, level_target(level, found, undo.cpus, CpuSet::EMPTY, shares)));
    }
    for group in Group::ALL {
        keep(dissolve(cgroups, unit, &group.below(unit)));
    }
    let control = format!("{unit}/cgroup.subtree_control");
    let has_controller = |now: &str| cgroup::has_word(now, "cpuset");
    if !undo.had_controller && cgroups.read(&control).is_ok_and(|now| has_controller(&now)) {
        keep(write(cgroups, &control, "-cpuset", |now| !has_controller(now)));
    }
    // What went with its unit meanwhile needs no undo: systemd takes it down from the leaf up, beside us.
    refused.retain(|refused| match cgroups.read(&refused.path) {
        Err(error) => !is_gone(&error),
        Ok(_) => true,
    });
    refused
}

fn shrink(cgroups: &dyn Cgroups, group: &str, to: CpuSet) -> Result<(), Refused> {
    let found = cgroup::set(cgroups, group, "cpuset.cpus.exclusive");
    if found == to {
        return Ok(());
    }
    set_cpus(cgroups, &format!("{group}/cpuset.cpus.exclusive"), &to)
}

/// Moves a group's threads to the unit and removes it; a thread may be created in it meanwhile.
fn dissolve(cgroups: &dyn Cgroups, unit: &str, group: &str) -> Result<(), Refused> {
    let mut stuck: BTreeSet<Tid> = BTreeSet::new();
    let mut reason = None;
    let (mut looks, mut ending_looks) = (0, 0);
    while looks < LOOKS_MAX && ending_looks < ENDING_LOOKS_MAX {
        let threads = match cgroup::threads(cgroups, group) {
            Ok(threads) => threads,
            // It is gone, or never was a threaded one.
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => {
                reason = Some(error);
                BTreeSet::new()
            }
        };
        for tid in threads {
            match cgroups.write(&format!("{unit}/cgroup.threads"), &tid.to_string()) {
                Err(error) if error.raw_os_error() != Some(nix::libc::ESRCH) => {
                    stuck.insert(tid);
                    reason = Some(error);
                }
                _ => {}
            }
        }
        match cgroups.remove(group) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => {
                if stuck.is_empty() && error.kind() == io::ErrorKind::ResourceBusy {
                    ending_looks += 1;
                    thread::sleep(ENDING_PAUSE);
                } else {
                    looks += 1;
                }
                reason.get_or_insert(error);
            }
        }
    }
    let reason = reason.map_or_else(String::new, |error| error.to_string());
    let who = match stuck.first() {
        Some(tid) => format!("{reason} (thread {tid})"),
        None => reason,
    };
    Err(Refused::new(group, "gone", who))
}

/// Gives the unit back to systemd as it was. One reload, where the unit is still there.
///
/// Its `cpuset.cpus` says all CPUs for as long as systemd keeps the controller for another unit's sake:
/// the kernel does not allow to empty it while there are threads (`ENOSPC`), and it limits nothing.
pub fn hand_back(root: &SysRoot, units: &dyn Units, undo: &PartitionUndo) -> PartitionRestore {
    let PartitionRestore { mut refused, mut foreign, .. } = PartitionRestore::default();
    let unit = undo.unit.as_str();
    let said = |what: &str, error: SystemdError| Refused::new(unit, what, chain(&error));
    let (state, is_there) = match units.state(unit) {
        // One without a cgroup is about to be forgotten; it reads its files anew when it starts.
        Ok(state) => {
            let is_there = !state.control_group.is_empty();
            (state, is_there)
        }
        Err(SystemdError::NoSuchUnit { .. }) => (UnitState::default(), false),
        Err(error) => {
            refused.push(said("as it was", error));
            (UnitState::default(), false)
        }
    };
    // Killed between its text and its name, the drop-in is still under the other one.
    let mut paths: Vec<String> = undo.drop_in.iter().map(|path| drop_in_new(path)).collect();
    if let Some(path) = &undo.drop_in {
        match root.read(path) {
            Ok(text) if !is_our_drop_in(&text) => {
                foreign.push(format!("/{path} was changed externally and is left as it is"));
            }
            _ => paths.push(path.clone()),
        }
    }
    if let Some(ours) = undo.allowed_set {
        let is_ours = |text: &str| state.allowed_cpus == ours || lifts(text);
        if !state.allowed_cpus.is_empty() && state.allowed_cpus != ours {
            foreign.push(format!(
                "AllowedCPUs of {unit} was changed externally to {} and is left as it is",
                state.allowed_cpus
            ));
        }
        let written = files(unit).into_iter();
        paths.extend(written.filter(|path| root.read(path).is_ok_and(|text| is_ours(&text))));
    }
    let mut changed = false;
    for path in &paths {
        match remove(root, path) {
            Ok(removed) => changed |= removed,
            Err(error) => refused.push(Refused::new(format!("/{path}"), "gone", error)),
        }
    }
    // Removed and not reloaded: that is where the one before was killed.
    let is_known = undo.drop_in.is_some() && state.delegated.iter().any(|name| name == "cpuset");
    if is_there && (changed || is_known) {
        match services::reload(units) {
            Ok(()) => {}
            Err(error) => refused.push(said("reloaded", error)),
        }
    }
    let above = undo.cgroup.rsplit_once('/').map_or("", |(above, _)| above);
    let slice = above.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("-.slice");
    match units.realize(slice) {
        // It has gone with its last unit.
        Ok(()) | Err(SystemdError::NoSuchUnit { .. }) => {}
        Err(error) => tracing::debug!("the cpuset controller stays for a while: {}", chain(&error)),
    }
    PartitionRestore { taken_back: None, refused, foreign }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;

    use super::*;
    use crate::cgroups::fake::FakeCgroups;
    use crate::discover::Grips;
    use crate::discover::cgroup::partition_seen;
    use crate::ids::{Pid, StartTicks, VcpuIndex};
    use crate::knobs::affinity::apply::Bench;
    use crate::knobs::partition::apply::{carry_out, prepare_unit, survey_unit};
    use crate::knobs::partition::drop_ins::drop_in;
    use crate::knobs::partition::plan::Target;
    use crate::knobs::partition::plan::steps::{placing, resizing};
    use crate::plan::{Plan, PlannedVcpu, Why};
    use crate::policy::Level;
    use crate::sched::Kernel;
    use crate::site::Site;
    use crate::systemd::fake::FakeUnits;
    use crate::threads::{ProcessKey, Role, Thread, ThreadKey};

    const SCOPE: &str = "qemu.slice/100.scope";
    const OTHER: &str = "qemu.slice/101.scope";

    fn set(text: &str) -> CpuSet {
        CpuSet::parse_cpulist(text).expect("a cpulist")
    }

    fn site() -> Site {
        Site { unit: "100.scope".to_owned(), cgroup: SCOPE.to_owned() }
    }

    fn undo(cpus: &str) -> PartitionUndo {
        PartitionUndo {
            unit: "100.scope".to_owned(),
            cgroup: SCOPE.to_owned(),
            drop_in: Some(drop_in("100.scope")),
            allowed_set: Some(set("0-23")),
            had_controller: false,
            cpus: set(cpus),
        }
    }

    fn tree() -> FakeCgroups {
        FakeCgroups::with(&[("qemu.slice", ""), (SCOPE, "500\n501"), (OTHER, "700")])
    }

    /// A machine with a process 500 whose vCPU is thread 501.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for tid in [500, 501] {
            let folder = dir.path().join(format!("proc/500/task/{tid}"));
            fs::create_dir_all(&folder).expect("a folder");
            let zeros = |count| " 0".repeat(count);
            let stat = format!("{tid} (kvm) S{} 7{}\n", zeros(18), zeros(30));
            fs::write(folder.join("stat"), stat).expect("a file");
        }
        dir
    }

    fn plan(cpus: &str) -> Plan {
        let vcpu = PlannedVcpu {
            vcpu: VcpuIndex(0),
            cpus: set(cpus).first().map(CpuSet::single).unwrap_or_default(),
            why: Why::OwnCore,
        };
        Plan {
            vm: "100".parse().expect("a name"),
            vcpus: vec![vcpu],
            left_alone: vec![],
            iothreads: vec![],
            iothread_cpus: set("0-11"),
            emulator: set("0-11"),
            exclusive: set(cpus),
            housekeeping: set("0-11"),
            isolation: Level::Exclusive,
            report: vec![],
        }
    }

    /// What a supervisor does in a pass, until it is killed.
    fn build(cgroups: &FakeCgroups, root: &SysRoot, cpus: &str, shares: &[Share]) -> usize {
        let plan = plan(cpus);
        let target = Target { cpus: set(cpus), iothreads: set("0-11"), emulator: set("0-11") };
        let thread = |tid, role| Thread {
            key: ThreadKey { tid: Tid(tid), start: StartTicks(7) },
            role,
            comm: "kvm".to_owned(),
            allowed: set("0-23").into(),
            last_cpu: None,
        };
        let threads = [thread(500, Role::Emulator), thread(501, Role::Vcpu(VcpuIndex(0)))];
        let process = ProcessKey { pid: Pid(500), start: StartTicks(7) };
        let grips = Grips::default();
        let bench = Bench { root, sched: &Kernel, grips: &grips, process };
        let seen = partition_seen(cgroups, &site()).expect("seen");
        let steps = placing(&plan, &target, &seen, &threads);
        let (placed, _) = carry_out(bench, cgroups, &site(), &steps);
        let seen = partition_seen(cgroups, &site()).expect("seen");
        let steps = resizing(&site(), &target, set(cpus), shares, &seen);
        placed + carry_out(bench, cgroups, &site(), &steps).0
    }

    #[test]
    fn built_twice_is_built_once() {
        let (cgroups, dir) = (tree(), machine());
        let root = SysRoot::at(dir.path());
        assert!(build(&cgroups, &root, "12-19", &[]) > 0);
        assert_eq!(cgroups.get(&format!("{SCOPE}/vcpus/cpuset.cpus.partition")), "isolated");
        assert_eq!(cgroups.get(&format!("{SCOPE}/vcpus/cgroup.threads")), "501");
        assert_eq!(cgroups.get(&format!("{SCOPE}/emulator/cgroup.threads")), "500");
        assert_eq!(cgroups.get("qemu.slice/cpuset.cpus.exclusive"), "12-19");
        assert_eq!(build(&cgroups, &root, "12-19", &[]), 0);
    }

    #[test]
    fn killed_after_any_write_of_building_and_of_restoring_it_comes_back_whole() {
        let dir = machine();
        let root = SysRoot::at(dir.path());
        let before = tree().files.into_inner();
        for built in 0..40 {
            for restored in [0, 1, 2, 3, 5, 8, 13, 100] {
                let cgroups = tree();
                cgroups.writes_left.set(Some(built));
                build(&cgroups, &root, "12-19", &[]);
                cgroups.writes_left.set(Some(restored));
                take_down(&cgroups, &undo("12-19"), &[]);
                cgroups.writes_left.set(None);
                assert_eq!(take_down(&cgroups, &undo("12-19"), &[]), []);
                // The scope's own type is the kernel's to say.
                assert_eq!(cgroups.files.borrow().clone(), before, "{built} and {restored}");
                cgroups.log.borrow_mut().clear();
                take_down(&cgroups, &undo("12-19"), &[]);
                assert!(cgroups.log.borrow().is_empty(), "twice writes nothing");
            }
        }
    }

    #[test]
    fn it_is_a_member_first_and_shrinks_from_the_leaf() {
        let (cgroups, dir) = (tree(), machine());
        build(&cgroups, &SysRoot::at(dir.path()), "12-19", &[]);
        cgroups.log.borrow_mut().clear();
        take_down(&cgroups, &undo("12-19"), &[]);
        let wanted = [
            format!("{SCOPE}/vcpus/cpuset.cpus.partition=member"),
            format!("{SCOPE}/vcpus/cpuset.cpus.exclusive="),
            format!("{SCOPE}/cpuset.cpus.exclusive="),
            "qemu.slice/cpuset.cpus.exclusive=".to_owned(),
            format!("{SCOPE}/cgroup.threads=501"),
            format!("rmdir {SCOPE}/vcpus"),
            format!("rmdir {SCOPE}/iothreads"),
            format!("{SCOPE}/cgroup.threads=500"),
            format!("rmdir {SCOPE}/emulator"),
            format!("{SCOPE}/cgroup.subtree_control=-cpuset"),
        ];
        assert_eq!(*cgroups.log.borrow(), wanted);
    }

    #[test]
    fn a_neighbours_share_stays_and_a_unit_that_is_gone_is_no_trouble() {
        let (cgroups, dir) = (tree(), machine());
        cgroups.put("qemu.slice/cpuset.cpus.exclusive", "8-11");
        let vm = "101".parse().expect("a name");
        let shares = [Share { vm, cgroup: OTHER.to_owned(), cpus: set("8-11") }];
        build(&cgroups, &SysRoot::at(dir.path()), "12-19", &shares);
        assert_eq!(cgroups.get("qemu.slice/cpuset.cpus.exclusive"), "8-19");
        cgroups.lose(SCOPE);
        assert_eq!(take_down(&cgroups, &undo("12-19"), &shares), []);
        assert_eq!(cgroups.get("qemu.slice/cpuset.cpus.exclusive"), "8-11");
    }

    #[test]
    fn systemd_may_take_the_unit_down_at_the_same_time() {
        let (cgroups, dir) = (tree(), machine());
        build(&cgroups, &SysRoot::at(dir.path()), "12-19", &[]);
        // It goes from the leaf up: the unit itself is still there.
        *cgroups.lost_at_write.borrow_mut() = Some(format!("{SCOPE}/vcpus"));
        assert_eq!(take_down(&cgroups, &undo("12-19"), &[]), []);
        assert_eq!(cgroups.get("qemu.slice/cpuset.cpus.exclusive"), "");
    }

    fn units(root: &SysRoot) -> FakeUnits {
        let state = UnitState { control_group: format!("/{SCOPE}"), ..UnitState::default() };
        FakeUnits {
            state: RefCell::new(Some(state)),
            root: Some(root.clone()),
            ..FakeUnits::default()
        }
    }

    #[test]
    fn unit_is_prepared_with_one_reload_and_restored_with_one() {
        let (cgroups, dir) = (tree(), machine());
        let root = SysRoot::at(dir.path());
        let units = units(&root);
        for wanted in [vec!["reload", "AllowedCPUs=0-23"], vec![]] {
            let needs =
                survey_unit(&root, &cgroups, &units, &site(), Some(&undo("12-19"))).expect("needs");
            assert_eq!((needs.limit, needs.drop_in.is_some()), (None, true));
            prepare_unit(&root, &cgroups, &units, &site(), &needs, &set("0-23")).expect("ready");
            assert_eq!(*units.log.borrow(), wanted);
            units.log.borrow_mut().clear();
        }
        for wanted in [vec!["reload", "realize qemu.slice"], vec!["realize qemu.slice"]] {
            assert_eq!(hand_back(&root, &units, &undo("12-19")), PartitionRestore::default());
            assert_eq!(*units.log.borrow(), wanted);
            units.log.borrow_mut().clear();
        }
        assert!(!dir.path().join("run/systemd/system/100.scope.d").exists());
    }

    #[test]
    fn what_an_administrator_allows_the_unit_is_left_alone() {
        let (cgroups, dir) = (tree(), machine());
        let root = SysRoot::at(dir.path());
        let units = units(&root);
        units.set_allowed_cpus("100.scope", &set("0-15")).expect("set");
        units.log.borrow_mut().clear();
        let needs = survey_unit(&root, &cgroups, &units, &site(), None).expect("needs");
        assert_eq!((needs.limit, needs.allow), (Some(set("0-15")), false));
        hand_back(&root, &units, &PartitionUndo { drop_in: None, ..undo("12-19") });
        assert_eq!(*units.log.borrow(), ["realize qemu.slice"]);
        assert_eq!(units.state("100.scope").expect("a state").allowed_cpus, set("0-15"));
    }

    #[test]
    fn external_change_meanwhile_is_kept_and_named() {
        let (cgroups, dir) = (tree(), machine());
        let root = SysRoot::at(dir.path());
        let units = units(&root);
        let needs = survey_unit(&root, &cgroups, &units, &site(), None).expect("needs");
        prepare_unit(&root, &cgroups, &units, &site(), &needs, &set("0-23")).expect("ready");
        let path = dir.path().join(drop_in("100.scope"));
        let theirs = "[Scope]\nDelegate=cpuset memory\n";
        fs::write(&path, theirs).expect("a file");
        units.set_allowed_cpus("100.scope", &set("0-15")).expect("set");
        let restored = hand_back(&root, &units, &undo("12-19"));
        assert_eq!(restored.refused, []);
        let named = [
            "/run/systemd/system/100.scope.d/50-qmpin.conf was changed externally and is left as it is",
            "AllowedCPUs of 100.scope was changed externally to 0-15 and is left as it is",
        ];
        assert_eq!(restored.foreign, named);
        assert_eq!(fs::read_to_string(&path).expect("there"), theirs);
        assert_eq!(units.state("100.scope").expect("a state").allowed_cpus, set("0-15"));
    }

    #[test]
    fn systemd_is_waited_for_where_the_vm_has_ended() {
        let cgroups = tree();
        assert!(wait_for_pruning(&cgroups, SCOPE, PRUNING_LIMIT), "nothing to wait for");
        let events = format!("{SCOPE}/cgroup.events");
        cgroups.put(&events, "populated 1\nfrozen 0");
        assert!(wait_for_pruning(&cgroups, SCOPE, PRUNING_LIMIT), "it is lived in again");
        cgroups.put(&events, "populated 0\nfrozen 0");
        assert!(!wait_for_pruning(&cgroups, SCOPE, PRUNING_PAUSE), "systemd has let go of it");
    }

    #[test]
    fn without_its_unit_only_files_are_left_to_take_back() {
        let dir = machine();
        let root = SysRoot::at(dir.path());
        let path = dir.path().join(drop_in("100.scope"));
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, "[Scope]\nDelegate=cpuset\n").expect("a file");
        let units = FakeUnits::default();
        assert_eq!(hand_back(&root, &units, &undo("12-19")), PartitionRestore::default());
        let folder = path.parent().expect("a folder");
        assert!(!folder.exists());
        // Killed before it had its name.
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("50-qmpin.new"), "x").expect("a file");
        assert_eq!(
            hand_back(&root, &FakeUnits::default(), &undo("12-19")),
            PartitionRestore::default()
        );
        assert!(!folder.exists());
        assert_eq!(*units.log.borrow(), ["realize qemu.slice"], "nothing is reloaded");
    }
}
