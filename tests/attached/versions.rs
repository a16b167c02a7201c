//! State files of an older and of a newer qmpin, of a damaged disk, and of an administrator who removed them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::qemu::{Qemu, QemuOptions, clients_of, wait_until};
use crate::support::run::{Attached, Stage, masks, needs_two_cpus, taskset};
use nix::sys::signal::Signal;
use qmpin::journal;
use qmpin::knobs::host::journal::HostJournal;
use serde_json::{Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/state-0.1.0");

/// Two QEMUs. The first is attached as VM `one`, with CPU 1 for its vCPU.
struct Pair {
    stage: Stage,
    second: Qemu,
    sockets: [String; 2],
}

impl Pair {
    fn attached_once() -> Pair {
        let stage = Stage::new(&QemuOptions::default());
        let second = Qemu::start(&QemuOptions::default());
        let sockets = [&stage.qemu, &second].map(|qemu| qemu.paths().shared.display().to_string());
        stage.run(&["attach", "one", "--qmp", &sockets[0], "--once"]).says(0, &["0 refused"]);
        Pair { stage, second, sockets }
    }

    fn state(&self, name: &str) -> PathBuf {
        self.stage.place.state().join(name)
    }

    fn change_lease(&self, change: impl FnOnce(&mut Value)) {
        let path = self.state("one.lease");
        let mut lease: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut lease);
        fs::write(path, lease.to_string()).unwrap();
    }

    fn attach_second(&self) -> crate::support::run::Done {
        self.stage.run(&["attach", "two", "--qmp", &self.sockets[1], "--once"])
    }
}

#[test]
fn a_lease_of_a_later_version_is_planned_around_and_kept() {
    needs_two_cpus!("a_lease_of_a_later_version_is_planned_around_and_kept");
    let pair = Pair::attached_once();
    pair.change_lease(|lease| {
        lease["schema"] = "qmpin.lease/2".into();
        lease["cache_ways"] = json!({"clos": 3});
        lease["knobs"] = json!(["cache_ways"]);
    });
    let before = masks(pair.second.pid());
    pair.attach_second().says(1, &["CPU 1 belongs to VM one"]);
    assert_eq!(masks(pair.second.pid()), before);
    let status: Value =
        serde_json::from_str(&pair.stage.run(&["status", "--json"]).out).expect("a document");
    assert_eq!(status["vms"][0]["exclusive"], "1");
    // This version goes on with it, and takes nothing away from a newer neighbour.
    pair.stage.run(&["attach", "one", "--qmp", &pair.sockets[0], "--once"]).says(0, &["0 refused"]);
    let lease: Value =
        serde_json::from_str(&fs::read_to_string(pair.state("one.lease")).unwrap()).unwrap();
    assert_eq!(lease["cache_ways"]["clos"], 3);
    assert_eq!(lease["knobs"], json!(["cache_ways"]));
    pair.stage.run(&["detach", "one"]).says(0, &["restored"]);
    pair.attach_second().says(0, &["0 refused"]);
}

