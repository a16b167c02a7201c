//! From the start of a program until the last vCPU is pinned: `qmpin attach`, the bare minimum, and a
//! hook script.

use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::{Duration, Instant};

use qmpin::attachment::Attachment;
use qmpin::attachment::settings::{Follow, Settings};
use qmpin::cgroups::CgroupTree;
use qmpin::cpuset::CpuSet;
use qmpin::discover::VmLocation;
use qmpin::ids::Tid;
use qmpin::knobs::ground::Host;
use qmpin::leases::StateDir;
use qmpin::policy::{CpuChoice, IothreadChoice, Policy, Sharing, Sourced, Spread};
use qmpin::qmp::Limits;
use qmpin::sched::{Kernel, Sched};
use qmpin::sysroot::SysRoot;
use qmpin::systemd::SystemBus;

use crate::bare;
use crate::figures::{Samples, Table};
use crate::qemu::Accel;
use crate::vm::{
    Vm, accel, at_home, await_placed, away_from_home, emulator_cpu, is_placed, stop, vcpu_cpu,
};

const ROUNDS: usize = 200;
/// The script takes its time, so it has every so many-th turn only.
const SCRIPT_EVERY: usize = 20;

/// What hook scripts do for every vCPU: go through the names of all threads, and have `taskset` pin the
/// one that is meant.
const LOOP: &str = r#"
dir=$1 accel=$2 vcpus=$3 cpu=$4
pid=$(cat "$dir/100.pid")
for ((vcpu = 0; vcpu < vcpus; vcpu++)); do
    for task in /proc/"$pid"/task/*; do
        if grep -q "^CPU $vcpu/$accel\$" "$task/comm"; then
            taskset --cpu-list --pid "$cpu" "${task##*/}" >/dev/null
            break
        fi
    done
done
"#;

/// The thrifty ones call `grep` once for each vCPU.
const ONE_GREP: &str = r#"
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
        let (mut ours, mut bare) = (Watched::default(), Watched::default());
        let (mut in_a_loop, mut one_grep) = (Watched::default(), Watched::default());
        let (mut ours_inside, mut bare_inside) = (Samples::default(), Samples::default());
        for round in 0..ROUNDS {
            // Turn about: who comes second finds the caches as the first has left them.
            let turns =
                if round % 2 == 0 { [Turn::Ours, Turn::Bare] } else { [Turn::Bare, Turn::Ours] };
            for turn in turns {
                match turn {
                    Turn::Ours => {
                        stop(ours.until_pinned(&vm, &mut vm.attach()));
                        vm.must_be_home();
                    }
                    Turn::Bare => bare.until_its_end(&vm, &mut bare_program(&vm)),
                }
            }
            ours_inside.add(away_from_home(|| inside(&vm)));
            bare_inside.add(away_from_home(|| bare_inside_once(&vm)));
            if vcpus == 16 && round % SCRIPT_EVERY == 0 {
                in_a_loop.until_its_end(&vm, &mut script_program(LOOP, &vm, vcpus));
                one_grep.until_its_end(&vm, &mut script_program(ONE_GREP, &vm, vcpus));
            }
        }
        table.at_most(
            &format!("attach {vcpus} vCPUs, programs; the bare minimum"),
            &ours.samples,
            &bare.samples,
            "<= 1.5 x",
        );
        table.at_most(
            &format!("attach {vcpus} vCPUs, in one process; the bare minimum"),
            &ours_inside,
            &bare_inside,
            "",
        );
        if vcpus == 16 {
            let what = "attach 16 vCPUs; a bash loop over all comm files";
            table.faster(what, &ours.samples, &in_a_loop.samples, ">= 50 x faster");
            let what = "attach 16 vCPUs; bash with one grep for each vCPU";
            table.faster(what, &ours.samples, &one_grep.samples, "");
        }
    }
}

#[derive(Clone, Copy)]
enum Turn {
    Ours,
    Bare,
}

