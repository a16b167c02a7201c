//! irqbalance beside the knob of interrupts, on a made-up host and with a socket that answers as its own does.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use crate::support::made_up::{BOOT, World, set};
use qmpin::cpuset::CpuSet;
use qmpin::discover::process_key;
use qmpin::ids::Pid;
use qmpin::knobs::host::keep::HostKnobs;
use qmpin::knobs::host::outcome::HostApplied;
use qmpin::policy::{Knob, Level};
use qmpin::sysroot::SysRoot;

/// irqbalance as its sock_handle is: it answers `setup`, takes `settings cpus` without a word, and does as
/// it was sent when it scans.
#[derive(Clone)]
struct FakeIrqbalance(Arc<Mutex<Balancer>>);

#[derive(Default)]
struct Balancer {
    banned: CpuSet,
    request: Option<String>,
    /// Every request it was sent.
    heard: Vec<String>,
    /// What it answers instead.
    answer: Option<&'static str>,
    /// Before which requests, counted from now, it scans.
    scans: Vec<usize>,
}

impl Balancer {
    fn scan(&mut self) {
        match self.request.take() {
            Some(cpus) if cpus == "NULL" => self.banned = CpuSet::EMPTY,
            Some(cpus) => self.banned = set(&cpus),
            None => {}
        }
    }
}

impl FakeIrqbalance {
    /// Runs as this very process, and bans these CPUs by its own choice.
    fn start(world: &World, banned: &str) -> FakeIrqbalance {
        let us = std::process::id();
        let stat = fs::read_to_string(format!("/proc/{us}/stat")).expect("we live");
        let (open, close) = (stat.find('(').expect("a name"), stat.rfind(')').expect("a name"));
        let stat = format!("{}(irqbalance{}", &stat[..open], &stat[close..]);
        world.write(&format!("proc/{us}/stat"), &stat);
        let folder = world.path("run/irqbalance");
        fs::create_dir_all(&folder).expect("made");
        let path = folder.join(format!("irqbalance{us}.sock"));
        let listener = UnixListener::bind(path).expect("bound");
        let balancer = Balancer { banned: set(banned), ..Balancer::default() };
        let fake = FakeIrqbalance(Arc::new(Mutex::new(balancer)));
        let serving = fake.clone();
        std::thread::spawn(move || {
            for line in listener.incoming() {
                let mut line = line.expect("a line");
                let mut request = [0; 500];
                let Ok(length) = line.read(&mut request) else { continue };
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let _ = line.write_all(serving.answer(&request).as_bytes());
            }
        });
        fake
    }

    fn answer(&self, request: &str) -> String {
        let mut it = self.0.lock().expect("no panic");
        let is_scan = it.scans.first() == Some(&0);
        it.scans.retain(|at| *at > 0);
        it.scans.iter_mut().for_each(|at| *at -= 1);
        if is_scan {
            it.scan();
        }
        if let Some(cpus) = request.strip_prefix("settings cpus ") {
            it.request = Some(cpus.to_owned());
            it.heard.push(cpus.to_owned());
            return String::new();
        }
        assert_eq!(request, "setup");
        let answer = || format!("SLEEP 1 BANNED {}", it.banned.to_cpumask());
        it.answer.map_or_else(answer, str::to_owned)
    }

    /// The end of its interval.
    fn scan(&self) {
        self.0.lock().expect("no panic").scan();
    }

    fn banned(&self) -> String {
        self.0.lock().expect("no panic").banned.to_string()
    }

    fn heard(&self) -> Vec<String> {
        self.0.lock().expect("no panic").heard.clone()
    }
}

/// Restarted, or stopped: the socket of a process that is not there any more.
fn stop_irqbalance(world: &World) {
    let us = std::process::id();
    fs::remove_file(world.path(&format!("proc/{us}/stat"))).expect("removed");
}

impl World {
    /// Reconciles as `detach` does: until irqbalance has taken the request.
    fn detach(&self, knobs: &mut HostKnobs) -> Vec<HostApplied> {
        let host = self.host();
        let mut applied = self.reconcile_with(knobs).applied;
        knobs.await_irqbalance(host, &self.state, BOOT, &mut applied);
        applied
    }
}

