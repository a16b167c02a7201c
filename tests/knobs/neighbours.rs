//! qmpin and Proxmox at one socket: neither may make the other fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::qemu::{Accel, QemuOptions, clients_of, has_kvm, newer_qemu_root, wait_until};
use crate::support::run::{Attached, Stage, needs_two_cpus};
use crate::support::{connect_at_once, skipped};
use serde_json::{Value, json};

/// How `PVE::QMPClient` visits a VM: a try every 100 ms for a place, then a limit for all answers.
const PROXMOX_RETRY: Duration = Duration::from_millis(100);
/// `vmstatus`' limit, the shorter of Proxmox's two (the other is 5 s).
const PROXMOX_LIMIT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

/// A visit as Proxmox pays it; an error is what its log would say.
fn visit(path: &Path) -> Result<Duration, String> {
    let started = Instant::now();
    let stream = loop {
        match connect_at_once(path) {
            Ok(stream) => break stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(format!("unable to connect: {error}")),
        }
        if started.elapsed() > PROXMOX_LIMIT {
            return Err("unable to connect: timeout".to_owned());
        }
        thread::sleep(PROXMOX_RETRY);
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PROXMOX_LIMIT)).unwrap();
    let mut stream = BufReader::new(stream);
    let mut answer = |wanted: &str| -> Result<(), String> {
        loop {
            let mut line = String::new();
            let length = stream.read_line(&mut line).map_err(|_| "got timeout".to_owned())?;
            let message: Value = serde_json::from_str(&line).map_err(|_| "closed".to_owned())?;
            if length > 0 && message.get("error").is_some() {
                return Err(line);
            }
            if message.get(wanted).is_some() {
                break;
            }
        }
        let next = match wanted {
            "QMP" => json!({"execute": "qmp_capabilities", "id": "1:1"}),
            _ => json!({"execute": "query-status", "id": "1:2"}),
        };
        let sent = stream.get_mut().write_all(format!("{next}\n").as_bytes());
        sent.map_err(|error| error.to_string())
    };
    for wanted in ["QMP", "return", "return"] {
        answer(wanted)?;
    }
    Ok(started.elapsed())
}

fn poll(path: &Path, stop: &AtomicBool) -> Vec<Result<Duration, String>> {
    let mut visits = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        visits.push(visit(path));
        thread::sleep(POLL);
    }
    visits
}

fn a_vms_life(stage: &Stage, way: &str) {
    let socket = stage.qemu.paths().shared.display().to_string();
    let by_socket = ["--qmp", &socket];
    let args: &[&str] = if way == "asked over leases" { &[] } else { &by_socket };
    for life in 0..3 {
        let mut words = args.to_vec();
        words.extend(["--iothreads", "0-1"]);
        let mut attached: Attached = stage.attach(&words);
        attached.wait_told(way);
        for round in 0..5 {
            let id = format!("io-hot{round}");
            stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": id}));
            let iothread = stage.iothread(&id);
            wait_until("it is placed", || stage.mask(iothread) == "0-1");
            stage.qemu.client().must("system_reset", &json!({}));
            stage.qemu.client().must("object-del", &json!({"id": id}));
        }
        // The last, since a VM that no longer fits is not attached anew.
        if life == 2 {
            stage.qemu.client().plug_vcpu(1);
        }
        let mut words = vec!["threads", "100", "--json"];
        words.extend(args);
        stage.run(&words).says(0, &[]);
        attached.end();
    }
}

#[test]
fn proxmox_never_fails_beside_us() {
    let test = "proxmox_never_fails_beside_us";
    needs_two_cpus!(test);
    let accel = if has_kvm() { Accel::Kvm } else { Accel::Tcg };
    let mut ways = vec![(None, "asked over leases")];
    match newer_qemu_root() {
        Some(root) => ways.push((Some(root), "asked over a runtime monitor")),
        None => skipped(test, "half of it, for QMPIN_QEMU_ROOT is not set"),
    }
    for (root, way) in ways {
        let stage = Stage::new(&QemuOptions {
            accel,
            vcpus_max: 2,
            iothreads: 1,
            root,
            ..QemuOptions::default()
        });
        let path = stage.qemu.paths().shared;
        let stop = AtomicBool::new(false);
        let visits = thread::scope(|scope| {
            let poller = scope.spawn(|| poll(&path, &stop));
            let life = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                a_vms_life(&stage, way);
            }));
            stop.store(true, Ordering::Relaxed);
            let visits = poller.join().unwrap();
            if let Err(panic) = life {
                std::panic::resume_unwind(panic);
            }
            visits
        });
        let failures: Vec<&String> =
            visits.iter().filter_map(|visit| visit.as_ref().err()).collect();
        assert!(failures.is_empty(), "{failures:?}");
        let slowest = visits.iter().flatten().max().unwrap();
        println!("{way}: {} visits, the slowest took {} ms", visits.len(), slowest.as_millis());
        assert!(visits.len() > 5, "{}", visits.len());
    }
}

#[test]
fn we_wait_our_turn_with_one_connection() {
    needs_two_cpus!("we_wait_our_turn_with_one_connection");
    let stage = Stage::new(&QemuOptions::default());
    let path = stage.qemu.paths().shared;
    let mut holder = stage.qemu.client();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| stage.run(&["threads", "100"]));
        // Two places are in the backlog. qmpin takes one and keeps it, so one is left for Proxmox.
        wait_until("it waits beside the holder", || clients_of(&path) == 2);
        assert!(!waiting.is_finished());
        holder.must("query-status", &json!({}));
        let proxmox = connect_at_once(&path).expect("a place is left");
        assert_eq!(connect_at_once(&path).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(holder);
        waiting.join().unwrap().says(0, &["vcpu 0", "asked over a lease"]);
        drop(proxmox);
    });
    // And not for ever.
    let holder = stage.qemu.client();
    let started = Instant::now();
    let done = stage.run(&["threads", "100", "--wait-s", "1"]);
    done.says(5, &["for 1000 ms, the limit", "hint: a monitor serves one client"]);
    assert!(started.elapsed() >= Duration::from_secs(1));
    drop(holder);
    stage.run(&["threads", "100", "--wait-s", "1"]).says(0, &[]);
}

#[test]
fn the_hint_for_a_held_monitor_names_the_socket_that_would_be_opened() {
    let stage = Stage::new(&QemuOptions { vcpus: 2, ..QemuOptions::default() });
    let shared = stage.qemu.paths().shared.clone();
    let mut held = BufReader::new(UnixStream::connect(&shared).unwrap());
    let mut greeting = String::new();
    held.read_line(&mut greeting).unwrap();
    let socket = shared.display().to_string();
    let done = stage.run(&["threads", "vm", "--qmp", &socket, "--wait-s", "1"]);
    let own = format!("unix:{socket}.qmpin,server=on,wait=off");
    done.says(5, &[&format!("hint: QEMU's command line: -qmp {own}"), "qemu:commandline"]);
    done.says(5, &[&format!("<qemu:arg value='{own}'/></qemu:commandline>")]);
    assert!(!done.err.contains("/run/qemu-server"), "{done:?}");
    let done = stage.run(&["threads", "100", "--wait-s", "1"]);
    done.says(5, &["100.qmpin,server=on,wait=off` in the line `args:`"]);
    assert!(!done.err.contains("libvirt"), "{done:?}");
}
