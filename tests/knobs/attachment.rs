//! A whole attachment on a made-up host: files in a folder, masks in memory, a made-up systemd and kernel behind the
//! cgroup tree, and QMP answered by this process. What real QEMUs and kernels do with it is seen in `tests/attached`
//! and on the test host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;

use qmpin::attachment::Attachment;
use qmpin::attachment::reports::PassReport;
use qmpin::attachment::settings::{Follow, Settings};
use qmpin::cpuset::CpuSet;
use qmpin::discover::{VmLocation, process_key};
use qmpin::ids::{Pid, Tid};
use qmpin::leases::Lease;
use qmpin::plan::{Finding, Verdict};
use qmpin::policy::{Level, Policy, Sourced};
use qmpin::qmp::Limits;
use qmpin::sched::Sched as _;
use qmpin::sysroot::SysRoot;
use serde_json::Value;

use crate::support::host_world::picture_of;
use crate::support::hosts::ryzen_5900x;
use crate::support::made_up::{BOOT, World, set};
use crate::support::qmp_peer::{Peer, cpu, iothread, run};

const VCPUS: usize = 4;
/// Whether its QEMU lives; its lease has not changed.
const READS_PER_NEIGHBOUR_MAX: u64 = 3;
/// Numbers that no thread of this machine has (`/proc/sys/kernel/pid_max` is 4194304 at most).
const FIRST_VCPU: i32 = 5_000_000;
const IOTHREAD: i32 = FIRST_VCPU + 100;
const WORKER: i32 = FIRST_VCPU + 101;
const HOTPLUGGED: i32 = FIRST_VCPU + 102;
const ALL: &str = "0-23";
const SCOPE: &str = "qemu.slice/100.scope";

/// A made-up QEMU on a made-up host with 24 CPUs. Its process is this one: that is who answers over QMP.
struct Guest {
    world: World,
    peer: Peer,
}

fn own() -> i32 {
    i32::try_from(std::process::id()).expect("a pid")
}

impl Guest {
    fn new() -> Guest {
        let world = World::empty();
        ryzen_5900x().write(&world.path("")).expect("written");
        world.write("proc/sys/kernel/random/boot_id", BOOT);
        let of_process = |name: &str| format!("proc/{}/{name}", own());
        world.write(&of_process("cgroup"), "0::/qemu.slice/100.scope\n");
        world.write(&of_process("cmdline"), "qemu-system-x86_64\0-name\0vm\0");
        world.write("sys/fs/cgroup/qemu.slice/100.scope/cgroup.procs", "");
        let guest = Guest { world, peer: Peer::new() };
        guest.thread(own(), "qemu-system-x86");
        for vcpu in 0..i32::try_from(VCPUS).expect("few") {
            guest.thread(FIRST_VCPU + vcpu, &format!("CPU {vcpu}/KVM"));
        }
        guest.thread(IOTHREAD, "iothread0");
        guest.thread(WORKER, "worker");
        guest
    }

    /// Has systemd know the unit that the VM is in, beside another one.
    fn has_unit(&self) {
        let World { cgroups, systemd, .. } = &self.world;
        let threads: Vec<i32> = self.masks().into_keys().collect();
        for (unit, cgroup, threads) in [
            ("system.slice", "system.slice", &[][..]),
            ("qemu.slice", "qemu.slice", &[]),
            ("100.scope", SCOPE, &threads),
        ] {
            cgroups.add(cgroup, threads);
            systemd.add(unit, cgroup);
        }
        cgroups.put("cgroup.controllers", "cpuset cpu");
        fs::create_dir_all(self.world.path("run/systemd/system")).expect("made");
    }

    /// What systemd and the kernel have of the VM and of what is beside it.
    fn picture(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        for top in ["sys/fs/cgroup", "run/systemd"] {
            picture_of(&self.world.path(top), &mut picture);
        }
        picture
    }

    /// The threads of a group of the VM's unit.
    fn group(&self, name: &str) -> Vec<i32> {
        let text = self.world.cgroups.get(&format!("{SCOPE}/{name}/cgroup.threads"));
        text.lines().map(|tid| tid.parse().expect("a number")).collect()
    }

