//! `threads`, `plan`, `attach --once` and `detach` on a real QEMU: what is said, what is moved, and that
//! all is as before afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::support::clean;
use crate::support::ordered::Ordered;
use crate::support::qemu::{Accel, PATIENCE, Qemu, QemuOptions, has_kvm, wait_until};
use crate::support::run::{Reaped, Stage, mask, masks, needs_two_cpus, taskset};
use crate::support::skipped;
use nix::sys::signal::Signal;
use qmpin::ids::{Pid, Tid};
use serde_json::{Value, json};

fn options() -> QemuOptions {
    QemuOptions { iothreads: 2, ..QemuOptions::default() }
}

fn assert_threads_contract(stage: &Stage, channel: &str) {
    let done = stage.run(&["threads", "100", "--json"]);
    done.says(0, &[]);
    assert_eq!(done.out.matches('\n').count(), 1, "one line");
    assert!(done.err.is_empty(), "{done:?}");
    let text = done.out.trim_end();
    assert!(text.starts_with("{\"schema\":\"qmpin.threads/1\",\"vm\":\"100\",\"pid\":"), "{text}");
    let document: Value = serde_json::from_str(text).unwrap();
    let ordered = Ordered::read(text);
    assert_eq!(ordered.keys(), ["schema", "vm", "pid", "channel", "threads"]);
    assert_eq!(document["pid"], stage.qemu.pid().0);
    assert_eq!(document["channel"], channel);
    let members = ["tid", "role", "vcpu", "iothread", "guest", "comm", "allowed_cpus", "last_cpu"];
    for row in ordered.rows("threads") {
        assert_eq!(row.keys(), members);
    }
    let order = ["vcpu", "iothread", "emulator", "worker", "vhost", "kernel"];
    let threads = document["threads"].as_array().unwrap();
    let key = |row: &Value| {
        let role = order.iter().position(|role| row["role"] == *role).unwrap();
        let iothread = row["iothread"].as_str().unwrap_or("").to_owned();
        (role, row["vcpu"].as_i64(), iothread, row["tid"].as_i64())
    };
    assert!(threads.is_sorted_by_key(key), "{text}");
    let own = threads.iter().filter(|row| row["role"] != "kernel");
    let tids: Vec<i64> = own.map(|row| row["tid"].as_i64().unwrap()).collect();
    for tid in stage.qemu.threads().keys() {
        assert!(tids.contains(&tid.0.into()), "{tid} is missing");
    }
    for row in threads {
        let (is_vcpu, is_iothread) = (row["role"] == "vcpu", row["role"] == "iothread");
        assert_eq!(row["vcpu"].is_u64(), is_vcpu, "{row}");
        assert_eq!(row["vcpu"].is_null(), !is_vcpu, "{row}");
        assert_eq!(row["iothread"].is_string(), is_iothread, "{row}");
        assert_eq!(row["iothread"].is_null(), !is_iothread, "{row}");
        assert!(row["last_cpu"].is_u64(), "{row}");
        assert!(row["comm"].is_string(), "{row}");
        if is_vcpu {
            let index = row["vcpu"].clone();
            let guest = json!({"socket": 0, "die": null, "core": index, "thread": 0, "node": null});
            assert_eq!(row["guest"], guest);
        } else {
            assert!(row["guest"].is_null(), "{row}");
        }
        if row["role"] != "kernel" {
            let tid = Tid(i32::try_from(row["tid"].as_i64().unwrap()).unwrap());
            let kernels = mask(stage.qemu.pid(), tid);
            assert_eq!(row["allowed_cpus"].as_str(), kernels.as_deref(), "{row}");
        }
    }
}

#[test]
fn threads_document_follows_the_contract() {
    let mut cases = vec![(Accel::Tcg, true), (Accel::Tcg, false)];
    if has_kvm() {
        cases.push((Accel::Kvm, true));
    } else {
        skipped("threads_document_follows_the_contract", "a third of it, for there is no KVM");
    }
    for (accel, named_threads) in cases {
        let long = "iothread,id=a-name-that-is-far-longer-than-the-kernel-has-room-for.0";
        let stage = Stage::new(&QemuOptions {
            accel,
            named_threads,
            vcpus: 12,
            paused: accel == Accel::Kvm,
            own_socket: !named_threads,
            extra: vec!["-object".to_owned(), long.to_owned()],
            ..options()
        });
        let before = stage.masks();
        assert_threads_contract(&stage, if named_threads { "lease" } else { "socket" });
        stage.assert_untouched(&before);
    }
}

