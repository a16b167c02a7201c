//! A QEMU in a PID namespace: QMP names its threads by other numbers than the host does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::qemu::{QemuOptions, wait_until};
use crate::support::run::{Stage, masks, needs_two_cpus};
use crate::support::skipped;
use qmpin::ids::Tid;
use serde_json::{Value, json};

#[test]
fn threads_of_a_qemu_in_a_pid_namespace_are_found_pinned_and_restored() {
    let test = "threads_of_a_qemu_in_a_pid_namespace_are_found_pinned_and_restored";
    needs_two_cpus!(test);
    if !rustix::process::geteuid().is_root() {
        return skipped(test, "only root makes a PID namespace");
    }
    let stage = Stage::new(&QemuOptions {
        pid_namespace: true,
        pid_file: false,
        vcpus_max: 2,
        iothreads: 1,
        own_socket: true,
        ..QemuOptions::default()
    })
    .with_policy("share = true\n");
    let socket = stage.qemu.paths().shared.display().to_string();
    let before = masks(stage.qemu.pid());
    assert!(!before.contains_key(&stage.vcpu(0)), "QMP has the numbers of the host");

    let done = stage.run(&["threads", "100", "--qmp", &socket, "--json"]);
    let threads: Value = serde_json::from_str(&done.says(0, &[]).out).unwrap();
    let number_there = |role: &str| {
        let threads = threads["threads"].as_array().unwrap();
        let thread = threads.iter().find(|thread| thread["role"] == role).unwrap();
        let status = format!("/proc/{}/task/{}/status", stage.qemu.pid(), thread["tid"]);
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
        Tid(line.split_whitespace().last().unwrap().parse().unwrap())
    };
    assert_eq!(number_there("vcpu"), stage.vcpu(0));
    assert_eq!(number_there("iothread"), stage.iothread("iothread-virtioscsi0"));

    let attached = stage.attach(&["--qmp", &socket]);
    let on_vcpus = || {
        let pinned = masks(stage.qemu.pid());
        let names = stage.qemu.threads();
        let on = pinned.iter().filter(|(_, mask)| *mask == "1");
        on.map(|(tid, _)| names[tid][..6].to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(on_vcpus(), ["CPU 0/"]);
    // A thread that is plugged has a number of the namespace, too.
    stage.qemu.client().must(
        "device_add",
        &json!({"driver": "qemu64-x86_64-cpu", "id": "cpu1", "socket-id": 0, "core-id": 1,
            "thread-id": 0}),
    );
    wait_until("the new vCPU is placed", || on_vcpus() == ["CPU 0/", "CPU 1/"]);
    attached.end();
    let after = masks(stage.qemu.pid());
    assert!(before.iter().all(|(tid, mask)| after.get(tid) == Some(mask)), "{after:?}");
}