    /// A thread of the process that may run everywhere.
    fn thread(&self, tid: i32, comm: &str) {
        let real = fs::read_to_string("/proc/self/stat").expect("there");
        let rest = real.rsplit_once(')').expect("a name").1;
        let folder = format!("proc/{}/task/{tid}", own());
        self.world.write(&format!("{folder}/stat"), &format!("{tid} ({comm}){rest}"));
        self.world.write(&format!("{folder}/status"), &format!("Name:\t{comm}\nNSpid:\t{tid}\n"));
        self.world.masks.of().insert(tid, set(ALL));
    }

    fn settings(&self, level: Level) -> Settings {
        let mut policy = Policy::default();
        policy.vm.isolation = Sourced::default(level);
        Settings {
            vm: "100".parse().expect("a name"),
            location: VmLocation::Socket { path: self.peer.path().to_owned() },
            state: self.world.state.clone(),
            policy,
            limits: Limits::default(),
            follow: Follow::Once,
            enabled: Vec::new(),
        }
    }

    async fn attach(&self, level: Level) -> (Attachment<'_>, PassReport) {
        let rows = |of: i32| i64::from(of);
        let cpus: Vec<Value> = (0..VCPUS)
            .map(|vcpu| {
                let index = i64::try_from(vcpu).expect("few");
                cpu(index, rows(FIRST_VCPU) + index)
            })
            .collect();
        let answers = async {
            let mut conn = self.peer.accept_and_open().await;
            conn.roles(&cpus.into(), &vec![iothread("io0", rows(IOTHREAD))].into()).await;
            conn
        };
        let start = Attachment::start(self.world.host(), self.settings(level));
        let (attachment, _channel, report) = Box::pin(run(start, answers)).await.expect("attached");
        (attachment, report)
    }

    fn mask(&self, tid: i32) -> CpuSet {
        self.world.masks.affinity(Tid(tid)).expect("a mask")
    }

    /// The masks of all threads of the VM.
    fn masks(&self) -> BTreeMap<i32, CpuSet> {
        let vm = |tid: &i32| *tid == own() || *tid >= FIRST_VCPU;
        let of = self.world.masks.of();
        of.iter().filter(|(tid, _)| vm(tid)).map(|(tid, mask)| (*tid, *mask)).collect()
    }

    fn lease(&self) -> Lease {
        let vm = "100".parse().expect("a name");
        self.world.state.lease(&vm).expect("readable").expect("there")
    }

    /// The files in the state folder but for locks, which the last VM takes with it.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.world.state.path()).expect("there");
        let names = entries.map(|entry| entry.expect("read").file_name().into_string().unwrap());
        let is_lock = |name: &String| name.split('.').next_back() == Some("lock");
        let mut names: Vec<String> = names.filter(|name| !is_lock(name)).collect();
        names.sort_unstable();
        names
    }
}

fn vcpus() -> impl Iterator<Item = i32> {
    (0..).map(|vcpu| FIRST_VCPU + vcpu).take(VCPUS)
}

/// Asserts that each vCPU has a CPU to itself, and that no other thread of the VM may run there.
fn assert_placed(guest: &Guest, attachment: &Attachment<'_>) {
    let exclusive = attachment.plan().exclusive;
    let mut used = CpuSet::EMPTY;
    for (tid, planned) in vcpus().zip(&attachment.plan().vcpus) {
        let on = guest.mask(tid);
        assert_eq!(on, planned.cpus, "{tid}");
        assert_eq!(on.len(), 1, "{tid}: {on}");
        assert!(on.is_subset(&exclusive) && !on.intersects(&used), "{tid}: {on} of {exclusive}");
        used |= on;
    }
    for (tid, on) in guest.masks() {
        assert!(vcpus().any(|vcpu| vcpu == tid) || !on.intersects(&exclusive), "{tid}: {on}");
    }
}

/// What is said about the partition.
fn finding(attachment: &Attachment<'_>) -> Finding {
    let all = attachment.findings();
    let of = all.iter().filter(|one| one.rule == "partition").collect::<Vec<_>>();
    let [of] = of.as_slice() else { panic!("{all:?}") };
    (*of).clone()
}

