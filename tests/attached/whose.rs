//! Whose attachment it is: qmpin ends, restores and forgets nothing that belongs to another program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::process::Stdio;

use crate::support::qemu::{Qemu, QemuOptions, wait_until};
use crate::support::run::{Attached, Place, Stage, finish, masks, needs_two_cpus};
use nix::sys::signal::Signal;
use qmpin::ids::{Pid, VmName};
use qmpin::leases::StateDir;
use qmpin::sysroot::SysRoot;
use serde_json::json;

#[test]
fn detach_dead_ends_no_supervisor_that_started_meanwhile() {
    let place = Place::new();
    let state = StateDir::at(place.state());
    state.create().unwrap();
    // Both were killed before they wrote anything.
    for vm in ["100", "105"] {
        fs::write(place.state().join(format!("{vm}.journal")), "").unwrap();
    }
    // VM 100 keeps it busy for as long as another process works on the host.
    let busy = state.lock_host().unwrap();
    let mut command = place.command(&[], place.path(), &["detach", "--dead"]);
    let mut detach = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let has_100 = || place.left_behind().contains(&"100.lock".to_owned());
    wait_until("it is at VM 100", has_100);
    let vm: VmName = "105".parse().unwrap();
    let mut supervisor = crate::support::clean::command("sleep").arg("1000").spawn().unwrap();
    let pid = Pid(i32::try_from(supervisor.id()).unwrap());
    let mut lock = state.lock_supervisor(&vm).unwrap().expect("it is free");
    lock.sign(qmpin::discover::process_key(&SysRoot::live(), pid).unwrap());
    drop(busy);
    wait_until("it has ended", || detach.try_wait().unwrap().is_some());
    let ended = supervisor.try_wait().unwrap();
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    assert_eq!(ended, None, "it was asked to end");
    assert_eq!(detach.wait().unwrap().code(), Some(0));
    assert_eq!(place.left_behind(), [".host.lock", "105.journal", "105.lock"]);
    drop(lock);
    finish(&mut place.command(&[], place.path(), &["detach", "--dead"])).says(0, &[]);
    assert_eq!(place.left_behind(), [""; 0]);
}

/// An attach that waits for QEMU, and gets SIGTERM.
fn stopped_while_it_waits(stage: &Stage) -> Attached {
    let (socket, away) = (stage.qemu.dir().join("100.qmp"), stage.qemu.dir().join("100.away"));
    fs::rename(&socket, &away).unwrap();
    let mut attached = stage.attach_unready(&["-vv"]);
    wait_until("it waits", || attached.lines_with("not yet") > 0);
    attached.signal(Signal::SIGINT);
    assert_eq!(attached.wait(), Some(0), "{}", attached.err());
    assert_eq!(attached.lines_with("VM 100: stopped before it was attached"), 1);
    fs::rename(&away, &socket).unwrap();
    attached
}

#[test]
fn waiting_attach_that_is_stopped_keeps_what_was_attached_once() {
    needs_two_cpus!("waiting_attach_that_is_stopped_keeps_what_was_attached_once");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    stage.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    let (pinned, files) = (stage.masks(), stage.place.left_behind());
    assert_ne!(pinned, before);
    stopped_while_it_waits(&stage);
    assert_eq!((stage.masks(), stage.place.left_behind()), (pinned, files));
    stage.run(&["detach", "100"]).says(0, &["restored"]);
    stage.assert_untouched(&before);
}

#[test]
fn waiting_attach_that_is_stopped_ends_no_other() {
    needs_two_cpus!("waiting_attach_that_is_stopped_ends_no_other");
    let stage = Stage::new(&QemuOptions::default());
    let before = stage.masks();
    let attached = stage.attach(&[]);
    let pinned = stage.masks();
    stopped_while_it_waits(&stage);
    assert_eq!(stage.masks(), pinned);
    // It is followed as before.
    let by = format!("process {} follows it", attached.pid());
    stage.run(&["attach", "100"]).says(1, &[&by]);
    // What a killed one has left belongs to no process, and is restored.
    attached.kill();
    assert_eq!(stage.masks(), pinned);
    let stopped = stopped_while_it_waits(&stage);
    assert_eq!(stopped.lines_with("threads restored"), 1, "{}", stopped.err());
    stage.assert_untouched(&before);
}

#[test]
fn a_name_of_a_qemu_that_lives_is_not_another_s() {
    needs_two_cpus!("a_name_of_a_qemu_that_lives_is_not_another_s");
    let (first, second) =
        (Stage::new(&QemuOptions::default()), Qemu::start(&QemuOptions::default()));
    let (before, of_second) = (first.masks(), masks(second.pid()));
    let [a, b] = [&first.qemu, &second].map(|qemu| qemu.paths().shared.display().to_string());
    first.run(&["attach", "web", "--qmp", &a, "--once"]).says(0, &["0 refused"]);
    let pinned = (first.masks(), first.place.left_behind());
    let who = format!("another process: {}, which still runs", first.qemu.pid());
    for more in [&["--once"][..], &[]] {
        let words = [&["attach", "web", "--qmp", &b][..], more].concat();
        first.run(&words).says(1, &[&who, "hint: `qmpin detach web`"]);
        assert_eq!((first.masks(), first.place.left_behind()), pinned);
        assert_eq!(masks(second.pid()), of_second);
    }
    first.run(&["detach", "web"]).says(0, &["threads restored"]);
    first.assert_untouched(&before);
    first.run(&["attach", "web", "--qmp", &b, "--once"]).says(0, &["0 refused"]);
    // Once its QEMU is gone, the name is free.
    second.kill();
    first.run(&["attach", "web", "--qmp", &a, "--once"]).says(0, &["0 refused"]);
    first.run(&["detach", "web"]).says(0, &["threads restored"]);
    first.assert_untouched(&before);
}

#[test]
fn journal_of_a_dead_qemu_is_kept_until_all_is_restored() {
    needs_two_cpus!("journal_of_a_dead_qemu_is_kept_until_all_is_restored");
    let old = Stage::new(&QemuOptions::default());
    old.run(&["attach", "100", "--once"]).says(0, &["0 refused"]);
    // A partition in a unit that no process has, with a drop-in that cannot be removed: a folder with something in it.
    let drop_in = old.place.path().join("drop-in");
    fs::create_dir_all(drop_in.join("something")).unwrap();
    let partition = json!({"partition": {
        "unit": "qmpin-test-unused.scope",
        "cgroup": "qmpin-test-unused.slice/qmpin-test-unused.scope",
        "drop_in": drop_in.strip_prefix("/").unwrap(),
        "allowed_set": null,
        "had_controller": false,
        "cpus": "1",
    }});
    let journal = old.place.state().join("100.journal");
    let text = format!("{}{partition}\n", fs::read_to_string(&journal).unwrap());
    fs::write(&journal, &text).unwrap();
    old.qemu.kill();
    let mut stage = Stage::new(&QemuOptions::default());
    stage.place = old.place;
    let before = stage.masks();
    let refused = &["could not restore what VM 100 changed earlier", "hint: nothing was forgotten"];
    stage.run(&["attach", "100", "--once"]).says(1, refused);
    assert_eq!(fs::read_to_string(&journal).unwrap(), text);
    assert_eq!(stage.masks(), before);
    stage.run(&["detach", "100"]).says(6, &["drop-in"]);
    assert_eq!(fs::read_to_string(&journal).unwrap(), text);
}