/// A program's times, and an observer of them that knows when not to look yet: on a machine of few CPUs
/// a busy observer would take one away from what it observes.
#[derive(Default)]
struct Watched {
    samples: Samples,
    pause: Duration,
}

impl Watched {
    /// Starts the program and returns when the last vCPU is pinned.
    fn until_pinned(&mut self, vm: &Vm, program: &mut Command) -> Child {
        let start = Instant::now();
        let child = away_from_home(|| program.spawn()).unwrap();
        at_home(|| self.observe(vm, start));
        child
    }

    fn observe(&mut self, vm: &Vm, start: Instant) {
        sleep(self.pause.saturating_sub(start.elapsed()));
        if !self.pause.is_zero() && is_placed(vm.last_vcpu(), vcpu_cpu()) {
            // Looked too late: that was no measurement.
            self.pause /= 2;
            await_placed(vm.last_vcpu(), vcpu_cpu());
            return;
        }
        let time = await_placed(vm.last_vcpu(), vcpu_cpu()).expect("pinned") - start;
        self.samples.add(time);
        let early = time * 6 / 10;
        self.pause = if self.pause.is_zero() { early } else { self.pause.min(early) };
    }

    /// The same for a program that undoes nothing.
    fn until_its_end(&mut self, vm: &Vm, program: &mut Command) {
        let mut child = self.until_pinned(vm, program);
        assert!(child.wait().unwrap().success());
        vm.go_home();
    }
}

fn bare_program(vm: &Vm) -> Command {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.arg(bare::MODE).arg(vm.socket()).arg(vcpu_cpu().to_string());
    program.stdin(Stdio::null()).stdout(Stdio::null());
    program
}

fn script_program(script: &str, vm: &Vm, vcpus: u32) -> Command {
    let mut program = Command::new("bash");
    program.args(["-c", script, "hook"]).arg(vm.qemu.dir());
    program.arg(if accel() == Accel::Kvm { "KVM" } else { "TCG" });
    program.args([vcpus.to_string(), vcpu_cpu().to_string()]);
    program
}

fn bare_inside_once(vm: &Vm) -> Duration {
    let start = Instant::now();
    bare::pin(&vm.socket(), vcpu_cpu().index()).unwrap();
    let time = start.elapsed();
    vm.go_home();
    time
}

/// The kernel, with the time of the last write.
struct Timed {
    last_write: Mutex<Instant>,
}

impl Sched for Timed {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        Kernel.affinity(tid)
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        let result = Kernel.set_affinity(tid, cpus);
        *self.last_write.lock().unwrap() = Instant::now();
        result
    }
}

/// Attaches by the library alone.
fn inside(vm: &Vm) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let root = SysRoot::live();
    let start = Instant::now();
    let timed = Timed { last_write: Mutex::new(start) };
    let cgroups = CgroupTree::of(&root);
    let host = Host { root: &root, sched: &timed, cgroups: &cgroups, units: &SystemBus };
    let (attachment, channel, _) =
        runtime.block_on(Attachment::start(host, settings(vm))).expect("attached");
    let time = *timed.last_write.lock().unwrap() - start;
    drop(channel);
    attachment.finish().expect("restored");
    vm.must_be_home();
    time
}

fn settings(vm: &Vm) -> Settings {
    let on = |cpu| Sourced::default(CpuChoice::Cpus(CpuSet::single(cpu)));
    let mut policy = Policy::default();
    policy.vm.vcpus = on(vcpu_cpu());
    policy.vm.iothreads = on(vcpu_cpu()).map(|cpus| IothreadChoice { cpus, spread: Spread::Pool });
    policy.vm.emulator = on(emulator_cpu());
    policy.vm.share = Sourced::default(Sharing::Wrap);
    Settings {
        vm: "100".parse().unwrap(),
        location: VmLocation::Proxmox { dir: vm.qemu.dir().to_owned() },
        state: StateDir::at(vm.state_dir()),
        policy,
        limits: Limits::default(),
        follow: Follow::Stay,
        enabled: Vec::new(),
    }
}