#[test]
fn irqbalance_is_configured_once_and_restored() {
    for before in ["", "0,7"] {
        let world = World::new();
        let irqbalance = FakeIrqbalance::start(&world, before);
        let picture = world.picture();
        let mut knobs = HostKnobs::default();
        world.lease("100", "4-5", [Knob::Irqs]);
        for _ in 0..3 {
            assert!(!world.reconcile_with(&mut knobs).fell_short());
        }
        let request = if before.is_empty() { "4-5" } else { "0,4-5,7" };
        assert_eq!(
            irqbalance.heard(),
            [request],
            "it has not taken the request yet, and gets no second one"
        );
        assert_eq!(irqbalance.banned(), before);
        irqbalance.scan();
        assert!(world.reconcile_with(&mut knobs).applied.is_empty());
        // A second VM, and one that goes.
        world.lease("101", "2-3", [Knob::Irqs]);
        world.reconcile_with(&mut knobs);
        irqbalance.scan();
        assert_eq!(set(&irqbalance.banned()), set("2-5") | set(before));
        world.forget("101");
        world.reconcile_with(&mut knobs);
        irqbalance.scan();
        assert_eq!(irqbalance.banned(), request);
        world.forget("100");
        if before.is_empty() {
            // The slow timer may come before the end does.
            world.reconcile_with(&mut knobs);
        }
        let scans = irqbalance.clone();
        let scanning = std::thread::spawn(move || {
            while scans.heard().len() < 4 {
                std::thread::yield_now();
            }
            scans.scan();
        });
        let applied = world.detach(&mut knobs);
        scanning.join().expect("scanned");
        assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
        assert_eq!(irqbalance.banned(), before);
        assert_eq!(world.changed_since(&picture), [""; 0]);
        assert_eq!(world.journal(), None);
    }
}

/// irqbalance still reports the setting of before, and is about to take the request.
#[test]
fn irqbalance_is_restored_even_where_it_still_shows_the_old_value() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile();
    world.forget("100");
    // Another process, as after a kill.
    let applied = world.detach(&mut HostKnobs::default());
    assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    irqbalance.scan();
    assert_eq!(irqbalance.heard(), ["4-5", "NULL"]);
    assert_eq!((irqbalance.banned().as_str(), world.journal()), ("", None));
}

/// It takes the first request after a pass has read its setting, and the second one before the next pass.
#[test]
fn irqbalance_may_scan_between_any_two_requests() {
    // Read, set, read; read, set, read.
    for scans in [vec![1, 3], vec![1, 4], vec![2, 3], vec![0, 2], vec![1, 8], vec![5, 7]] {
        let world = World::new();
        let before = world.picture();
        let irqbalance = FakeIrqbalance::start(&world, "");
        world.lease("100", "4-5", Level::Exclusive.knobs());
        world.reconcile();
        world.forget("100");
        irqbalance.0.lock().expect("no panic").scans.clone_from(&scans);
        let applied = world.detach(&mut HostKnobs::default());
        assert!(!applied.iter().any(HostApplied::is_left_changed), "{scans:?}: {applied:?}");
        irqbalance.scan();
        assert_eq!(irqbalance.banned(), "", "{scans:?}");
        assert_eq!(world.changed_since(&before), [""; 0], "{scans:?}");
        assert_eq!(world.journal(), None, "{scans:?}");
    }
}

/// A VM that is attached again at once, before irqbalance has taken that there is none.
#[test]
fn irqbalance_is_configured_again_where_a_pending_change_would_undo_it() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.forget("100");
    world.reconcile_with(&mut knobs);
    assert!(world.journal().is_some(), "not forgotten before it is taken");
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    assert_eq!(irqbalance.heard(), ["4-5", "NULL", "4-5"]);
    assert_eq!(irqbalance.banned(), "4-5");
}