#[tokio::test]
async fn threads_are_placed_and_all_is_as_before_in_the_end() {
    let guest = Guest::new();
    let before = guest.masks();
    let (mut attachment, report) = Box::pin(guest.attach(Level::Pinned)).await;
    assert_eq!(report.knobs.affinity.applied.len(), before.len(), "{report:?}");
    assert_placed(&guest, &attachment);
    assert_eq!(guest.files(), ["100.journal", "100.lease"]);
    let lease = guest.lease();
    assert_eq!(lease.exclusive, attachment.plan().exclusive);
    assert_eq!(lease.vcpus.len(), VCPUS);
    let again = attachment.pass().expect("a pass");
    assert!(again.knobs.affinity.applied.is_empty(), "nothing is left to do: {again:?}");
    let restored = attachment.finish().expect("restored");
    assert!(restored.is_complete(), "{restored:?}");
    assert_eq!(guest.masks(), before);
    assert_eq!(guest.files(), [""; 0]);
}

#[tokio::test]
async fn moved_thread_is_restored_and_counted_and_a_new_one_is_placed() {
    let guest = Guest::new();
    let (mut attachment, _) = Box::pin(guest.attach(Level::Pinned)).await;
    guest.world.masks.set_affinity(Tid(FIRST_VCPU), &set(ALL)).expect("moved");
    guest.thread(HOTPLUGGED, "vhost-1");
    let report = attachment.pass().expect("a pass");
    let changed: Vec<i32> =
        report.knobs.affinity.applied.iter().map(|one| one.step.thread.tid.0).collect();
    assert_eq!(changed, [HOTPLUGGED, FIRST_VCPU]);
    assert_eq!(attachment.drift_total(), 1, "the new one was not moved by another program");
    assert_placed(&guest, &attachment);
    attachment.finish().expect("restored");
    // It gets the mask that the main thread had.
    assert_eq!(guest.mask(HOTPLUGGED), set(ALL));
}

#[tokio::test]
async fn refused_thread_is_an_outcome_and_the_rest_is_placed() {
    for (errno, why) in
        [(nix::libc::EINVAL, "Invalid argument"), (nix::libc::EPERM, "Operation not permitted")]
    {
        let guest = Guest::new();
        guest.world.masks.refuse(IOTHREAD, errno);
        let (attachment, report) = Box::pin(guest.attach(Level::Pinned)).await;
        let refused: Vec<String> =
            report.knobs.affinity.applied.iter().filter_map(|one| one.refusal()).collect();
        let [refused] = refused.as_slice() else { panic!("{refused:?}") };
        assert!(refused.contains("iothread io0") && refused.contains(why), "{refused}");
        guest.world.masks.of().remove(&IOTHREAD);
        assert_placed(&guest, &attachment);
        assert!(attachment.finish().expect("restored").is_complete());
    }
}

#[tokio::test]
async fn host_without_the_unit_falls_back_and_says_why() {
    let guest = Guest::new();
    let before = guest.masks();
    let (mut attachment, _) = Box::pin(guest.attach(Level::Exclusive)).await;
    attachment.isolate().expect("a choice");
    let partition = finding(&attachment);
    assert_eq!(partition.verdict, Verdict::Degraded);
    assert!(partition.reason.contains("no isolated partition"), "{partition}");
    assert!(attachment.choice_due().is_some(), "it is chosen again when the reason is gone");
    assert_placed(&guest, &attachment);
    let restored = attachment.finish().expect("restored");
    assert!(restored.is_complete(), "{restored:?}");
    assert_eq!(guest.masks(), before);
    assert_eq!(guest.files(), [""; 0]);
}

