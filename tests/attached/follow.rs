//! `attach` follows a real VM: hotplug, resets, other people's `taskset`, and its end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::{Duration, Instant};

use crate::support::qemu::{Accel, QemuOptions, clients_of, newer_qemu_root, wait_until};
use crate::support::run::{Attached, Stage, needs_two_cpus, taskset};
use crate::support::{accels, skipped};
use nix::sys::signal::Signal;
use qmpin::ids::Tid;
use serde_json::json;

fn options() -> QemuOptions {
    QemuOptions { iothreads: 1, ..QemuOptions::default() }
}

/// One second is the shortest interval there is.
const FAST: &str = "check_interval_s = 1\n";

#[test]
fn ready_is_reported_when_all_is_in_place() {
    needs_two_cpus!("ready_is_reported_when_all_is_in_place");
    let stage = Stage::new(&options());
    let before = stage.masks();
    let mut attached = stage.attach(&[]);
    // Not waited for: it was so before READY was said.
    for (tid, mask) in stage.masks() {
        let is_vcpu = before.contains_key(&tid) && tid == stage.vcpu(0);
        assert_eq!(mask, if is_vcpu { "1" } else { "0" }, "{tid}");
    }
    attached.wait_told("STATUS=1 vCPUs on 1, emulator on 0, asked over leases, drift 0");
    attached.signal(Signal::SIGTERM);
    attached.wait_told("STOPPING=1");
    attached.end_of(0);
    stage.assert_untouched(&before);
}

#[test]
fn a_vm_that_is_just_starting_is_waited_for() {
    needs_two_cpus!("a_vm_that_is_just_starting_is_waited_for");
    let stage = Stage::new(&options());
    let path = |name: &str| stage.qemu.dir().join(name);
    // As it is while QEMU starts: a pid file without a pid, and no socket yet.
    let pid = fs::read_to_string(path("100.pid")).unwrap();
    fs::write(path("100.pid"), "").unwrap();
    fs::rename(path("100.qmp"), path("100.later")).unwrap();
    let mut attached = stage.attach_unready(&["-vv"]);
    let said = |text: &str| attached.lines_with("not yet") > 0 && attached.lines_with(text) > 0;
    wait_until("it has seen no pid", || said("the pid file"));
    fs::write(path("100.pid"), pid).unwrap();
    wait_until("it has found no socket", || said("could not connect to"));
    fs::rename(path("100.later"), path("100.qmp")).unwrap();
    attached.wait_ready();
    attached.end();
}

#[test]
fn only_vms_without_a_supervisor_are_dead() {
    needs_two_cpus!("only_vms_without_a_supervisor_are_dead");
    let stage = Stage::new(&options());
    let before = stage.masks();
    stage.run(&["detach", "--dead"]).says(0, &[]);
    let attached = stage.attach(&[]);
    for words in [&["detach", "--dead"][..], &["detach", "100", "--dead"]] {
        stage.run(words).says(0, &[]);
        assert_ne!(stage.masks(), before, "it is followed");
    }
    attached.kill();
    assert_ne!(stage.masks(), before);
    stage.run(&["detach", "--dead"]).says(0, &["restored"]);
    stage.assert_untouched(&before);
    // No process follows this one, as it was meant.
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    stage.run(&["detach", "100", "--dead"]).says(0, &[]);
    assert_ne!(stage.masks(), before, "it was attached once");
    stage.qemu.kill();
    stage.run(&["detach", "--dead"]).says(0, &[]);
    assert_eq!(stage.place.left_behind(), [""; 0]);
    stage.run(&["detach", "--dead", "--all"]).says(2, &[]);
}

