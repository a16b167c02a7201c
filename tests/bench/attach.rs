//! From the start of a program until the last vCPU is pinned: `qmpin attach`, the bare minimum, and a
//! hook script.

use std::cell::Cell;
use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmpin::cpuset::CpuSet;
use qmpin::discover::VmLocation;
use qmpin::ids::Tid;
use qmpin::leases::StateDir;
use qmpin::policy::{CpuChoice, Policy, Sharing, Sourced};
use qmpin::qmp::Limits;
use qmpin::sched::{Kernel, Sched};
use qmpin::supervise::{Attachment, Follow, Host, Settings};
use qmpin::sysroot::SysRoot;

use crate::bare;
use crate::figures::{Samples, Table};
use crate::qemu::Accel;
use crate::vm::{Vm, accel, await_placed, emulator_cpu, stop, vcpu_cpu};

const ROUNDS: usize = 60;
/// The script takes its time, so it has every so many-th turn only.
const SCRIPT_EVERY: usize = 6;

/// What hook scripts do for every vCPU: read the pid file, find the thread by its name among all, and
/// have `taskset` pin it.
const SCRIPT: &str = r#"
pin_vcpu() {
    local pid tid
    pid=$(cat "$dir/100.pid")
    tid=$(grep "^CPU $1/$accel\$" /proc/"$pid"/task/*/comm | cut -d/ -f5)
    taskset --cpu-list --pid "$2" "$tid" >/dev/null
}
dir=$1 accel=$2 vcpus=$3 cpu=$4
for ((vcpu = 0; vcpu < vcpus; vcpu++)); do pin_vcpu "$vcpu" "$cpu"; done
"#;

pub(crate) fn measure(table: &mut Table) {
    for vcpus in [4, 16, 64] {
        let vm = Vm::with_vcpus(vcpus);
        let (mut ours, mut bare, mut script) =
            (Samples::default(), Samples::default(), Samples::default());
        let (mut ours_inside, mut bare_inside) = (Samples::default(), Samples::default());
        for round in 0..ROUNDS {
            let (time, qmpin) = until_pinned(&vm, &mut vm.attach());
            ours.add(time);
            stop(qmpin);
            vm.must_be_free();
            bare.add(to_its_end(&vm, &mut bare_program(&vm)));
            ours_inside.add(inside(&vm));
            bare_inside.add(bare_inside_once(&vm));
            if vcpus == 16 && round % SCRIPT_EVERY == 0 {
                script.add(to_its_end(&vm, &mut script_program(&vm, vcpus)));
            }
        }
        table.at_most(
            &format!("attach {vcpus} vCPUs, programs; the bare minimum"),
            &ours,
            &bare,
            "<= 1.5 x",
        );
        table.at_most(
            &format!("attach {vcpus} vCPUs, in one process; the bare minimum"),
            &ours_inside,
            &bare_inside,
            "<= 1.5 x",
        );
        if script.count() > 0 {
            let what = format!("attach {vcpus} vCPUs; a hook script");
            table.faster(&what, &ours, &script, ">= 50 x faster");
        }
    }
}

/// Starts a program and returns when the last vCPU is pinned.
fn until_pinned(vm: &Vm, program: &mut Command) -> (Duration, Child) {
    let start = Instant::now();
    let child = program.spawn().unwrap();
    let placed = await_placed(vm.last_vcpu(), vcpu_cpu()).expect("pinned");
    (placed - start, child)
}

/// The same for a program that undoes nothing.
fn to_its_end(vm: &Vm, program: &mut Command) -> Duration {
    let (time, mut child) = until_pinned(vm, program);
    assert!(child.wait().unwrap().success());
    vm.free();
    time
}

fn bare_program(vm: &Vm) -> Command {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.arg(bare::MODE).arg(vm.socket()).arg(vcpu_cpu().to_string());
    program.stdin(Stdio::null()).stdout(Stdio::null());
    program
}

fn script_program(vm: &Vm, vcpus: u32) -> Command {
    let mut program = Command::new("bash");
    program.args(["-c", SCRIPT, "hook"]).arg(vm.qemu.dir());
    program.arg(if accel() == Accel::Kvm { "KVM" } else { "TCG" });
    program.args([vcpus.to_string(), vcpu_cpu().to_string()]);
    program
}

fn bare_inside_once(vm: &Vm) -> Duration {
    let start = Instant::now();
    bare::pin(&vm.socket(), vcpu_cpu().index()).unwrap();
    let time = start.elapsed();
    vm.free();
    time
}

/// The kernel, with the time of the last write.
struct Timed {
    last_write: Cell<Instant>,
}

impl Sched for Timed {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        Kernel.affinity(tid)
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        let result = Kernel.set_affinity(tid, cpus);
        self.last_write.set(Instant::now());
        result
    }
}

/// Attaches by the library alone.
fn inside(vm: &Vm) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let root = SysRoot::live();
    let start = Instant::now();
    let timed = Timed { last_write: Cell::new(start) };
    let host = Host { root: &root, sched: &timed };
    let (attachment, channel, _) =
        runtime.block_on(Attachment::start(host, settings(vm))).expect("attached");
    let time = timed.last_write.get() - start;
    drop(channel);
    attachment.finish().expect("put back");
    vm.must_be_free();
    time
}

fn settings(vm: &Vm) -> Settings {
    let on = |cpu| Sourced::default(CpuChoice::Cpus(CpuSet::single(cpu)));
    let mut policy = Policy::default();
    policy.vm.vcpus = on(vcpu_cpu());
    policy.vm.iothreads = on(vcpu_cpu());
    policy.vm.emulator = on(emulator_cpu());
    policy.vm.share = Sourced::default(Sharing::Wrap);
    Settings {
        vm: "100".parse().unwrap(),
        location: VmLocation::Proxmox { dir: vm.qemu.dir().to_owned() },
        state: StateDir::at(vm.state_dir()),
        policy,
        limits: Limits::default(),
        follow: Follow::Stay,
    }
}
