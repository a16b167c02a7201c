//! `attach --service` on a real QEMU: it waits for room without asking QEMU, and takes another policy while it runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use crate::support::qemu::{QemuOptions, clients_of, wait_until};
use crate::support::run::{Attached, Stage, needs_two_cpus};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Two vCPUs do not fit on one CPU.
const TOO_LARGE: &str =
    "isolation = \"pinned\"\nvcpus = \"1\"\niothreads = \"0\"\nemulator = \"0\"\n";

fn stage() -> Stage {
    let stage = Stage::new(&QemuOptions { vcpus: 2, vcpus_max: 2, ..QemuOptions::default() });
    stage.place.config("qmpin.toml", TOO_LARGE);
    stage
}

/// The command as systemd starts it: the variable names the very process.
fn by_systemd(stage: &Stage, args: &[&str]) -> Command {
    let before = ["sh", "-c", "SYSTEMD_EXEC_PID=$$ exec \"$@\"", "sh"];
    stage.place.command(&before, stage.qemu.dir(), args)
}

fn service(stage: &Stage) -> Attached {
    Attached::spawn(by_systemd(stage, &["attach", "100", "--service"]), stage.place.path())
}

fn status(stage: &Stage) -> Value {
    let done = stage.run(&["status", "--json"]);
    serde_json::from_str(&done.out).unwrap_or_else(|error| panic!("{error}: {done:?}"))
}

#[test]
fn vm_without_room_is_waited_for_and_attached_when_there_is_some() {
    needs_two_cpus!("vm_without_room_is_waited_for_and_attached_when_there_is_some");
    let stage = stage();
    let before = stage.masks();
    // By hand the answer comes at once.
    stage.run(&["attach", "100"]).says(1, &["error:"]);
    let mut service = service(&stage);
    service.wait_ready();
    service.wait_told("STATUS=waiting: ");
    assert_eq!(stage.masks(), before);
    let document = status(&stage);
    let waiting = &document["waiting"][0];
    assert_eq!((&waiting["vm"], document["vms"].as_array().unwrap().len()), (&"100".into(), 0));
    assert_eq!(waiting["pid"], stage.qemu.pid().0);
    assert_eq!(waiting["supervisor_pid"], service.pid().0);
    stage.run(&["status", "100"]).says(1, &["VM 100: its service waits: "]);
    stage.run(&["attach", "100"]).says(1, &["error:"]);
    // Another reason, which it finds without QEMU: this test has the monitor, and no process queues for it.
    let mut monitor = stage.qemu.client();
    stage.place.config("qmpin.toml", TOO_LARGE.replace("vcpus = \"1\"", "vcpus = \"0\""));
    let first = waiting["reason"].clone();
    wait_until("another reason", || status(&stage)["waiting"][0]["reason"] != first);
    assert_eq!(clients_of(&stage.qemu.paths().shared), 1, "it asks QEMU");
    monitor.must("query-status", &serde_json::json!({}));
    drop(monitor);
    assert_eq!(service.lines_with("not attached"), 2, "once for each reason: {}", service.err());
    // Room.
    stage.place.config("qmpin.toml", format!("share = true\n{TOO_LARGE}"));
    service.wait_told("2 vCPUs on 1");
    assert_eq!(stage.mask(stage.vcpu(1)), "1");
    let document = status(&stage);
    assert_eq!(document["waiting"].as_array().map(Vec::len), Some(0), "{document}");
    assert_eq!(document["vms"][0]["state"], "followed");
    service.end();
    stage.assert_untouched(&before);
}