#[test]
fn a_main_thread_with_a_name_that_is_no_utf8_is_read() {
    // The kernel cuts a name at 15 bytes, here in the middle of a letter.
    let extra = vec!["-name".to_owned(), "process=öööööööö".to_owned()];
    let stage = Stage::new(&QemuOptions { extra, ..options() });
    stage.run(&["threads", "100"]).says(0, &["vcpu 0", "iothread iothread-virtioscsi1"]);
}

/// A process with a mask of its own, as a poll thread has.
fn pinned_to(cpu: usize) -> Reaped {
    let child = Reaped(clean::command("sleep").arg("600").spawn().unwrap());
    taskset(child.pid().main_thread(), &[cpu]);
    child
}

#[test]
fn who_loses_a_cpu_is_named_by_plan_log_and_status() {
    needs_two_cpus!("who_loses_a_cpu_is_named_by_plan_log_and_status");
    let stage = Stage::new(&options());
    let pinned = pinned_to(1);
    let who = format!("tid {}", pinned.pid());
    let said = "from CPU 1: the CPUs are given by hand";
    let done = stage.run(&["plan", "100", "--json"]);
    let document: Value = serde_json::from_str(&done.says(0, &[said]).out).unwrap();
    let displaced = document["displaced"].as_array().unwrap();
    let is_it = |row: &&Value| row["what"].as_str().is_some_and(|what| what.contains(&who));
    assert_eq!(displaced.iter().find(is_it).map(|row| &row["cpus"]), Some(&json!("1")));
    let attached = stage.attach(&[]);
    assert_eq!(attached.lines_with(said), 1, "{}", attached.err());
    let status = stage.run(&["status", "100", "--json"]);
    let findings: Value = serde_json::from_str(&status.says(0, &[]).out).unwrap();
    let findings = findings["vms"][0]["findings"].as_array().unwrap();
    assert!(findings.iter().any(|finding| finding["rule"] == "promises"), "{findings:?}");
    attached.end();
}

#[test]
fn plan_document_follows_the_contract_and_changes_nothing() {
    needs_two_cpus!("plan_document_follows_the_contract_and_changes_nothing");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let done = stage.run(&["plan", "100", "--json"]);
    let text = done.says(0, &[]).out.trim_end();
    let members = [
        "schema",
        "vm",
        "vcpus",
        "iothreads",
        "emulator",
        "exclusive",
        "housekeeping",
        "displaced",
        "memory",
        "report",
    ];
    let ordered = Ordered::read(text);
    assert_eq!(ordered.keys(), members, "{text}");
    let document: Value = serde_json::from_str(text).unwrap();
    assert_eq!(document["schema"], "qmpin.plan/1");
    assert_eq!(document["vm"], "100");
    assert_eq!(document["vcpus"], json!([{"vcpu": 0, "cpus": "1"}]));
    let iothreads = ["iothread-virtioscsi0", "iothread-virtioscsi1"];
    let iothreads = iothreads.map(|id| json!({"iothread": id, "cpus": "0"}));
    assert_eq!(document["iothreads"], json!(iothreads));
    assert_eq!(document["emulator"], "0");
    assert_eq!(document["exclusive"], "1");
    for row in ordered.rows("vcpus") {
        assert_eq!(row.keys(), ["vcpu", "cpus"]);
    }
    for row in ordered.rows("iothreads") {
        assert_eq!(row.keys(), ["iothread", "cpus"]);
    }
    for row in ordered.rows("report") {
        assert_eq!(row.keys(), ["rule", "verdict", "reason"]);
    }
    for row in document["report"].as_array().unwrap() {
        let verdict = row["verdict"].as_str().unwrap();
        assert!(["met", "degraded", "impossible"].contains(&verdict), "{row}");
    }
    stage.run(&["plan", "100", "--explain"]).says(0, &["~ vcpu 0", "met"]);
    stage.run(&["attach", "100", "--dry-run"]).says(0, &["~ vcpu 0", "→ 1"]);
    // Interrupts that may go to CPU 1 are on every machine.
    let host = &["~ irqs", "/proc/irq/default_smp_affinity: "];
    stage.run(&["attach", "100", "--dry-run", "--isolation", "exclusive"]).says(0, host);
    stage.assert_untouched(&before);
    assert!(!stage.place.state().exists(), "the state folder was made");

    // More vCPUs than CPUs is no plan: exit 1, and the document says what would do.
    let stage = Stage::new(&QemuOptions { vcpus: 2, ..options() });
    let before = stage.masks();
    let done = stage.run(&["plan", "100", "--json"]);
    let document: Value = serde_json::from_str(&done.says(1, &["hint:"]).out).unwrap();
    assert_eq!(document["vcpus"], json!([]));
    assert_eq!(document["report"][0]["verdict"], "impossible");
    stage.run(&["attach", "100", "--once"]).says(1, &["hint:"]);
    stage.assert_untouched(&before);
    stage.run(&["attach", "100", "--once", "--share"]).says(0, &["vCPUs on 1"]);
    stage.run(&["detach", "100"]).says(0, &["restored"]);
    stage.assert_untouched(&before);
}

