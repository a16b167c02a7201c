//! `status` and `verify` on a real QEMU: what they say is what the kernel says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::hosts;
use crate::support::qemu::{QemuOptions, wait_until};
use crate::support::run::{Stage, needs_two_cpus, taskset};
use nix::sys::signal::Signal;
use serde_json::Value;

fn json(stage: &Stage, code: i32, args: &[&str]) -> Value {
    let done = stage.run(args);
    done.says(code, &[]);
    serde_json::from_str(&done.out).unwrap_or_else(|error| panic!("{error}: {}", done.out))
}

#[test]
fn status_follows_a_vm_from_its_attach_to_its_end() {
    needs_two_cpus!("status_follows_a_vm_from_its_attach_to_its_end");
    let stage = Stage::new(&QemuOptions::default());
    stage.run(&["status"]).says(0, &["no VM is attached"]);
    stage.run(&["status", "100"]).says(1, &["VM 100 is not attached", "qmpin attach 100"]);
    stage.run(&["verify", "100"]).says(1, &["VM 100 is not attached", "qmpin attach 100"]);

    let attached = stage.attach(&[]);
    let of_vm = |code| json(&stage, code, &["status", "100", "--json"])["vms"][0].clone();
    let vm = of_vm(0);
    assert_eq!((vm["vm"].as_str(), vm["state"].as_str()), (Some("100"), Some("followed")));
    assert_eq!(vm["pid"], stage.qemu.pid().0);
    assert_eq!(vm["supervisor_pid"], attached.pid().0);
    assert_eq!((vm["exclusive"].as_str(), vm["emulator"].as_str()), (Some("1"), Some("0")));
    assert_eq!(vm["vcpus"][0]["cpus"], "1");
    assert_eq!(vm["knobs"].as_array().map(Vec::len), Some(0), "pinned turns none: {vm}");
    assert_eq!((vm["drift_total"].as_u64(), vm["channel"].as_str()), (Some(0), Some("lease")));
    stage.run(&["status"]).says(0, &["100", "followed"]);

    attached.kill();
    assert_eq!(of_vm(0)["state"], "left");
    stage.qemu.kill();
    wait_until("it is seen to be dead", || of_vm(0)["state"] == "dead");
    stage.run(&["detach", "--all"]).says(0, &["its QEMU has ended"]);
    let none = stage.run(&["status"]);
    assert_eq!(none.out, "no VM is attached\n");
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn doctor_names_what_a_vm_costs_and_the_line_that_mends_it() {
    let stage = Stage::new(&QemuOptions::default());
    let advice = |words: &[&str]| {
        let done = stage.run(&[&["doctor"], words, &["--json"]].concat());
        let document: Value = serde_json::from_str(&done.out).expect("a document");
        assert_eq!(document["schema"], "qmpin.doctor/1");
        let advice = document["advice"].as_array().expect("advice").clone();
        let costs = advice.iter().any(|one| one["health"] == "costs");
        assert_eq!(done.code, Some(i32::from(costs)), "{done:?}");
        advice
    };
    let checks = |advice: &[Value]| -> Vec<String> {
        advice.iter().map(|one| one["check"].as_str().expect("a name").to_owned()).collect()
    };
    let of_host = [
        "partition",
        "irqbalance",
        "rt-throttling",
        "ksm",
        "swap",
        "huge-pages",
        "halt-poll",
        "mitigations",
    ];
    // Not every kernel has other schedulers.
    let known = |advice: &[Value]| {
        let mut checks = checks(advice);
        checks.retain(|check| check != "sched-ext");
        checks.dedup();
        checks
    };
    assert_eq!(known(&advice(&[])), of_host);
    let of_vm = advice(&["100"]);
    let vm = ["guest-cores", "guest-caches", "cpu-flags", "storage", "config", "channel"];
    let mut checked = known(&of_vm);
    // A host with several nodes has one more.
    checked.retain(|check| check != "guest-nodes");
    assert_eq!(checked, [&of_host[..], &vm].concat());
    let found = |advice: &[Value], check: &str| {
        let found = advice.iter().find(|one| one["check"] == check);
        found.unwrap_or_else(|| panic!("{check}: {advice:?}")).clone()
    };
    let read = found(&of_vm, "config");
    assert!(
        read["reason"].as_str().expect("a sentence").contains("/etc/pve/qemu-server/100.conf"),
        "there is none on this machine: {read}"
    );
    assert_eq!((&read["health"], &read["severity"]), (&"fine".into(), &"unknown".into()));
    let channel = found(&of_vm, "channel");
    assert_eq!(channel["health"], "costs", "Proxmox's socket is visited");
    assert!(channel["mend"].as_str().expect("a line").contains("100.qmpin,server=on"));
    // With a socket of its own there is nothing to say.
    std::fs::write(stage.qemu.dir().join("100.qmpin"), "").expect("made");
    assert_eq!(found(&advice(&["100"]), "channel")["health"], "fine");
    stage.run(&["doctor", "101"]).says(3, &["not running"]);
    stage.run(&["doctor", "--qmp", "/x"]).says(2, &["VM"]);
}

#[test]
fn qemu_takes_the_line_that_doctor_prints() {
    let options = QemuOptions { vcpus: 8, ..QemuOptions::default() };
    let stage = Stage::new(&options);
    stage.place.config("qmpin.toml", "");
    // A 5900X: six cores of two threads behind each cache, so eight vCPUs on one of them share some.
    let host = tempfile::tempdir().expect("a folder");
    hosts::ryzen_5900x().write(host.path()).expect("a tree");
    let write = |path: &str, text: &str| {
        let path = host.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    write("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu constant_tsc nonstop_tsc\n");
    write(
        "etc/pve/qemu-server/100.conf",
        "cores: 8\ncpu: host\nargs: -k de\nscsihw: virtio-scsi-single\nscsi0: a:vm-100-disk-0,size=8G\n",
    );
    let sysroot = host.path().display().to_string();
    let advice = json(&stage, 1, &["doctor", "100", "--sysroot", &sysroot, "--json"]);
    let mend = |check: &str| -> String {
        let rows = advice["advice"].as_array().expect("rows").iter();
        let mut costs = rows.filter(|row| row["check"] == check && row["severity"] == "costs");
        let row = costs.next().unwrap_or_else(|| panic!("{check}: {advice}"));
        row["mend"].as_str().expect("a command").to_owned()
    };
    let line = mend("guest-cores");
    assert_eq!((mend("cpu-flags"), mend("channel")), (line.clone(), line.clone()), "one line");
    assert_eq!(
        line,
        "args: -k de -smp 8,sockets=1,cores=4,threads=2,maxcpus=8 -global x86_64-cpu.topoext=on \
         -qmp unix:/run/qemu-server/100.qmpin,server=on,wait=off"
    );
    assert_eq!(mend("storage"), "qm set 100 --scsi0 a:vm-100-disk-0,size=8G,iothread=1");
    // The text has each command once.
    let text = stage.run(&["doctor", "100", "--sysroot", &sysroot]);
    assert_eq!(text.out.matches(&line).count(), 1, "{}", text.out);
    assert!(text.out.contains("\nguest-cores, cpu-flags, channel:\n"), "{}", text.out);

    let words = line.strip_prefix("args: ").expect("a line").split(' ').map(str::to_owned);
    let mut words: Vec<String> = words.collect();
    // The folder is Proxmox's own.
    words.truncate(words.len() - 2);
    drop(stage);
    let stage = Stage::new(&QemuOptions { extra: words, ..options });
    let threads = json(&stage, 0, &["threads", "100", "--json"]);
    let vcpus = threads["threads"].as_array().expect("threads").iter();
    let thread =
        vcpus.filter(|thread| thread["role"] == "vcpu").map(|vcpu| &vcpu["guest"]["thread"]);
    let expected: Vec<Value> = [0, 1].repeat(4).into_iter().map(Value::from).collect();
    assert!(thread.eq(&expected), "{threads}");
}

#[test]
fn plan_log_status_and_verify_show_the_same_shortfalls() {
    needs_two_cpus!("plan_log_status_and_verify_show_the_same_shortfalls");
    let options = QemuOptions { vcpus: 2, ..QemuOptions::default() };
    let stage = Stage::new(&options).with_policy("share = true\nsched = \"fifo:1\"\n");
    // The VMs of tests that run beside this one come and go on the same CPUs, and are other programs to it.
    let own = |findings: &Value| -> Vec<Value> {
        let findings = findings.as_array().expect("findings").iter();
        findings.filter(|finding| finding["rule"] != "promises").cloned().collect()
    };
    let planned = || -> Vec<Value> {
        let report = own(&json(&stage, 0, &["plan", "100", "--json"])["report"]);
        report.into_iter().filter(|finding| finding["verdict"] != "met").collect()
    };
    let before = planned();
    let rules: Vec<&str> = before.iter().filter_map(|finding| finding["rule"].as_str()).collect();
    assert!(rules.contains(&"share") && rules.contains(&"sched"), "planner and knob: {rules:?}");
    let shown = |of: Value| own(&of["findings"]);
    let in_status = || shown(json(&stage, 0, &["status", "--json"])["vms"][0].clone());
    let sentences: Vec<String> = before
        .iter()
        .map(|one| {
            let word = |name: &str| one[name].as_str().expect("a word").to_owned();
            format!("{}: {}", word("rule"), word("reason"))
        })
        .collect();
    let all_say_so = || {
        assert_eq!(planned(), before, "also of a VM that is attached");
        assert_eq!(in_status(), before);
        let code = stage.run(&["verify", "100"]).code.expect("an exit");
        assert_eq!(shown(json(&stage, code, &["verify", "100", "--json"])), before);
        for sentence in &sentences {
            stage.run(&["status"]).says(0, &[sentence]);
            stage.run(&["verify", "100"]).says(code, &[sentence]);
        }
    };

    let attached = stage.attach(&[]);
    wait_until("status knows them", || !in_status().is_empty());
    all_say_so();
    for sentence in &sentences {
        assert_eq!(attached.lines_with(sentence), 1, "{sentence}: {}", attached.err());
    }
    attached.end();

    let once = stage.run(&["attach", "100", "--once"]);
    assert!(sentences.iter().all(|sentence| once.err.contains(sentence)), "{once:?}");
    all_say_so();
    let vm = json(&stage, 0, &["status", "--json"])["vms"][0].clone();
    assert_eq!((&vm["channel"], &vm["drift_total"]), (&Value::Null, &Value::Null), "{vm}");
    stage.run(&["detach", "100"]).says(0, &["restored"]);
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn drift_is_counted_for_all_to_see() {
    needs_two_cpus!("drift_is_counted_for_all_to_see");
    let stage = Stage::new(&QemuOptions::default()).with_policy("check_interval_s = 1\n");
    let attached = stage.attach(&[]);
    taskset(stage.vcpu(0), &[0]);
    wait_until("it is counted", || {
        json(&stage, 0, &["status", "--json"])["vms"][0]["drift_total"] == 1
    });
    attached.end();
    assert_eq!(stage.place.left_behind(), [""; 0]);
}

#[test]
fn verify_sees_what_is_and_not_what_was_meant() {
    needs_two_cpus!("verify_sees_what_is_and_not_what_was_meant");
    let stage = Stage::new(&QemuOptions::default());
    let attached = stage.attach(&[]);
    stage.run(&["verify", "100"]).says(0, &["all holds", "1 vCPU, each alone on one of CPU 1"]);
    // No process applies it again now.
    attached.signal(Signal::SIGSTOP);
    for (tid, on, check) in [(stage.vcpu(0), 0, "vcpus"), (stage.main_thread(), 1, "helpers")] {
        let back = 1 - on;
        taskset(tid, &[on]);
        let verified = json(&stage, 1, &["verify", "100", "--json"]);
        assert_eq!(
            (&verified["schema"], &verified["holds"]),
            (&"qmpin.verify/1".into(), &false.into())
        );
        let broken: Vec<&Value> = verified["checks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|check| check["verdict"] == "broken")
            .map(|check| &check["check"])
            .collect();
        assert_eq!(broken, [check], "{verified}");
        stage.run(&["verify", "100"]).says(1, &["not all holds", "BROKEN"]);
        taskset(tid, &[back]);
        stage.run(&["verify", "100"]).says(0, &["all holds"]);
    }
    attached.signal(Signal::SIGCONT);
    attached.end();
}