#[test]
fn wait_ends_with_the_vm_with_a_signal_and_with_a_detach() {
    needs_two_cpus!("wait_ends_with_the_vm_with_a_signal_and_with_a_detach");
    let stage = stage();
    let waiting = |stage: &Stage| {
        let mut service = service(stage);
        service.wait_told("STATUS=waiting: ");
        service
    };
    waiting(&stage).end();
    assert_eq!(stage.place.left_behind(), [""; 0]);
    let service = waiting(&stage);
    stage.run(&["detach", "100"]).says(0, &[]);
    service.end_of(0);
    assert_eq!(stage.place.left_behind(), [""; 0]);
    let service = waiting(&stage);
    stage.qemu.kill();
    service.end_of(0);
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn vm_that_another_has_is_waited_for() {
    needs_two_cpus!("vm_that_another_has_is_waited_for");
    let stage = Stage::new(&QemuOptions::default());
    let by_hand = stage.attach(&[]);
    let mut service = service(&stage);
    service.wait_told("STATUS=waiting: ");
    let monitor = stage.qemu.client();
    by_hand.end();
    drop(monitor);
    service.wait_told("1 vCPUs on 1");
    service.end();
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn changed_policy_is_taken_without_unpinning_and_a_bad_one_is_not() {
    needs_two_cpus!("changed_policy_is_taken_without_unpinning_and_a_bad_one_is_not");
    let stage = Stage::new(&QemuOptions { iothreads: 1, ..QemuOptions::default() });
    let before = stage.masks();
    let mut service = service(&stage);
    service.wait_told("1 vCPUs on 1");
    let vcpu = stage.vcpu(0);
    assert_eq!((stage.mask(vcpu), stage.mask(stage.main_thread())), ("1".into(), "0".into()));
    let policy = crate::support::run::POLICY;
    // The same again changes nothing.
    stage.run(&["reload", "100"]).says(0, &["read again"]);
    // The other way round.
    let other = policy
        .replace("vcpus = \"1\"", "vcpus = \"0\"")
        .replace("iothreads = \"0\"\nemulator = \"0\"", "iothreads = \"1\"\nemulator = \"1\"");
    let other = other.replace("[host]\nreserved = \"0\"", "[host]\nreserved = \"1\"");
    stage.place.config("qmpin.toml", &other);
    stage.run(&["reload", "100"]).says(0, &["read again"]);
    wait_until("the other way round", || {
        (stage.mask(vcpu), stage.mask(stage.main_thread())) == ("0".into(), "1".into())
    });
    assert!(
        service.lines_with("1 → 0") > 0 && service.lines_with("0 → 1") > 0,
        "{}",
        service.err()
    );
    // Unusable, and impossible: what is in force stays.
    for bad in [
        "vcpus = \"0\nx",
        "isolation = \"total\"\n",
        "[host]\nreserved = \"0-1\"\n",
        "vcpus = \"900\"\n",
    ] {
        stage.place.config("qmpin.toml", bad);
        stage.run(&["reload", "100"]).says(2, &["the policy before stays in force"]);
        assert_eq!(
            (stage.mask(vcpu), stage.mask(stage.main_thread())),
            ("0".into(), "1".into()),
            "{bad}"
        );
        let refused = || status(&stage)["vms"][0]["refused"].to_string();
        wait_until("status says so", || refused().contains("policy: "));
    }
    assert_eq!(service.lines_with("the policy before stays in force"), 4, "{}", service.err());
    // What takes effect later is named, and a good one ends what status has to say.
    stage.place.config("qmpin.toml", format!("channel = \"lease\"\ncheck_interval_s = 1\n{other}"));
    stage.run(&["reload", "100"]).says(0, &["read again", "next attach: channel"]);
    wait_until("nothing is refused", || {
        status(&stage)["vms"][0]["refused"] == Value::Array(Vec::new())
    });
    service.end();
    stage.assert_untouched(&before);
}

#[test]
fn hangup_ends_what_was_attached_by_hand_and_no_reload_sends_it() {
    needs_two_cpus!("hangup_ends_what_was_attached_by_hand_and_no_reload_sends_it");
    let stage = Stage::new(&QemuOptions::default());
    let by_hand = stage.attach(&[]);
    stage.run(&["reload", "100"]).says(1, &["attached by hand"]);
    stage.run(&["status", "100"]).says(0, &["followed"]);
    by_hand.signal(Signal::SIGHUP);
    by_hand.end_of(0);
    stage.run(&["reload", "100"]).says(1, &["no service follows it"]);
    let mut service = service(&stage);
    service.wait_ready();
    service.signal(Signal::SIGHUP);
    wait_until("it reads its policy", || service.lines_with("policy was read again") == 1);
    service.end();
}