#[test]
fn once_moves_every_thread_and_detach_puts_every_thread_back() {
    needs_two_cpus!("once_moves_every_thread_and_detach_puts_every_thread_back");
    let stage = Stage::new(&options());
    let (vcpu, iothread) = (stage.vcpu(0), stage.iothread("iothread-virtioscsi0"));
    // What the VM has is no default: each thread gets exactly its own back.
    taskset(vcpu, &[0]);
    taskset(iothread, &[1]);
    let before = stage.masks();
    stage.run(&["attach", "100", "--once"]).says(0, &["vCPUs on 1", "0 refused"]);
    for (tid, mask) in stage.masks() {
        assert_eq!(mask, if tid == vcpu { "1" } else { "0" }, "{tid}");
    }
    assert_eq!(
        stage.place.left_behind(),
        [".host.lock", ".leases.lock", "100.journal", "100.lease", "100.standing"]
    );
    // Again: nothing to move, and the undo is still the first.
    stage.run(&["attach", "100", "--once"]).says(0, &["0 threads moved"]);
    stage.run(&["plan", "100"]).says(0, &["0 of"]);
    stage.run(&["threads", "100"]).says(0, &["vcpu 0"]);
    stage.run(&["detach", "100"]).says(0, &["threads restored"]);
    stage.assert_untouched(&before);
    stage.run(&["detach", "100"]).says(0, &["nothing to restore"]);
    stage.run(&["detach", "--all"]).says(0, &[]);
    stage.assert_untouched(&before);
}

/// A cpuset of CPU 0 alone, gone with the test.
struct Cpuset(PathBuf);

impl Cpuset {
    fn of_cpu_0(pid: Pid) -> Option<Cpuset> {
        for root in ["/sys/fs/cgroup/cpuset", "/sys/fs/cgroup"] {
            let dir = Path::new(root).join(format!("qmpin-test-{pid}"));
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            let cpuset = Cpuset(dir);
            let set = |file: &str, text: &str| fs::write(cpuset.0.join(file), text).is_ok();
            if set("cpuset.cpus", "0")
                && set("cpuset.mems", "0")
                && set("cgroup.procs", &pid.to_string())
            {
                return Some(cpuset);
            }
        }
        None
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        // A process that is left in it, dying or not, goes back up.
        let root = self.0.parent().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            let left = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines() {
                let _ = fs::write(root.join("cgroup.procs"), pid);
            }
        }
    }
}

#[test]
fn change_that_a_cpuset_forbids_is_reported_and_not_repeated() {
    let test = "change_that_a_cpuset_forbids_is_reported_and_not_repeated";
    needs_two_cpus!(test);
    let stage = Stage::new(&options()).with_policy("check_interval_s = 1\n");
    let Some(_cpuset) = Cpuset::of_cpu_0(stage.qemu.pid()) else {
        return skipped(test, "no cpuset may be made here");
    };
    let before = stage.masks();
    let vcpu = format!("vCPU 0 (tid {}", stage.vcpu(0));
    let once = ["attach", "100", "--once", "--iothreads", "0-1"];
    stage.run(&once).says(6, &["refused: ", &vcpu, "the kernel made it 0"]);
    stage.run(&["detach", "100"]).says(0, &[]);
    stage.assert_untouched(&before);
    let mut attached = stage.attach(&["--iothreads", "0-1"]);
    for _ in 0..3 {
        // By the timer it is tried again, and no more is said of it.
        attached.wait_told("WATCHDOG=1");
        attached.notified.clear();
    }
    assert_eq!(attached.lines_with(&vcpu), 1, "{}", attached.err());
    assert_eq!(attached.lines_with("the kernel made it 0"), 2, "{}", attached.err());
    assert_eq!(attached.lines_with("externally"), 0, "{}", attached.err());
    attached.end();
    stage.assert_untouched(&before);
    stage.qemu.kill();
}