#[test]
fn restarted_irqbalance_is_configured_again_and_an_ended_one_is_removed() {
    let world = World::new();
    let first = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    // irqbalance is this process here, so QEMU is another.
    let qemu = process_key(&SysRoot::live(), Pid(1)).expect("it lives");
    world.lease_with("100", "4-5", [Knob::Irqs], |lease| lease.qemu = qemu);
    world.reconcile_with(&mut knobs);
    stop_irqbalance(&world);
    world.reconcile_with(&mut knobs);
    assert!(!world.journal().expect("a journal").ends_with("irqbalance"));
    // Its number again, and another start.
    let us = std::process::id();
    let stat = format!("{us} (irqbalance) S {}99 0\n", "0 ".repeat(18));
    world.write(&format!("proc/{us}/stat"), &stat);
    first.0.lock().expect("no panic").request = None;
    world.reconcile_with(&mut knobs);
    assert_eq!(first.heard(), ["4-5", "4-5"]);
    first.scan();
    stop_irqbalance(&world);
    world.forget("100");
    let applied = world.detach(&mut knobs);
    assert!(!applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    assert_eq!(world.journal(), None);
}

#[test]
fn an_irqbalance_that_answers_otherwise_is_named_and_the_rest_goes_on() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let before = world.picture();
    irqbalance.0.lock().expect("no panic").answer = Some("SLEEP 1 BANS 00000000");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    let report = world.reconcile_with(&mut knobs);
    assert!(report.fell_short());
    let [untold] = report.untold.as_slice() else { panic!("{:?}", report.untold) };
    assert!(untold.contains("`SLEEP 1 BANS 00000000`"), "{untold}");
    assert_eq!(irqbalance.heard(), [""; 0], "never guessed at");
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    assert!(world.reconcile_with(&mut knobs).untold.is_empty(), "said once");
    world.forget("100");
    world.detach(&mut knobs);
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

/// Told, and then it does not answer any more: its undo is kept for another time.
#[test]
fn silent_irqbalance_is_kept_in_the_journal() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.reconcile_with(&mut knobs);
    irqbalance.0.lock().expect("no panic").answer = Some("");
    world.forget("100");
    let applied = world.detach(&mut HostKnobs::default());
    assert!(applied.iter().any(HostApplied::is_left_changed), "{applied:?}");
    assert!(world.journal().is_some());
    irqbalance.0.lock().expect("no panic").answer = None;
    irqbalance.scan();
    world.detach(&mut HostKnobs::default());
    assert_eq!((irqbalance.banned().as_str(), world.journal()), ("", None));
}

/// To restore an interrupt in every pass would work against irqbalance.
#[test]
fn an_interrupt_that_irqbalance_has_placed_off_the_vms_stays_there() {
    let world = World::new();
    let irqbalance = FakeIrqbalance::start(&world, "");
    let mut knobs = HostKnobs::default();
    world.lease("100", "4-5", [Knob::Irqs]);
    world.reconcile_with(&mut knobs);
    irqbalance.scan();
    world.write("proc/irq/0/smp_affinity_list", "2\n");
    world.write("proc/irq/24/smp_affinity_list", "3\n");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "2");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "0-3,6-7", "it has not touched that");
    // On the VM's CPUs it may not stay.
    world.write("proc/irq/0/smp_affinity_list", "4\n");
    world.reconcile_with(&mut knobs);
    assert_eq!(world.read("proc/irq/0/smp_affinity_list"), "0-3,6-7");
    world.write("proc/irq/25/smp_affinity_list", "1\n");
    // Created there or moved there: irqbalance decides either way.
    world.write("proc/irq/60/smp_affinity_list", "0-3,6-7\n");
    world.reconcile_with(&mut knobs);
    world.forget("100");
    let scanning = std::thread::spawn(move || {
        while irqbalance.heard().len() < 2 {
            std::thread::yield_now();
        }
        irqbalance.scan();
    });
    let applied = world.detach(&mut knobs);
    scanning.join().expect("scanned");
    let named = applied.iter().filter(|one| format!("{:?}", one.step).starts_with("LeaveAlone"));
    assert_eq!(named.count(), 0, "it is irqbalance's to place: {applied:?}");
    assert_eq!(world.read("proc/irq/25/smp_affinity_list"), "1");
    assert_eq!(world.read("proc/irq/60/smp_affinity_list"), "0-3,6-7");
    assert_eq!(world.journal(), None);
}