#[tokio::test]
async fn partition_is_built_in_the_delegated_unit_and_nothing_of_it_is_left() {
    let guest = Guest::new();
    guest.has_unit();
    let (masks, before) = (guest.masks(), guest.picture());
    let (mut attachment, _) = Box::pin(guest.attach(Level::Exclusive)).await;
    let report = attachment.isolate().expect("a choice");
    assert_eq!(report.knobs.partition, []);
    let exclusive = attachment.plan().exclusive.to_string();
    let tree = &guest.world.cgroups;
    assert_eq!(tree.get(&format!("{SCOPE}/vcpus/cpuset.cpus.partition")), "isolated");
    for group in ["qemu.slice", SCOPE, &format!("{SCOPE}/vcpus")] {
        assert_eq!(tree.get(&format!("{group}/cpuset.cpus.exclusive")), exclusive, "{group}");
    }
    assert_eq!(guest.group("vcpus"), vcpus().collect::<Vec<_>>());
    assert_eq!(guest.group("iothreads"), [IOTHREAD]);
    assert_eq!(guest.group("emulator"), [own(), WORKER]);
    assert_eq!(guest.group(""), [0; 0]);
    let asked = ["reload".to_owned(), format!("100.scope: AllowedCPUs={ALL}")];
    assert_eq!(guest.world.systemd.asked(), asked);
    assert_eq!(guest.lease().partition.as_deref(), Some(SCOPE));
    assert_eq!(finding(&attachment).verdict, Verdict::Met);
    let built = guest.picture();
    let again = attachment.pass().expect("a pass");
    assert_eq!((again.knobs.partition, guest.picture()), (Vec::new(), built));
    let restored = attachment.finish().expect("restored");
    assert!(restored.is_complete(), "{restored:?}");
    assert_eq!(guest.picture(), before);
    assert_eq!(guest.masks(), masks);
    assert_eq!(guest.files(), [""; 0]);
}

#[tokio::test]
async fn partition_that_the_kernel_refuses_is_undone_and_units_are_limited_instead() {
    let guest = Guest::new();
    guest.has_unit();
    guest.world.cgroups.refuse_partitions("Cpu list in cpuset.cpus not exclusive");
    let before = guest.picture();
    let (mut attachment, _) = Box::pin(guest.attach(Level::Exclusive)).await;
    attachment.isolate().expect("a choice");
    let partition = finding(&attachment);
    assert_eq!(partition.verdict, Verdict::Degraded);
    assert!(partition.reason.contains("isolated invalid (Cpu list"), "{partition}");
    assert_eq!(guest.picture(), before, "nothing is left of the attempt");
    assert_eq!(guest.lease().slices.as_deref(), Some(SCOPE));
    attachment.keep_host().expect("kept");
    let rest = set(ALL) - attachment.plan().exclusive;
    assert_eq!(guest.world.cgroups.get("system.slice/cpuset.cpus"), rest.to_string());
    let restored = attachment.finish().expect("restored");
    assert!(restored.is_complete(), "{restored:?}");
    assert_eq!(guest.picture(), before);
    assert_eq!(guest.files(), [""; 0]);
}

/// How many times this thread has read from a file.
fn reads() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").expect("counted");
    let line = text.lines().find_map(|line| line.strip_prefix("syscr: ")).expect("reads");
    line.parse().expect("a number")
}

/// What one supervisor reads while nothing happens, beside so many others. What a kernel takes for it is measured on
/// the test host (`cost`).
#[tokio::test]
async fn what_a_supervisor_reads_hardly_grows_with_its_neighbours() {
    let guest = Guest::new();
    let (mut attachment, _) = Box::pin(guest.attach(Level::Exclusive)).await;
    attachment.isolate().expect("a choice");
    let init = process_key(&SysRoot::live(), Pid(1)).expect("it lives");
    let mut cost = Vec::new();
    for neighbours in [1, 5, 10, 30] {
        for number in 0..neighbours {
            let vm = format!("{}", 200 + number).parse().expect("a name");
            let lease = Lease {
                exclusive: set("23"),
                emulator: set("0-11"),
                iothreads: set("0-11"),
                ..Lease::new(vm, BOOT.to_owned(), init)
            };
            guest.world.state.write_lease(&lease).expect("written");
        }
        let mut tick = || {
            attachment.check_host().expect("checked");
            attachment.pass().expect("a pass");
        };
        // What has changed, once.
        tick();
        tick();
        let before = reads();
        tick();
        cost.push((neighbours, reads() - before));
    }
    let [(_, one), .., (_, thirty)] = cost.as_slice() else { panic!("{cost:?}") };
    println!("reads in a turn of the slow timer, by neighbours: {cost:?}");
    assert!((thirty - one) / 29 <= READS_PER_NEIGHBOUR_MAX, "{cost:?}");
    assert!(attachment.finish().expect("restored").is_complete());
}