#[test]
fn vm_without_a_unit_of_its_own_is_pinned_and_the_reason_is_logged_once() {
    needs_two_cpus!("vm_without_a_unit_of_its_own_is_pinned_and_the_reason_is_logged_once");
    // This test is in the same cgroup as its QEMU, so there is no host where it could be otherwise.
    let stage = Stage::new(&options()).with_policy("partition = true\n");
    let plan = stage.run(&["plan", "100"]);
    plan.says(0, &["partition", "no isolated partition"]);
    let done = stage.run(&["attach", "100", "--once"]);
    done.says(0, &["vCPUs on 1", "0 refused"]);
    assert_eq!(done.err.matches("no isolated partition").count(), 1, "{done:?}");
    stage.run(&["detach", "100"]).says(0, &[]);
    assert!(stage.place.left_behind().is_empty());
}

#[test]
fn an_attach_goes_on_where_once_left_off() {
    needs_two_cpus!("an_attach_goes_on_where_once_left_off");
    let stage = Stage::new(&options());
    taskset(stage.vcpu(0), &[0]);
    let before = stage.masks();
    stage.run(&["attach", "100", "--once"]).says(0, &[]);
    let attached = stage.attach(&[]);
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn the_vms_of_a_host_are_detached_together() {
    needs_two_cpus!("the_vms_of_a_host_are_detached_together");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let attached = stage.attach(&[]);
    // Files of a dead VM, of one that was killed before it wrote anything, and of no process.
    fs::write(stage.place.state().join("101.lock"), "").unwrap();
    fs::write(stage.place.state().join("102.journal"), "").unwrap();
    let mut attached = attached;
    stage.run(&["detach", "--all"]).says(0, &["VM 100: its supervisor has restored everything"]);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    stage.assert_untouched(&before);
}

#[test]
fn later_external_change_is_kept_and_named() {
    needs_two_cpus!("later_external_change_is_kept_and_named");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let vcpu = stage.vcpu(0);
    stage.attach(&[]).kill();
    taskset(vcpu, &[0]);
    let tid = vcpu.to_string();
    stage.run(&["detach", "100"]).says(0, &[&tid, "changed externally", "left as it is"]);
    let mut wanted = before;
    wanted.insert(vcpu, "0".to_owned());
    stage.assert_untouched(&wanted);
}

#[test]
fn a_killed_supervisor_is_succeeded_and_the_first_masks_come_back() {
    needs_two_cpus!("a_killed_supervisor_is_succeeded_and_the_first_masks_come_back");
    let stage = Stage::new(&options());
    taskset(stage.vcpu(0), &[0]);
    let before = stage.masks();
    stage.attach(&[]).kill();
    let pinned = stage.masks();
    assert_ne!(pinned, before);
    let lease = fs::read_to_string(stage.place.state().join("100.lease")).unwrap();

    let attached = stage.attach(&[]);
    assert_eq!(stage.masks(), pinned);
    assert_eq!(attached.lines_with("→"), 0, "{}", attached.err());
    let lease: Value = serde_json::from_str(&lease).unwrap();
    let again = fs::read_to_string(stage.place.state().join("100.lease")).unwrap();
    let again: Value = serde_json::from_str(&again).unwrap();
    for member in ["vm", "boot_id", "qemu", "exclusive", "emulator", "iothreads", "vcpus"] {
        assert_eq!(again[member], lease[member]);
    }
    attached.kill();
    stage.run(&["detach", "100"]).says(0, &["threads restored"]);
    stage.assert_untouched(&before);
}

#[test]
fn there_is_one_supervisor_and_detach_ends_it() {
    needs_two_cpus!("there_is_one_supervisor_and_detach_ends_it");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let mut attached = stage.attach(&[]);
    let by = format!("process {} follows it", attached.pid());
    let hint = "`qmpin detach 100` ends it";
    stage.run(&["attach", "100"]).says(1, &["VM 100 is attached already", &by, hint]);
    stage.run(&["attach", "100", "--once"]).says(1, &["attached already", &by]);
    // Looking is for all, and shows the plan in force.
    stage.run(&["threads", "100"]).says(0, &[]);
    stage.run(&["plan", "100"]).says(0, &["VM 100: 0 of"]);
    stage.run(&["detach", "100"]).says(0, &["its supervisor has restored everything"]);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    stage.assert_untouched(&before);
}

#[test]
fn a_supervisor_that_hangs_is_killed_and_all_is_put_back() {
    needs_two_cpus!("a_supervisor_that_hangs_is_killed_and_all_is_put_back");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let mut attached = stage.attach(&[]);
    attached.signal(Signal::SIGSTOP);
    stage.run(&["detach", "100"]).says(0, &["threads restored"]);
    assert_eq!(attached.wait(), None, "killed");
    stage.assert_untouched(&before);
}

#[test]
fn supervisor_that_waits_for_the_monitor_is_ended_too() {
    needs_two_cpus!("supervisor_that_waits_for_the_monitor_is_ended_too");
    let stage = Stage::new(&options());
    let before = stage.masks();
    for by_detach in [true, false] {
        let holder = stage.qemu.client();
        let mut attached = stage.attach_unready(&[]);
        let lock = stage.place.state().join("100.lock");
        wait_until("it has the lock and its handlers", || {
            fs::read_to_string(&lock).is_ok_and(|text| text.ends_with('}'))
        });
        if by_detach {
            stage.run(&["detach", "100"]).says(0, &[]);
        } else {
            attached.signal(Signal::SIGTERM);
        }
        assert_eq!(attached.wait(), Some(0), "{}", attached.err());
        drop(holder);
        stage.assert_untouched(&before);
    }
}

#[test]
fn two_vms_keep_apart_and_the_dead_one_s_cpus_are_free_again() {
    needs_two_cpus!("two_vms_keep_apart_and_the_dead_one_s_cpus_are_free_again");
    let (first, second) = (Stage::new(&options()), Qemu::start(&options()));
    let (of_first, of_second) = (first.masks(), masks(second.pid()));
    let socket = second.paths().shared.display().to_string();
    let other = ["attach", "other", "--once", "--qmp", &socket];
    let attached = first.attach(&[]);
    let pinned = first.masks();
    first.run(&other).says(1, &["VM 100"]);
    assert_eq!(masks(second.pid()), of_second);
    assert_eq!(first.masks(), pinned);
    // Reaped, its VM alive: its CPUs are its own all the same.
    attached.kill();
    first.run(&other).says(1, &["VM 100"]);
    first.run(&["detach", "100"]).says(0, &["restored"]);
    assert_eq!(first.masks(), of_first);
    first.run(&other).says(0, &["vCPUs on 1"]);
    first.run(&["attach", "100", "--once"]).says(1, &["VM other"]);
    // Its VM dead: swept by the next qmpin.
    second.kill();
    let attached = first.attach(&[]);
    wait_until("it is said", || {
        attached.lines_with("VM other: its QEMU had ended; the host is restored") == 1
    });
    attached.end();
    first.assert_untouched(&of_first);
}

#[test]
fn leavings_of_an_earlier_qemu_are_no_hindrance() {
    needs_two_cpus!("leavings_of_an_earlier_qemu_are_no_hindrance");
    let old = Stage::new(&options());
    old.attach(&[]).kill();
    old.qemu.kill();
    old.run(&["threads", "100"]).says(3, &["VM 100 is not running", "100.pid"]);
    let mut stage = Stage::new(&options());
    stage.place = old.place;
    let before = stage.masks();
    stage.attach(&[]).end();
    stage.assert_untouched(&before);
}

#[test]
fn what_is_left_from_before_a_reboot_is_discarded() {
    needs_two_cpus!("what_is_left_from_before_a_reboot_is_discarded");
    let stage = Stage::new(&options());
    for tid in stage.masks().keys() {
        taskset(*tid, &[0, 1]);
    }
    let before = stage.masks();
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    // The machine has been up all the while: its files say that they are from another time, and its threads are as at
    // first.
    let reboot = || {
        stage.run(&["attach", "100", "--once"]).says(0, &[]);
        let names = stage.place.left_behind();
        assert!(names.iter().any(|name| name == "100.journal"), "{names:?}");
        for path in names.iter().map(|name| stage.place.state().join(name)) {
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.replace(boot_id.trim(), "not-this-boot")).unwrap();
        }
        for tid in before.keys() {
            taskset(*tid, &[0, 1]);
        }
    };
    reboot();
    stage.run(&["status"]).says(0, &["dead"]);
    stage.run(&["detach", "--dead"]).says(0, &[]);
    stage.assert_untouched(&before);
    reboot();
    stage.run(&["detach", "100"]).says(0, &["boot"]);
    stage.assert_untouched(&before);
    reboot();
    let attached = stage.attach(&[]);
    assert_eq!(stage.mask(stage.vcpu(0)), "1");
    attached.end();
    stage.assert_untouched(&before);
}
