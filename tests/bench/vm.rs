//! The VM that is measured, and what this machine is.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use qmpin::cpuset::CpuSet;
use qmpin::ids::{CpuId, Tid};
use qmpin::sched::{Kernel, Sched as _};
use serde_json::json;

use crate::qemu::{Accel, Qemu, QemuOptions, has_kvm};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The pause between two looks of an observer: short enough to tell, long enough to leave the CPU to
/// what is observed.
const GLANCE: Duration = Duration::from_micros(100);

/// Why nothing can be measured here.
pub(crate) fn can_run() -> Result<(), String> {
    if fs::metadata("/proc/self").map_or(true, |me| me.uid() != 0) {
        return Err("it needs root".to_owned());
    }
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return Err("there is no qemu-system-x86_64".to_owned());
    }
    if all_cpus().len() < 2 {
        return Err("it needs two CPUs: with one, no mask can change".to_owned());
    }
    // The observer sleeps for some microseconds, not for the default slack of 50 more.
    nix::sys::prctl::set_timerslack(1).map_err(|error| error.to_string())
}

/// The table's last line.
pub(crate) fn machine_in_words() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version = Command::new("qemu-system-x86_64").arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let version = version.split_whitespace().nth(3).unwrap_or("?").to_owned();
    let size = fs::metadata(env!("CARGO_BIN_EXE_qmpin")).map_or(0, |binary| binary.len());
    format!(
        "{} CPUs, Linux {}, QEMU {version} with {}; the executable has {:.1} MiB",
        all_cpus().len(),
        kernel.trim(),
        if accel() == Accel::Kvm { "KVM" } else { "TCG" },
        size as f64 / f64::from(1 << 20)
    )
}

/// What runs the vCPUs.
pub(crate) fn accel() -> Accel {
    if has_kvm() { Accel::Kvm } else { Accel::Tcg }
}

/// The CPUs that may be used here.
pub(crate) fn all_cpus() -> CpuSet {
    static ALL: OnceLock<CpuSet> = OnceLock::new();
    *ALL.get_or_init(|| Kernel.affinity(Tid(0)).unwrap())
}

/// Where vCPUs and iothreads go.
pub(crate) fn vcpu_cpu() -> CpuId {
    all_cpus().iter().last().unwrap()
}

/// Where the emulator threads go: elsewhere, so that a placement can be seen.
pub(crate) fn emulator_cpu() -> CpuId {
    all_cpus().first().unwrap()
}

/// Where all of the VM is before it is attached.
///
/// Not everywhere: where QEMU and who asks it may meet on one CPU, they do on some machines and not on
/// others, and one waits for the other. A physical machine wakes QEMU up on an idle CPU; in a virtual
/// one the kernel takes a CPU that is halted for one that the hypervisor has preempted, and leaves QEMU
/// on the waker's (`kernel/sched/`: `available_idle_cpu`).
fn home() -> CpuSet {
    CpuSet::single(emulator_cpu())
}

/// Does something on the CPU that is not the VM's, and so do programs that it starts.
pub(crate) fn away_from_home<T>(what: impl FnOnce() -> T) -> T {
    on_one(vcpu_cpu(), what)
}

/// Does something on the VM's CPU. An observer belongs there: on the CPU of a program that works on
/// after its last write, it is not woken until that program has had its time.
pub(crate) fn at_home<T>(what: impl FnOnce() -> T) -> T {
    on_one(emulator_cpu(), what)
}

fn on_one<T>(cpu: CpuId, what: impl FnOnce() -> T) -> T {
    Kernel.set_affinity(Tid(0), &CpuSet::single(cpu)).unwrap();
    let result = what();
    Kernel.set_affinity(Tid(0), &all_cpus()).unwrap();
    result
}

/// A VM, and a folder for qmpin's state on a tmpfs, as `/run` is.
pub(crate) struct Vm {
    pub(crate) qemu: Qemu,
    state: tempfile::TempDir,
    tids: Vec<Tid>,
}

impl Vm {
    pub(crate) fn start(options: QemuOptions) -> Vm {
        let qemu = Qemu::start(&QemuOptions { accel: accel(), ..options });
        let state = tempfile::Builder::new().prefix("qmpin-bench-").tempdir_in("/dev/shm").unwrap();
        let cpus = qemu.client().must("query-cpus-fast", &json!({}));
        let tid = |cpu: &serde_json::Value| {
            Tid(i32::try_from(cpu["thread-id"].as_i64().unwrap()).unwrap())
        };
        let mut tids: Vec<Tid> = cpus.as_array().unwrap().iter().map(tid).collect();
        tids.sort_unstable();
        let vm = Vm { qemu, state, tids };
        vm.go_home();
        vm
    }

    /// With so many vCPUs and two iothreads.
    pub(crate) fn with_vcpus(vcpus: u32) -> Vm {
        Vm::start(QemuOptions { vcpus, iothreads: 2, ..QemuOptions::default() })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.qemu.paths().shared
    }

    pub(crate) fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// The vCPU that is pinned last.
    pub(crate) fn last_vcpu(&self) -> Tid {
        *self.tids.last().unwrap()
    }

    /// `qmpin COMMAND` for this VM.
    pub(crate) fn qmpin(&self, command: &str) -> Command {
        let mut qmpin = Command::new(env!("CARGO_BIN_EXE_qmpin"));
        qmpin.arg(command).arg("100");
        qmpin.arg("--proxmox-dir").arg(self.qemu.dir());
        // No policy files: flags say it all.
        qmpin.arg("--config-dir").arg(self.state_dir()).arg("--state-dir").arg(self.state_dir());
        qmpin.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        qmpin
    }

    /// `qmpin attach`, with vCPUs and iothreads on one CPU and the emulator on another.
    pub(crate) fn attach(&self) -> Command {
        let mut attach = self.qmpin("attach");
        attach.args(["--isolation", "pinned", "--share", "--vcpus", &vcpu_cpu().to_string()]);
        attach.args(["--iothreads", &vcpu_cpu().to_string()]);
        attach.args(["--emulator", &emulator_cpu().to_string()]);
        attach
    }

    /// Puts every thread where it was.
    pub(crate) fn go_home(&self) {
        for tid in self.qemu.threads().into_keys() {
            Kernel.set_affinity(tid, &home()).unwrap();
        }
    }

    pub(crate) fn must_be_home(&self) {
        for (tid, comm) in self.qemu.threads() {
            assert_eq!(Kernel.affinity(tid).unwrap(), home(), "{comm}");
        }
    }
}

/// Whether a thread may run on that one CPU only.
pub(crate) fn is_placed(tid: Tid, on: CpuId) -> bool {
    Kernel.affinity(tid).is_ok_and(|cpus| cpus == CpuSet::single(on))
}

/// Observes until a thread may run on that one CPU only. `None`: it was not in time.
pub(crate) fn await_placed(tid: Tid, on: CpuId) -> Option<Instant> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The clock comes first: what was there by then is seen.
        let now = Instant::now();
        if is_placed(tid, on) {
            return Some(now);
        }
        if now > deadline {
            return None;
        }
        sleep(GLANCE);
    }
}

/// Tells qmpin to stop and returns when it has restored everything.
pub(crate) fn stop(mut qmpin: Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(qmpin.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let status = qmpin.wait().unwrap();
    assert!(status.success(), "{status}");
}