#[test]
fn a_lease_that_cannot_be_read_keeps_its_cpus_out_of_every_plan() {
    needs_two_cpus!("a_lease_that_cannot_be_read_keeps_its_cpus_out_of_every_plan");
    let pair = Pair::attached_once();
    let path = pair.state("one.lease");
    let whole = fs::read_to_string(&path).unwrap();
    let before = masks(pair.second.pid());
    let file = path.display().to_string();
    for (text, why) in [
        (&whole[..whole.len() / 2], "EOF"),
        (&whole[..30], "EOF"),
        ("", "EOF"),
        ("\u{0}\u{1}", "expected value"),
        ("[]", "map"),
        ("{\"schema\":\"other/1\"}", "its schema is other/1"),
        (&whole.replace("exclusive", "cpus"), "no `exclusive`"),
        (&whole.replace("\"one\"", "\"three\""), "it is of VM three"),
    ] {
        fs::write(&path, text).unwrap();
        let said: [&str; 4] =
            ["cannot read the lease of VM one", &file, why, "delete it if no qmpin runs"];
        pair.attach_second().says(1, &said);
        pair.stage.run(&["status"]).says(0, &said);
        assert_eq!(masks(pair.second.pid()), before, "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    // Nothing can be read of it at all.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    pair.attach_second().says(1, &["cannot read the lease of VM one", "a directory"]);
    fs::remove_dir(&path).unwrap();
    fs::write(&path, "{").unwrap();
    pair.stage.run(&["detach", "one"]).says(0, &["restored"]);
    pair.attach_second().says(0, &["0 refused"]);
}

#[test]
fn an_unreadable_lease_of_a_dead_vm_is_swept() {
    needs_two_cpus!("an_unreadable_lease_of_a_dead_vm_is_swept");
    let pair = Pair::attached_once();
    fs::write(pair.state("one.lease"), "{").unwrap();
    pair.stage.qemu.kill();
    pair.attach_second().says(0, &["0 refused"]);
    assert!(!pair.state("one.lease").exists() && !pair.state("one.journal").exists());
}

#[test]
fn a_warning_about_an_unreadable_lease_comes_once_and_again_when_it_changes() {
    needs_two_cpus!("a_warning_about_an_unreadable_lease_comes_once_and_again_when_it_changes");
    let stage = Stage::new(&QemuOptions::default()).with_policy("check_interval_s = 1\n");
    let mut attached = stage.attach(&[]);
    let warnings = |attached: &Attached| attached.lines_with("cannot read the lease of VM 9");
    let new = stage.place.state().join("new");
    let put = |text: &str| {
        fs::write(&new, text).unwrap();
        fs::rename(&new, stage.place.state().join("9.lease")).unwrap();
    };
    // Passes of the slow timer.
    let mut drifts = 0;
    let mut passes = |attached: &mut Attached| {
        let vcpu = stage.vcpu(0);
        for _ in 0..3 {
            attached.wait_told(&format!("drift {drifts}"));
            drifts += 1;
            taskset(vcpu, &[0]);
            wait_until("it is mended", || stage.mask(vcpu) == "1");
        }
    };
    // It is said that there is no new plan, too.
    for (text, times) in [("{", 1..=2), ("{\"schema\"", 2..=4)] {
        put(text);
        wait_until("it is said", || times.contains(&warnings(&attached)));
        passes(&mut attached);
        assert!(times.contains(&warnings(&attached)), "{}", attached.err());
    }
    attached.end();
}

fn journal_of(stage: &Stage) -> PathBuf {
    stage.place.state().join("100.journal")
}

fn append(path: &Path, line: &str) {
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, text + line).unwrap();
}

const OF_A_NEWER_ONE: &str = "{\"cache_ways\":{\"clos\":3}}\n";

#[test]
fn what_a_newer_version_wrote_to_the_journal_is_named_and_kept() {
    needs_two_cpus!("what_a_newer_version_wrote_to_the_journal_is_named_and_kept");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let journal = journal_of(&stage);
    let file = journal.display().to_string();
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    append(&journal, OF_A_NEWER_ONE);
    let said = [&*file, "a newer qmpin wrote line"];
    for _ in 0..2 {
        stage.run(&["detach", "100"]).says(6, &said);
        assert_eq!(stage.masks(), before, "the rest is restored");
        assert!(fs::read_to_string(&journal).unwrap().ends_with(OF_A_NEWER_ONE));
    }
    // A supervisor that goes on with it says so when it ends.
    let mut attached = stage.attach(&[]);
    attached.signal(Signal::SIGTERM);
    assert_eq!(attached.wait(), Some(6), "{}", attached.err());
    assert_eq!(attached.lines_with("a newer qmpin wrote line"), 1, "{}", attached.err());
    assert_eq!(stage.masks(), before);
    // As `ExecStopPost=` does when QEMU has ended.
    stage.qemu.kill();
    stage.run(&["detach", "100", "--dead"]).says(6, &said);
    stage.run(&["detach", "--all"]).says(6, &said);
    // Its name is not free before that is undone.
    let mut next = Stage::new(&QemuOptions::default());
    next.place = stage.place;
    let untouched = next.masks();
    next.run(&["attach", "100", "--once"]).says(6, &said);
    assert_eq!(next.masks(), untouched);
    fs::remove_file(&journal).unwrap();
    next.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    next.run(&["detach", "100"]).says(0, &["restored"]);
}

#[test]
fn a_damaged_line_is_named_and_the_journal_is_kept() {
    needs_two_cpus!("a_damaged_line_is_named_and_the_journal_is_kept");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    append(&journal_of(&stage), "{\"intent\":{\"thr{\"slices\":\"1\"}\n");
    stage.run(&["detach", "100"]).says(6, &["cannot be read, so it is not undone", "100.journal"]);
    assert_eq!(stage.masks(), before);
    assert!(journal_of(&stage).exists());
}

#[test]
fn what_a_newer_version_wrote_to_the_host_journal_is_named_and_kept() {
    needs_two_cpus!("what_a_newer_version_wrote_to_the_host_journal_is_named_and_kept");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let path = stage.place.state().join(".host.journal");
    let place = json!({"original": {"place": {"resctrl": "x"}, "value": {"ways": 3}}});
    let header = json!({"schema": "qmpin.host-journal/1", "boot_id": boot.trim()});
    let text = format!("{header}\n{place}\n");
    fs::write(&path, &text).unwrap();
    let said = [".host.journal", "a newer qmpin wrote line 2"];
    stage.run(&["detach", "100"]).says(6, &said);
    assert_eq!(stage.masks(), before);
    stage.run(&["detach", "--all"]).says(6, &said);
    stage.run(&["status"]).says(0, &said);
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn the_journals_of_0_1_0_are_read_whole() {
    for folder in ["strict", "slices", "shared"] {
        let path = Path::new(FIXTURES).join(folder);
        let content = journal::read(&path.join("100.journal")).expect("a journal");
        let memory = content.memory;
        assert_eq!(memory.unknown(), None);
        assert_eq!(
            (memory.partition().is_some(), memory.has_slices()),
            (folder == "strict", folder != "strict")
        );
        assert_eq!(memory.scheduling().is_empty(), folder != "strict");
        assert_eq!(memory.cookie().is_empty(), folder != "shared");
        assert!(memory.has_baseline() && memory.masks().count() >= 3);
        let host = HostJournal::read(&path.join("host.journal"), &content.header.boot_id);
        let host = host.expect("a journal");
        assert!(host.has_excluded() && host.originals().count() > 10);
        assert_eq!((host.unknown(), host.has_units()), (None, folder != "strict"));
    }
}

/// The journal of 0.1.0, with the numbers of this VM's threads instead of those that it had.
fn journal_of_0_1_0(stage: &Stage) -> String {
    let text = fs::read_to_string(Path::new(FIXTURES).join("slices/100.journal")).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let start = |tid: i32| -> u64 {
        let stat =
            fs::read_to_string(format!("/proc/{}/task/{tid}/stat", stage.qemu.pid())).unwrap();
        stat.rsplit(')').next().unwrap().split_whitespace().nth(19).unwrap().parse().unwrap()
    };
    let (main, vcpu) = (stage.main_thread().0, stage.vcpu(0).0);
    let mut lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines[0]["boot_id"] = boot.trim().into();
    lines[0]["process"] = json!({"pid": main, "start": start(main)});
    let threads = json!([[main, start(main), "0-1"], [vcpu, start(vcpu), "0-1"]]);
    lines[1]["baseline"] = json!({"main": "0-1", "threads": threads});
    lines[2]["intent"] =
        json!({"thread": {"tid": main, "start": start(main)}, "from": "0-1", "to": "0"});
    lines[3]["intent"] =
        json!({"thread": {"tid": vcpu, "start": start(vcpu)}, "from": "0-1", "to": "1"});
    let lines: Vec<String> = lines[..4].iter().map(ToString::to_string).collect();
    lines.join("\n") + "\n"
}

#[test]
fn a_vm_that_0_1_0_attached_is_restored_by_this_version() {
    needs_two_cpus!("a_vm_that_0_1_0_attached_is_restored_by_this_version");
    let stage = Stage::new(&QemuOptions::default());
    for tid in stage.masks().keys() {
        taskset(*tid, &[0, 1]);
    }
    let (before, vcpu) = (stage.masks(), stage.vcpu(0));
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    let text = journal_of_0_1_0(&stage);
    fs::write(journal_of(&stage), text).unwrap();
    let lease = fs::read_to_string(Path::new(FIXTURES).join("slices/100.lease")).unwrap();
    let mut lease: Value = serde_json::from_str(&lease).unwrap();
    let own: Value =
        serde_json::from_str(&fs::read_to_string(stage.place.state().join("100.lease")).unwrap())
            .unwrap();
    for name in
        ["boot_id", "qemu", "exclusive", "emulator", "iothreads", "vcpus", "slices", "knobs"]
    {
        lease[name] = own[name].clone();
    }
    lease["supervisor"] = Value::Null;
    fs::write(stage.place.state().join("100.lease"), lease.to_string()).unwrap();
    stage.run(&["status", "100"]).says(0, &["100", "left"]);
    stage.run(&["verify", "100"]).says(0, &["all holds"]);
    assert_eq!(stage.mask(vcpu), "1");
    stage.run(&["detach", "100"]).says(0, &["restored"]);
    stage.assert_untouched(&before);
}

#[test]
fn files_that_were_removed_are_written_again_and_their_vm_is_not_attached_twice() {
    needs_two_cpus!("files_that_were_removed_are_written_again_and_their_vm_is_not_attached_twice");
    let stage = Stage::new(&QemuOptions::default()).with_policy("check_interval_s = 1\n");
    let before = stage.masks();
    let attached = stage.attach(&[]);
    let (pinned, files) = (stage.masks(), stage.place.left_behind());
    assert_ne!(pinned, before);
    let remove = || stage.place.remove_state();
    // While it cannot notice, and does not hold the monitor.
    let shared = stage.qemu.paths().shared;
    let is_stopped = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", attached.pid())).unwrap();
        stat.rsplit(')').next().unwrap().trim_start().starts_with('T')
    };
    wait_until("it is stopped between two visits", || {
        attached.signal(Signal::SIGSTOP);
        wait_until("it is stopped", is_stopped);
        let is_apart = clients_of(&shared) == 0;
        if !is_apart {
            attached.signal(Signal::SIGCONT);
        }
        is_apart
    });
    let by = format!("process {} follows it", attached.pid());
    for _ in 0..2 {
        remove();
        stage.run(&["attach", "100", "--once"]).says(1, &["attached already", &by]);
        stage.run(&["attach", "100"]).says(1, &["attached already", &by]);
        assert_eq!(stage.masks(), pinned);
        stage.run(&["detach", "100", "--dead"]).says(0, &[]);
        assert_eq!(stage.masks(), pinned);
    }
    attached.signal(Signal::SIGCONT);
    let is_there = |name: &str| stage.place.state().join(name).exists();
    wait_until("it has noticed", || {
        files
            .iter()
            .filter(|name| name.starts_with("100."))
            // Those that are written now and then may just have been half written.
            .filter(|name| !name.split('.').any(|part| ["standing", "new"].contains(&part)))
            .all(|name| is_there(name))
    });
    stage.run(&["attach", "100", "--once"]).says(1, &["attached already", &by]);
    stage.run(&["status", "100"]).says(0, &["followed"]);
    // One file after the other.
    for name in ["100.lease", "100.journal", "100.lock"] {
        fs::remove_file(stage.place.state().join(name)).unwrap();
        wait_until(name, || is_there(name));
    }
    fs::write(stage.place.state().join("100.lease"), "{").unwrap();
    wait_until("its lease is whole", || stage.run(&["status", "100"]).out.contains("followed"));
    stage.run(&["verify", "100"]).says(0, &["all holds"]);
    attached.end();
    stage.assert_untouched(&before);
}

#[test]
fn a_vm_whose_files_were_removed_is_detached() {
    needs_two_cpus!("a_vm_whose_files_were_removed_is_detached");
    for noticed in [false, true] {
        let stage = Stage::new(&QemuOptions::default()).with_policy("check_interval_s = 1\n");
        let before = stage.masks();
        let mut attached = stage.attach(&[]);
        stage.place.remove_state();
        if noticed {
            wait_until("it has noticed", || stage.place.state().join("100.lock").exists());
        }
        stage.run(&["detach", "100"]).says(0, &["its supervisor has restored everything"]);
        assert_eq!(attached.wait(), Some(0), "{}", attached.err());
        stage.assert_untouched(&before);
    }
}

#[test]
fn a_journal_that_another_program_changed_stops_further_changes_and_keeps_the_undo() {
    needs_two_cpus!(
        "a_journal_that_another_program_changed_stops_further_changes_and_keeps_the_undo"
    );
    let options = QemuOptions { iothreads: 1, ..QemuOptions::default() };
    let stage = Stage::new(&options).with_policy("check_interval_s = 1\n");
    let before = stage.masks();
    let attached = stage.attach(&["--iothreads", "0-1"]);
    append(&journal_of(&stage), "{\"intent\":{\"thr");
    let text = fs::read_to_string(journal_of(&stage)).unwrap();
    // It needs a line that says what its undo is.
    stage.qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "late"}));
    let late = stage.iothread("late");
    wait_until("it is said", || attached.lines_with("another program changed the journal") > 0);
    assert_eq!(stage.mask(late), "0", "not moved");
    assert_eq!(stage.mask(stage.vcpu(0)), "1", "what is in force stays");
    assert_eq!(fs::read_to_string(journal_of(&stage)).unwrap(), text, "not one byte more");
    attached.end();
    let mut after = stage.masks();
    after.remove(&late);
    assert_eq!(after, before);
}

