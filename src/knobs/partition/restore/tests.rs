use std::cell::RefCell;
use std::fs;

use super::*;
use crate::cgroups::fake::FakeCgroups;
use crate::discover::Grips;
use crate::discover::cgroup::partition_seen;
use crate::ids::{Pid, StartTicks, VcpuIndex};
use crate::knobs::bench::Bench;
use crate::knobs::execute::{Applied, carry_out};
use crate::knobs::partition::apply::{PartitionBench, prepare_unit, survey_unit};
use crate::knobs::partition::drop_ins::drop_in;
use crate::knobs::partition::plan::Target;
use crate::knobs::partition::plan::steps::{PartitionStep, placing, resizing};
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
        isolated: CpuSet::EMPTY,
        displaced: Vec::new(),
        memory: None,
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
    let site = site();
    let mut tools = PartitionBench { threads: bench, cgroups, site: &site };
    let done = |applied: Vec<Applied<PartitionStep>>| {
        applied.iter().filter(|one| one.outcome.is_ok()).count()
    };
    let placed = done(carry_out(&mut tools, steps));
    let seen = partition_seen(cgroups, &site).expect("seen");
    let steps = resizing(&site, &target, set(cpus), shares, &seen);
    placed + done(carry_out(&mut tools, steps))
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
    FakeUnits { state: RefCell::new(Some(state)), root: Some(root.clone()), ..FakeUnits::default() }
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
