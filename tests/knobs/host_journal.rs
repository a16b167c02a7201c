//! The host's journal over a long time: kernel threads come and go, and what is left to know of them is nothing. It is
//! written anew, and a process that is killed as it does that leaves the old one or the new.

#![allow(clippy::expect_used)] // a test may end

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::host_world::{CHILDREN, CHILDREN_BEFORE};
use crate::support::made_up::{BOOT, World, set};
use proptest::prelude::*;
use qmpin::ids::{StartTicks, Tid};
use qmpin::journal::JournalError;
use qmpin::knobs::host::journal::HostJournal;
use qmpin::knobs::host::keep::HostKnobs;
use qmpin::knobs::host::memory::{HostMemory, HostRecord};
use qmpin::knobs::host::places::{Place, Value};
use qmpin::threads::ThreadKey;

const MASKS: [&str; 4] = ["0-7", "0-3", "4-5", "6"];

fn open(path: &Path) -> HostJournal {
    HostJournal::open(path, BOOT).expect("a journal")
}

fn read(path: &Path) -> HostMemory {
    HostJournal::read(path, BOOT).expect("a journal")
}

fn len(path: &Path) -> usize {
    fs::read_to_string(path).expect("a journal").lines().count()
}

/// Where it is written anew.
fn new(path: &Path) -> PathBuf {
    path.with_file_name(".host.journal.new")
}

fn place(tid: i32) -> Place {
    Place::Thread(ThreadKey { tid: Tid(tid), start: StartTicks(77) })
}

fn value(mask: usize) -> Value {
    Value::Cpus(set(MASKS[mask]))
}

/// A kernel thread that was there once.
fn history(tid: i32) -> [HostRecord; 3] {
    let (from, to) = (value(0), value(1));
    [
        HostRecord::Original { place: place(tid), value: from.clone() },
        HostRecord::Intent { place: place(tid), from, to },
        HostRecord::Settled(place(tid)),
    ]
}

fn append_history(journal: &mut HostJournal) {
    let (settled, before): (Vec<HostRecord>, Vec<HostRecord>) = (1_000..1_400)
        .flat_map(history)
        .partition(|record| matches!(record, HostRecord::Settled(_)));
    journal.append(before).expect("written");
    journal.append(settled).expect("written");
}

/// A folder with a journal of two threads that live, and of many that have gone.
fn long_one() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join(".host.journal");
    let mut journal = open(&path);
    for tid in [20, 21] {
        journal.append(history(tid)[..2].to_vec()).expect("written");
    }
    append_history(&mut journal);
    (dir, path)
}

fn record() -> impl Strategy<Value = HostRecord> {
    let (tid, mask) = (1..6, 0..MASKS.len());
    (0..5, tid, mask.clone(), mask).prop_map(|(kind, tid, a, b)| match kind {
        0 => HostRecord::Original { place: place(tid), value: value(a) },
        1 => HostRecord::Off(set(MASKS[a])),
        2 => HostRecord::Intent { place: place(tid), from: value(a), to: value(b) },
        3 => HostRecord::Refused { place: place(tid), value: value(b) },
        _ => HostRecord::Settled(place(tid)),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn it_remembers_the_same_when_it_is_written_anew(records in prop::collection::vec(record(), 0..60)) {
        let (_dir, path) = long_one();
        let mut journal = open(&path);
        for record in records {
            journal.append(vec![record]).expect("written");
        }
        let before = journal.memory().clone();
        journal.compact().expect("written anew");
        prop_assert!(len(&path) < 100, "{} lines", len(&path));
        prop_assert_eq!(journal.memory(), &before);
        prop_assert_eq!(&read(&path), &before);
        // It goes on in the new file.
        let more = HostRecord::Original { place: place(7), value: value(2) };
        journal.append(vec![more.clone()]).expect("written");
        prop_assert_eq!(&read(&path), journal.memory());
        prop_assert_eq!(journal.memory().original(&place(7)), Some(&value(2)));
    }
}

#[test]
fn one_that_is_short_or_needed_is_left_as_it_is() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join(".host.journal");
    let mut journal = open(&path);
    let originals =
        (0..1_500).map(|tid| HostRecord::Original { place: place(tid), value: value(0) });
    journal.append(originals.collect()).expect("written");
    let lines = len(&path);
    journal.compact().expect("nothing to do");
    assert_eq!(len(&path), lines);
}

#[test]
fn where_it_cannot_be_written_anew_the_old_one_serves() {
    let (_dir, path) = long_one();
    let text = fs::read_to_string(&path).expect("a journal");
    fs::create_dir(new(&path)).expect("something in the way");
    let mut journal = open(&path);
    assert_error!(journal.compact(), JournalError::Io { .. });
    assert_eq!(fs::read_to_string(&path).expect("a journal"), text);
    journal.append(history(30)[..1].to_vec()).expect("written");
    assert_eq!(&read(&path), journal.memory());
    assert_eq!(read(&path).original(&place(30)), Some(&value(0)));
}

/// They may be of a newer qmpin, which understands them.
#[test]
fn lines_that_cannot_be_read_are_not_thrown_away() {
    let (_dir, path) = long_one();
    let text = fs::read_to_string(&path).expect("a journal") + "{\"novel\":1}\n{\"off\":\"6\"}\n";
    fs::write(&path, &text).expect("written");
    open(&path).compact().expect("nothing to do");
    assert_eq!(fs::read_to_string(&path).expect("a journal"), text);
}

#[test]
fn what_was_killed_as_it_wrote_is_removed_and_is_no_vms() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-7");
    world.reconcile();
    let path = world.state.host_journal_path();
    let known = read(&path);
    let whole = fs::read(&path).expect("a journal");
    for cut in [0, 1, 40, whole.len() / 2, whole.len() - 1] {
        fs::write(new(&path), &whole[..cut]).expect("half of it");
        assert_eq!(world.state.vms().expect("listed").len(), 1);
        world.reconcile();
        assert_eq!(read(&path), known, "cut at {cut}");
        assert!(!new(&path).exists(), "cut at {cut}");
    }
    fs::write(new(&path), &whole).expect("all of it, under the wrong name");
    world.forget("100");
    world.reconcile();
    assert_eq!(world.changed_since(&before), [""; 0]);
    world.state.tidy();
    assert_eq!(fs::read_dir(world.state.path()).expect("listed").count(), 0);
}