/// The released 0.1.0, where there is one.
fn binary_of_0_1_0(test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("QMPIN_0_1_0").map(PathBuf::from);
    if path.is_none() {
        crate::support::skipped(test, "QMPIN_0_1_0 does not name a binary of 0.1.0");
    }
    path
}

#[test]
fn an_upgrade_beside_a_running_0_1_0_loses_nothing() {
    let test = "an_upgrade_beside_a_running_0_1_0_loses_nothing";
    needs_two_cpus!(test);
    let Some(old) = binary_of_0_1_0(test) else { return };
    let stage = Stage::new(&QemuOptions::default());
    let second = Qemu::start(&QemuOptions::default());
    let socket = second.paths().shared.display().to_string();
    let before = stage.masks();
    let older = |args: &[&str]| stage.place.command_of(&old, &[], stage.qemu.dir(), args);
    let mut attached = Attached::spawn(older(&["attach", "100"]), stage.place.path());
    attached.wait_ready();
    stage.run(&["status", "100"]).says(0, &["followed"]);
    stage.run(&["verify", "100"]).says(0, &["all holds"]);
    let by = format!("process {} follows it", attached.pid());
    stage.run(&["attach", "100"]).says(1, &["attached already", &by]);
    stage.run(&["attach", "two", "--qmp", &socket, "--once"]).says(1, &["belongs to VM 100"]);
    stage.run(&["detach", "100"]).says(0, &["its supervisor has restored everything"]);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    stage.assert_untouched(&before);
    // Its files are removed: it is found by what it has pinned.
    let mut attached = Attached::spawn(older(&["attach", "100"]), stage.place.path());
    attached.wait_ready();
    stage.place.remove_state();
    let by = format!("process {} follows it", attached.pid());
    stage.run(&["attach", "100"]).says(1, &["attached already", &by]);
    attached.end();
    stage.assert_untouched(&before);
    // Killed, it leaves a journal.
    let mut attached = Attached::spawn(older(&["attach", "100"]), stage.place.path());
    attached.wait_ready();
    attached.kill();
    stage.run(&["detach", "100"]).says(0, &["restored"]);
    stage.assert_untouched(&before);
    // And goes on under this version.
    let mut attached = Attached::spawn(older(&["attach", "100"]), stage.place.path());
    attached.wait_ready();
    attached.kill();
    stage.attach(&[]).end();
    stage.assert_untouched(&before);
}

#[test]
fn what_this_version_writes_is_read_by_0_1_0() {
    let test = "what_this_version_writes_is_read_by_0_1_0";
    needs_two_cpus!(test);
    let Some(old) = binary_of_0_1_0(test) else { return };
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let older = |args: &[&str]| {
        crate::support::run::finish(&mut stage.place.command_of(&old, &[], stage.qemu.dir(), args))
    };
    let mut attached = stage.attach(&[]);
    older(&["status", "100"]).says(0, &["followed"]);
    older(&["verify", "100"]).says(0, &["all holds"]);
    older(&["attach", "100"]).says(1, &["attached already"]);
    older(&["detach", "100"]).says(0, &["its supervisor has put everything back"]);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    older(&["detach", "100"]).says(0, &["put back"]);
    assert_eq!(stage.masks(), before);
}
