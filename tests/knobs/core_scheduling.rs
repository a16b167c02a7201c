//! The VM's core-scheduling cookie on a made-up kernel: whose it is, and that it is removed from every
//! crash point. A kernel that has cookies is seen on the test host, where there is one.

#![allow(clippy::expect_used, clippy::panic)] // a test may end

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::path::PathBuf;

use qmpin::cpuset::CpuSet;
use qmpin::discover::Grips;
use qmpin::ids::{Pid, StartTicks, Tid};
use qmpin::journal::{Header, Journal, SCHEMA};
use qmpin::knobs::affinity::restore::{RestoreReport, restore};
use qmpin::knobs::bench::Bench;
use qmpin::knobs::core_scheduling::plan::CookieStep;
use qmpin::knobs::execute::execute;
use qmpin::knobs::host::memory::HostMemory;
use qmpin::sched::Sched;
use qmpin::scheduling::Cookie;
use qmpin::sysroot::SysRoot;
use qmpin::threads::ProcessKey;

const MAIN: i32 = 500;
const BOOT: &str = "this-boot";

/// A process and its threads' cookies; 0: none.
struct World {
    dir: tempfile::TempDir,
    cookies: RefCell<BTreeMap<i32, u64>>,
    /// What the next calls that change something say.
    refuses: RefCell<Option<i32>>,
    /// Threads that are created of the first, as it is dealt with.
    new_threads: RefCell<Vec<i32>>,
}

impl Sched for World {
    fn affinity(&self, _: Tid) -> io::Result<CpuSet> {
        Ok("0-3".parse().expect("a cpulist"))
    }

    fn set_affinity(&self, _: Tid, _: &CpuSet) -> io::Result<()> {
        panic!("masks are as they were")
    }

    fn cookie(&self, tid: Tid) -> io::Result<Option<Cookie>> {
        let found = self.cookies.borrow().get(&tid.0).copied();
        let gone = || io::Error::from_raw_os_error(nix::libc::ESRCH);
        found.map(|found| NonZeroU64::new(found).map(Cookie)).ok_or_else(gone)
    }

    fn make_cookie(&self, process: Pid) -> io::Result<()> {
        assert_eq!(process, Pid(MAIN));
        self.may()?;
        let mut cookies = self.cookies.borrow_mut();
        let new = cookies.values().max().map_or(1, |last| last + 1);
        cookies.values_mut().for_each(|cookie| *cookie = new);
        Ok(())
    }