#[test]
fn every_signal_that_means_stop_puts_everything_back() {
    needs_two_cpus!("every_signal_that_means_stop_puts_everything_back");
    let stage = Stage::new(&options());
    let before = stage.masks();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut attached = stage.attach(&[]);
        attached.signal(signal);
        assert_eq!(attached.wait(), Some(0), "{signal}: {}", attached.err());
        stage.assert_untouched(&before);
    }
    let command = stage.place.command(&["nohup"], stage.qemu.dir(), &["attach", "100"]);
    let mut attached = Attached::spawn(command, stage.place.path());
    attached.wait_ready();
    attached.signal(Signal::SIGHUP);
    // It is alive: it mends what is moved after the signal.
    stage.run(&["attach", "100"]).says(1, &["attached already"]);
    assert_ne!(stage.masks(), before);
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn log_without_a_reader_does_not_end_the_supervisor() {
    needs_two_cpus!("log_without_a_reader_does_not_end_the_supervisor");
    let stage = Stage::new(&options()).with_policy(FAST);
    let before = stage.masks();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = stage.command(&["attach", "100"]);
    command.stderr(writer).stdout(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    // The command keeps a writer, too.
    drop((command, reader));
    wait_until("it is attached", || stage.masks() != before);
    let vcpu = stage.vcpu(0);
    wait_until("the vCPU is pinned", || stage.mask(vcpu) == "1");
    taskset(vcpu, &[0]);
    wait_until("the drift is mended", || stage.mask(vcpu) == "1");
    stage.run(&["detach", "100"]).says(0, &[]);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    stage.assert_untouched(&before);
}

#[test]
fn a_hot_added_iothread_is_placed_and_put_back() {
    needs_two_cpus!("a_hot_added_iothread_is_placed_and_put_back");
    let stage = Stage::new(&options());
    let before = stage.masks();
    // Elsewhere than the emulator, so that a placed thread differs from a new one.
    let attached = stage.attach(&["--iothreads", "0-1"]);
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let iothread = stage.iothread("io-hot");
    wait_until("it is placed", || stage.mask(iothread) == "0-1");
    wait_until("it is logged", || attached.lines_with("new: iothread io-hot") == 1);
    attached.end();
    let mut wanted = before.clone();
    wanted.insert(iothread, before[&stage.main_thread()].clone());
    stage.assert_untouched(&wanted);
}

#[test]
fn a_hot_added_iothread_gets_the_main_threads_first_mask() {
    needs_two_cpus!("a_hot_added_iothread_gets_the_main_threads_first_mask");
    let stage = Stage::new(&options());
    let vcpu = stage.vcpu(0);
    taskset(stage.main_thread(), &[1]);
    taskset(vcpu, &[0]);
    let before = stage.masks();
    let attached = stage.attach(&[]);
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let iothread = stage.iothread("io-hot");
    wait_until("it is placed", || stage.mask(iothread) == "0");
    // And it goes, and another comes: nothing of it is left in anybody's mind.
    stage.qemu.client().must("object-del", &json!({"id": "io-hot"}));
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let iothread = stage.iothread("io-hot");
    wait_until("it is placed", || stage.mask(iothread) == "0");
    attached.end();
    let mut wanted = before;
    wanted.insert(iothread, "1".to_owned());
    stage.assert_untouched(&wanted);
}

#[test]
fn a_hot_added_vcpu_is_placed_by_the_overflow_policy() {
    needs_two_cpus!("a_hot_added_vcpu_is_placed_by_the_overflow_policy");
    for accel in accels("a_hot_added_vcpu_is_placed_by_the_overflow_policy") {
        overflows(accel, "shared", "0", "no CPU is left for vCPU 1: with the housekeeping CPU");
        // Left alone, it has the mask it was created with: the emulator's.
        overflows(accel, "refuse", "0-1", "not pinned (overflow = \"refuse\")");
    }
}

/// A VM whose vCPUs have one CPU by hand is given a second and a third: each ends `there`, and so it is `said`.
fn overflows(accel: Accel, overflow: &str, there: &str, said: &str) {
    let stage = Stage::new(&QemuOptions { accel, vcpus_max: 3, ..options() });
    taskset(stage.main_thread(), &[1]);
    let before = stage.masks();
    // What housekeeping may have is said, so that it is the same on every machine.
    let words = ["--emulator", "0-1", "--overflow", overflow];
    let attached = stage.attach(&words);
    stage.qemu.client().plug_vcpu(1);
    let vcpu = stage.vcpu(1);
    wait_until("it is reported", || attached.lines_with(said) > 0);
    wait_until("it is where the policy says", || stage.mask(vcpu) == there);
    // And the guest may be reset as often as it likes.
    for _ in 0..20 {
        stage.qemu.client().must("system_reset", &json!({}));
    }
    stage.qemu.client().plug_vcpu(2);
    let third = stage.vcpu(2);
    wait_until("the third is reported", || attached.lines_with("no CPU is left for vCPU 1, 2") > 0);
    wait_until("it is where the policy says", || stage.mask(third) == there);
    assert_eq!(stage.mask(stage.vcpu(0)), "1");
    // A process that succeeds a killed supervisor finds more vCPUs than a new VM may have.
    let pinned = stage.masks();
    attached.kill();
    let attached = stage.attach(&words);
    assert_eq!(stage.masks(), pinned);
    attached.end();
    let mut wanted = before;
    wanted.insert(vcpu, "1".to_owned());
    wanted.insert(third, "1".to_owned());
    stage.assert_untouched(&wanted);
}

#[test]
fn without_a_process_connector_new_threads_are_found_by_the_slow_timer() {
    let test = "without_a_process_connector_new_threads_are_found_by_the_slow_timer";
    needs_two_cpus!(test);
    let network = ["unshare", "--net"];
    if !crate::support::clean::command("unshare")
        .args(["--net", "true"])
        .status()
        .unwrap()
        .success()
    {
        return skipped(test, "no network namespace may be made here");
    }
    // An hour is the policy's; it is shortened where nothing else would tell.
    let stage = Stage::new(&options()).with_policy("check_interval_s = 3600\n");
    let before = stage.masks();
    let words = ["attach", "100", "--iothreads", "0-1"];
    let command = stage.place.command(&network, stage.qemu.dir(), &words);
    let mut attached = Attached::spawn(command, stage.place.path());
    attached.wait_ready();
    let line = "found only by the slow timer, because there is no process connector";
    wait_until("that is said", || attached.lines_with(line) == 1);
    // QEMU has no event for it.
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let iothread = stage.iothread("io-hot");
    wait_until("it is placed", || stage.mask(iothread) == "0-1");
    attached.end();
    let mut wanted = before.clone();
    wanted.insert(iothread, before[&stage.main_thread()].clone());
    stage.assert_untouched(&wanted);
}

#[test]
fn resets_stops_and_starts_change_nothing() {
    needs_two_cpus!("resets_stops_and_starts_change_nothing");
    for own_socket in [false, true] {
        let stage = Stage::new(&QemuOptions { own_socket, ..options() });
        let before = stage.masks();
        let mut attached = stage.attach(&[]);
        if own_socket {
            attached.wait_told("asked over its own socket");
        }
        let pinned = stage.masks();
        let mut client = stage.qemu.client();
        for command in ["cont", "stop", "system_reset", "cont", "system_reset", "stop"] {
            client.must(command, &json!({}));
        }
        drop(client);
        stage.run(&["threads", "100"]).says(0, &["vcpu 0"]);
        for (tid, mask) in &pinned {
            assert_eq!(&stage.mask(*tid), mask, "{tid}");
        }
        attached.end();
        for (tid, mask) in &before {
            assert_eq!(&stage.mask(*tid), mask, "{tid}");
        }
        assert_eq!(stage.place.left_behind(), [""; 0]);
    }
}

#[test]
fn a_state_folder_that_was_removed_does_not_keep_it_from_restoring() {
    needs_two_cpus!("a_state_folder_that_was_removed_does_not_keep_it_from_restoring");
    let stage = Stage::new(&options());
    taskset(stage.vcpu(0), &[0]);
    let before = stage.masks();
    let attached = stage.attach(&[]);
    stage.place.remove_state();
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn the_watchdog_is_fed() {
    needs_two_cpus!("the_watchdog_is_fed");
    let stage = Stage::new(&options()).with_policy("check_interval_s = 3600\n");
    let mut command = stage.command(&["attach", "100"]);
    command.env("WATCHDOG_USEC", "400000");
    let mut attached = Attached::spawn(command, stage.place.path());
    attached.wait_ready();
    // Also while another program has the socket and a question waits for its turn.
    let mut holder = stage.qemu.client();
    holder.must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    for _ in 0..3 {
        attached.wait_told("WATCHDOG=1");
        attached.notified.clear();
    }
    // And SIGTERM ends it meanwhile.
    attached.end();
}

#[test]
fn hotplug_while_the_socket_is_held_is_placed_afterwards() {
    needs_two_cpus!("hotplug_while_the_socket_is_held_is_placed_afterwards");
    let stage = Stage::new(&options());
    let attached = stage.attach(&["--iothreads", "0-1"]);
    wait_until("it has tried for a monitor", || attached.lines_with("queried by leases") > 0);
    let mut holder = stage.qemu.client();
    let threads = stage.qemu.threads();
    holder.must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let now = stage.qemu.threads();
    let new = *now.keys().find(|tid| !threads.contains_key(tid)).unwrap();
    // A process that it is, it is off the vCPUs' CPU at once.
    wait_until("it is with the emulator", || stage.mask(new) == "0");
    let shared = stage.qemu.paths().shared;
    wait_until("its question waits beside the holder", || clients_of(&shared) == 2);
    assert_eq!(stage.mask(new), "0");
    drop(holder);
    wait_until("it is placed", || stage.mask(new) == "0-1");
    attached.end();
}

#[test]
fn drift_is_mended_counted_and_logged_once() {
    needs_two_cpus!("drift_is_mended_counted_and_logged_once");
    let stage = Stage::new(&options()).with_policy(FAST);
    let before = stage.masks();
    let (vcpu, main) = (stage.vcpu(0), stage.main_thread());
    let mut attached = stage.attach(&[]);
    for (round, (tid, there)) in [(vcpu, "1"), (main, "0"), (vcpu, "1")].into_iter().enumerate() {
        taskset(tid, &[0, 1]);
        wait_until("it is mended", || stage.mask(tid) == there);
        attached.wait_told(&format!("drift {}", round + 1));
    }
    wait_until("two lines", || attached.lines_with("affinity changed externally") == 2);
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn the_end_of_qemu_ends_it() {
    needs_two_cpus!("the_end_of_qemu_ends_it");
    for own_socket in [false, true] {
        for by_quit in [false, true] {
            let stage = Stage::new(&QemuOptions { own_socket, ..options() });
            let attached = stage.attach(&[]);
            if by_quit {
                stage.qemu.client().ask_last("quit");
            } else {
                stage.qemu.kill();
            }
            attached.end_of(0);
            assert_eq!(stage.place.left_behind(), [""; 0]);
            stage.run(&["detach", "100"]).says(0, &["nothing to restore"]);
        }
    }
}

/// Voluntary context switches are the times it went to sleep: once per wake-up.
fn sleeps(attached: &Attached) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", attached.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

#[test]
fn it_sleeps_while_nothing_happens_to_the_vm() {
    let test = "it_sleeps_while_nothing_happens_to_the_vm";
    needs_two_cpus!(test);
    let interval = Duration::from_secs(4);
    let stage = Stage::new(&options()).with_policy("check_interval_s = 4\n");
    let mut attached = stage.attach(&[]);
    if attached.lines_with("there is no process connector") > 0 {
        return skipped(test, "there is no process connector here");
    }
    attached.wait_told("asked over leases");
    wait_until("it has tried for a monitor", || {
        attached.lines_with("no monitor reserved for qmpin") > 0
    });
    let (start, at_first) = (Instant::now(), sleeps(&attached));
    while start.elapsed() < 3 * interval {
        // The host is busy with anything else.
        for _ in 0..20 {
            assert!(crate::support::clean::command("true").status().unwrap().success());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let woken = sleeps(&attached) - at_first;
    println!("{woken} wake-ups in {:?}", start.elapsed());
    // Four ticks at most, and each may wait for a lock of the kernel's once more.
    assert!(woken <= 12, "{woken} wake-ups in {:?}", start.elapsed());
    attached.end();
}

#[test]
fn the_vms_own_socket_leaves_the_shared_one_alone() {
    needs_two_cpus!("the_vms_own_socket_leaves_the_shared_one_alone");
    let stage = Stage::new(&QemuOptions { own_socket: true, ..options() });
    let before = stage.masks();
    // Were the shared socket asked, it would wait for its turn here for ever.
    let holder = stage.qemu.client();
    let mut attached = stage.attach(&["--iothreads", "0-1"]);
    attached.wait_told("asked over its own socket");
    let mut holder = holder;
    holder.must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
    let rows = holder.must("query-iothreads", &json!({}));
    let row = rows.as_array().unwrap().iter().find(|row| row["id"] == "io-hot").unwrap();
    let iothread = Tid(i32::try_from(row["thread-id"].as_i64().unwrap()).unwrap());
    wait_until("it is placed", || stage.mask(iothread) == "0-1");
    attached.end();
    stage.run(&["threads", "100", "--json"]).says(0, &["\"channel\":\"socket\""]);
    let mut wanted = before.clone();
    wanted.insert(iothread, before[&stage.main_thread()].clone());
    stage.assert_untouched(&wanted);
}

#[test]
fn a_newer_qemu_is_followed_over_a_runtime_monitor() {
    let test = "a_newer_qemu_is_followed_over_a_runtime_monitor";
    needs_two_cpus!(test);
    let Some(root) = newer_qemu_root() else {
        return skipped(test, "QMPIN_QEMU_ROOT is not set");
    };
    for killed in [false, true] {
        let stage = Stage::new(&QemuOptions { root: Some(root.clone()), ..options() });
        let before = stage.masks();
        let chardevs = stage.qemu.client().must("query-chardev", &json!({}));
        // The pid file's process must be called `qemu-*`; run by its loader it is not, so `--qmp`.
        let path = stage.qemu.paths().shared.display().to_string();
        let mut attached = stage.attach(&["--qmp", &path, "--iothreads", "0-1"]);
        attached.wait_told("asked over a runtime monitor");
        let mut client = stage.qemu.client();
        client.must("object-add", &json!({"qom-type": "iothread", "id": "io-hot"}));
        client.must("system_reset", &json!({}));
        drop(client);
        let iothread = stage.iothread("io-hot");
        wait_until("it is placed", || stage.mask(iothread) == "0-1");
        // Its file has done its service: not even a QEMU that is killed leaves one behind.
        assert!(!stage.qemu.dir().join("100.qmp.qmpin").exists());
        assert!(count(&chardevs) < count(&stage.qemu.client().must("query-chardev", &json!({}))));
        if killed {
            attached.kill();
            stage.run(&["detach", "100"]).says(0, &["restored"]);
        } else {
            attached.end();
        }
        wait_until("the monitor's chardev is gone", || {
            count(&stage.qemu.client().must("query-chardev", &json!({}))) == count(&chardevs)
        });
        stage.qemu.client().must("object-del", &json!({"id": "io-hot"}));
        stage.assert_untouched(&before);
    }
}

fn count(list: &serde_json::Value) -> usize {
    list.as_array().unwrap().len()
}