#[test]
fn it_does_not_grow_with_kernel_threads_that_come_and_go() {
    let world = World::new();
    let before = world.picture();
    world.strict("100", "4-7");
    let mut ours = HostKnobs::default();
    let mut others = HostKnobs::default();
    world.reconcile_with(&mut ours);
    let path = world.state.host_journal_path();
    let known = read(&path);
    for generation in 0..4 {
        // No process of this machine can have such a number, nor this test itself.
        let tids = (5_000_000..5_000_300).map(|tid| tid + generation * 300);
        let mut children = CHILDREN_BEFORE.to_owned();
        for tid in tids.clone() {
            world.kernel_thread(tid, "z_wr_iss", "0-7");
            children += &format!("{tid} ");
        }
        world.write(CHILDREN, &children);
        world.reconcile_with(&mut ours);
        assert_eq!(world.mask(5_000_000 + generation * 300), set("0-3"));
        for tid in tids {
            fs::remove_dir_all(world.path(&format!("proc/{tid}"))).expect("it ends");
            world.masks.of().remove(&tid);
        }
        world.write(CHILDREN, CHILDREN_BEFORE);
        // Another VM's supervisor goes on in what this one has written, and this one in that.
        world.reconcile_with(&mut others);
    }
    world.reconcile_with(&mut ours);
    assert_eq!(read(&path), known);
    assert!(len(&path) < 2_500, "{} lines", len(&path));
    world.forget("100");
    world.reconcile_with(&mut others);
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

#[test]
fn a_place_that_qmpin_does_not_write_is_neither_recorded_nor_restored() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join(".host.journal");
    let mut journal = open(&path);
    journal.append(history(20)[..2].to_vec()).expect("written");
    let before = fs::read(&path).expect("a journal");
    let foreign = Place::Word("etc/shadow".to_owned());
    let record = HostRecord::Original { place: foreign, value: Value::Word("x".to_owned()) };
    let refused = journal.append(vec![record]).expect_err("it could not be read again");
    assert!(
        matches!(&refused, JournalError::Io { source, .. } if source.to_string().contains("etc/shadow"))
    );
    assert_eq!(fs::read(&path).expect("a journal"), before);

    // The same line from another program: the rest is undone, and this one is reported.
    let line = r#"{"original":{"place":{"word":"etc/shadow"},"value":{"word":"x"}}}"#;
    fs::write(&path, [before.as_slice(), line.as_bytes(), b"\n"].concat()).expect("written");
    let memory = read(&path);
    assert_eq!(memory.originals().map(|(place, _)| place.clone()).collect::<Vec<_>>(), [place(20)]);
    let unknown = memory.unknown().expect("a line that is not acted on").to_string();
    assert!(unknown.contains("line 4"), "{unknown}");
}