    fn clear_cookie(&self, tid: Tid) -> io::Result<()> {
        self.may()?;
        if let Some(created) = self.new_threads.borrow_mut().pop() {
            let inherited = self.cookies.borrow()[&tid.0];
            self.add(created, inherited);
        }
        self.cookies.borrow_mut().insert(tid.0, 0);
        Ok(())
    }
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().expect("a folder");
        let world = World {
            dir,
            cookies: RefCell::default(),
            refuses: RefCell::default(),
            new_threads: RefCell::default(),
        };
        world.write("sys/devices/system/cpu/online", "0-3\n");
        world.write(&format!("proc/{MAIN}/stat"), &stat(MAIN));
        for tid in MAIN..MAIN + 3 {
            world.add(tid, 0);
        }
        world
    }

    fn add(&self, tid: i32, cookie: u64) {
        self.write(&format!("proc/{MAIN}/task/{tid}/stat"), &stat(tid));
        self.cookies.borrow_mut().insert(tid, cookie);
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    fn may(&self) -> io::Result<()> {
        match *self.refuses.borrow() {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    fn process() -> ProcessKey {
        ProcessKey { pid: Pid(MAIN), start: StartTicks(7) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("100.journal")
    }

    fn journal(&self) -> Journal {
        let header = Header {
            schema: SCHEMA.to_owned(),
            vm: "100".parse().expect("a name"),
            boot_id: BOOT.to_owned(),
            process: World::process(),
        };
        Journal::create(&self.path(), &header).expect("a journal")
    }

    fn make(&self, journal: &mut Journal) -> io::Result<Cookie> {
        let (root, grips) = (SysRoot::at(self.dir.path()), Grips::default());
        let bench = Bench { root: &root, sched: self, grips: &grips, process: World::process() };
        let mut applied = execute(bench, journal, None, vec![CookieStep::Make]).expect("a journal");
        applied.remove(0).outcome.map(|cookie| cookie.expect("one"))
    }

    fn restore(&self) -> RestoreReport {
        let root = SysRoot::at(self.dir.path());
        restore(&root, self, BOOT, &self.path(), &HostMemory::default()).expect("restored")
    }

    fn found(&self) -> Vec<u64> {
        self.cookies.borrow().values().copied().collect()
    }
}

fn stat(tid: i32) -> String {
    format!("{tid} (kvm) S {}7 {}\n", "0 ".repeat(18), "0 ".repeat(30))
}

#[test]
fn it_is_made_for_all_threads_and_taken_from_all() {
    let world = World::new();
    let cookie = world.make(&mut world.journal()).expect("made");
    assert_eq!(world.found(), [cookie.0.get(); 3]);
    let report = world.restore();
    assert_eq!((report.cookie.put_back.len(), world.found()), (3, vec![0; 3]));
    assert!(report.is_complete());
    assert_eq!(world.restore().cookie.put_back.len(), 0, "twice is once");
}

#[test]
fn killed_at_any_line_it_is_restored() {
    for times in 1..3 {
        let world = World::new();
        let mut journal = world.journal();
        for _ in 0..times {
            world.make(&mut journal).expect("made");
        }
        let whole = fs::read_to_string(world.path()).expect("a journal");
        let lines: Vec<&str> = whole.lines().collect();
        assert_eq!(lines.len(), 1 + 2 * times);
        let made = world.found();
        // Cut after an intention: it may have been carried out, or not. Without one there is none.
        for cut in 1..=lines.len() {
            let with = if cut > 1 { made.clone() } else { vec![0; 3] };
            for cookies in [vec![0; 3], with] {
                // The first of two is known by its own line; only the second may be without.
                if cookies == made && cut <= 2 * (times - 1) + 1 {
                    continue;
                }
                fs::write(world.path(), lines[..cut].join("\n") + "\n").expect("cut");
                for (tid, cookie) in (MAIN..).zip(&cookies) {
                    world.add(tid, *cookie);
                }
                assert!(world.restore().is_complete());
                assert_eq!(world.found(), [0; 3], "cut at {cut}, {cookies:?}");
            }
        }
    }
}

#[test]
fn foreign_cookie_is_kept_and_named() {
    let world = World::new();
    world.make(&mut world.journal()).expect("made");
    world.add(MAIN + 1, 99);
    let report = world.restore();
    assert_eq!(world.found(), [0, 99, 0]);
    let foreign: Vec<i32> = report.cookie.foreign.iter().map(|one| one.thread.tid.0).collect();
    assert_eq!(foreign, [MAIN + 1]);
    assert!(report.is_complete());
}

#[test]
fn thread_created_meanwhile_does_not_keep_it() {
    let world = World::new();
    world.make(&mut world.journal()).expect("made");
    world.new_threads.borrow_mut().extend([MAIN + 7, MAIN + 8]);
    world.restore();
    assert_eq!(world.found(), [0; 5]);
}

#[test]
fn refused_cookie_is_not_recorded_as_made_and_a_failed_undo_is_kept() {
    let world = World::new();
    let mut journal = world.journal();
    *world.refuses.borrow_mut() = Some(nix::libc::EPERM);
    let refused = world.make(&mut journal).expect_err("refused");
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EPERM));
    // What comes later is another program's.
    world.add(MAIN, 5);
    assert!(world.restore().is_complete());
    assert_eq!(world.found(), [5, 0, 0]);
    world.add(MAIN, 0);
    *world.refuses.borrow_mut() = None;
    world.make(&mut journal).expect("made");
    *world.refuses.borrow_mut() = Some(nix::libc::EPERM);
    let report = world.restore();
    assert_eq!((report.cookie.failed.len(), report.is_complete()), (3, false));
    *world.refuses.borrow_mut() = None;
    assert!(world.restore().is_complete());
    assert_eq!(world.found(), [0; 3]);
}
