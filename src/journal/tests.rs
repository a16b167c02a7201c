//! The VM's journal over its life: what it refuses to write, what it writes again, and what it leaves alone.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::UnknownKind::{Damaged, Newer};
use super::*;
use crate::scheduling::Cookie;

fn set(list: &str) -> CpuSet {
    CpuSet::parse_cpulist(list).expect("a cpulist")
}

fn key(tid: i32) -> ThreadKey {
    ThreadKey { tid: Tid(tid), start: StartTicks(7) }
}

fn intent(tid: i32, to: &str) -> Record {
    Record::Intent(Intent { thread: key(tid), from: set("0-7"), to: set(to) })
}

fn header() -> Header {
    Header {
        schema: SCHEMA.to_owned(),
        vm: "100".parse().expect("a name"),
        boot_id: "boot".to_owned(),
        process: ProcessKey { pid: crate::ids::Pid(100), start: StartTicks(7) },
    }
}

struct World(tempfile::TempDir);

impl World {
    fn new() -> (World, Journal) {
        let world = World(tempfile::tempdir().expect("a folder"));
        let journal = Journal::create(&world.path(), &header()).expect("created");
        (world, journal)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("100.journal")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).expect("a journal")
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).expect("written");
    }

    fn memory(&self) -> Memory {
        read(&self.path()).expect("a journal").memory
    }
}

#[test]
fn lines_of_an_unknown_kind_are_named_and_the_rest_counts() {
    let (world, mut journal) = World::new();
    journal.append(vec![intent(1, "1")]).expect("written");
    let text = world.text()
        + "{\"cache_ways\":{\"clos\":3}}\n\
           {\"intent\":{\"thread\":{\"tid\":2,\"start\":7},\"fr\n\
           \u{fffd}\n";
    world.write(&text);
    let mut bytes = fs::read(world.path()).expect("a journal");
    bytes.extend(b"\xff\xfe\n");
    fs::write(world.path(), bytes).expect("written");
    let memory = world.memory();
    assert_eq!(memory.before(key(1)), None);
    assert!(memory.is_ours(key(1), |mask| *mask == set("1")));
    let unknown = memory.unknown().expect("unknown lines");
    let kinds: Vec<_> = unknown.lines.iter().map(|line| (line.number, line.kind)).collect();
    assert_eq!(kinds, [(3, Newer), (4, Damaged), (5, Damaged), (6, Damaged)]);
    let said = unknown.to_string();
    for part in ["100.journal", "a newer qmpin wrote line 3", "lines 4, 5, 6 cannot be read"] {
        assert!(said.contains(part), "{said}");
    }
    // An older qmpin that goes on with it keeps them.
    let (mut journal, _) = Journal::resume(&world.path()).expect("resumed");
    let before = fs::read(world.path()).expect("a journal");
    journal.append(vec![intent(3, "3")]).expect("written");
    journal.compact(|_| true).expect("left as it is");
    assert!(fs::read(world.path()).expect("a journal").starts_with(&before));
    fs::remove_file(world.path()).expect("removed");
    assert!(journal.ensure_file().expect("written again"));
    let kinds = |memory: &Memory| -> Vec<_> {
        memory.unknown().expect("some").lines.iter().map(|line| line.kind).collect()
    };
    assert_eq!(kinds(&world.memory()), [Newer, Damaged, Damaged, Damaged]);
}

#[test]
fn a_later_schema_is_read_and_not_written() {
    let (world, mut journal) = World::new();
    journal.append(vec![intent(1, "1")]).expect("written");
    let text = world.text();
    world.write(&text.replace("qmpin.journal/1", "qmpin.journal/2"));
    let memory = world.memory();
    assert!(memory.is_ours(key(1), |mask| *mask == set("1")));
    assert_eq!(memory.unknown().expect("the first line").lines[0].number, 1);
    let error = Journal::resume(&world.path()).expect_err("not written");
    assert!(matches!(error, JournalError::Newer { .. }), "{error}");
    for other in ["qmpin.journal/0", "qmpin.journal/x", "qmpin.lease/2", ""] {
        world.write(&text.replace("qmpin.journal/1", other));
        let error = read(&world.path()).expect_err(other);
        assert!(matches!(error, JournalError::NotAJournal { .. }), "{error}");
    }
}

#[test]
fn a_file_that_another_program_changed_is_written_no_more() {
    type Change = (&'static str, fn(&World));
    let changes: [Change; 5] = [
        ("instead of", |world| world.write(&(world.text() + "{\"intent\":"))),
        ("instead of", |world| world.write(&(world.text() + "{}\n"))),
        ("instead of", |world| world.write(&world.text()[..40])),
        ("another file has its name", |world| {
            let other = world.0.path().join("other");
            fs::write(&other, world.text()).expect("written");
            fs::rename(other, world.path()).expect("renamed");
        }),
        ("incomplete", |world| {
            let text = world.text();
            world.write(&text.replace("}}\n", "}} "));
        }),
    ];
    for (said, change) in changes {
        let (world, mut journal) = World::new();
        journal.append(vec![intent(1, "1")]).expect("written");
        change(&world);
        let changed = world.text();
        for _ in 0..2 {
            let error = journal.append(vec![intent(2, "2")]).expect_err(said);
            assert!(matches!(error, JournalError::Untrusted { .. }), "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
        assert_eq!(world.text(), changed, "not one byte more");
        assert!(!journal.memory().masks().any(|mask| mask == set("2")), "nor is it remembered");
    }
}

#[test]
fn a_half_written_line_is_cut_off_when_it_is_resumed() {
    let (world, mut journal) = World::new();
    journal.append(vec![intent(1, "1")]).expect("written");
    let whole = world.text();
    world.write(&(whole.clone() + "{\"intent\":{\"thr"));
    let (mut journal, _) = Journal::resume(&world.path()).expect("resumed");
    journal.append(vec![intent(2, "2")]).expect("written");
    assert!(world.text().starts_with(&whole));
    assert_eq!(world.memory().unknown(), None);
    assert!(world.memory().is_ours(key(2), |_| true));
}

#[test]
fn a_file_that_was_removed_is_written_again_before_the_next_line() {
    let (world, mut journal) = World::new();
    journal.append(vec![intent(1, "1")]).expect("written");
    assert!(!journal.ensure_file().expect("it is there"));
    fs::remove_file(world.path()).expect("removed");
    journal.append(vec![intent(2, "2")]).expect("written");
    assert_eq!(world.memory(), *journal.memory());
    fs::remove_file(world.path()).expect("removed");
    assert!(journal.ensure_file().expect("written again"));
    assert_eq!(world.memory(), *journal.memory());
    let names = fs::read_dir(world.0.path()).expect("a folder").count();
    assert_eq!(names, 1, "nothing beside it");
}

#[test]
fn no_more_is_written_than_can_be_read_again() {
    let (world, mut journal) = World::new();
    journal.lines.limit_to(400);
    let mut tid = 0;
    let error = loop {
        tid += 1;
        if let Err(error) = journal.append(vec![intent(tid, &tid.to_string())]) {
            break error;
        }
    };
    assert!(matches!(error, JournalError::Full { .. }), "{error}");
    assert!(world.text().len() <= 400);
    assert_eq!(world.memory(), *journal.memory());
    assert!(!journal.memory().masks().any(|mask| mask == set(&tid.to_string())));
}

#[test]
fn threads_that_have_ended_go_when_it_is_written_anew() {
    let (world, mut journal) = World::new();
    let threads = vec![(Tid(1), StartTicks(7), set("0-7")), (Tid(2), StartTicks(7), set("0-3"))];
    journal
        .append(vec![Record::Baseline(Baseline { main: set("0-7"), threads })])
        .expect("written");
    journal.append(vec![intent(1, "0"), intent(2, "1")]).expect("written");
    let mut tid = 10;
    while !journal.is_long() {
        tid += 1;
        journal
            .append(vec![Record::Outside(vec![(Tid(tid), StartTicks(7), set("0-7"))])])
            .expect("written");
    }
    let before = world.text().len();
    journal.compact(|key| key.tid == Tid(1)).expect("written anew");
    assert!(!journal.is_long() && world.text().len() < before / 10);
    let memory = world.memory();
    assert_eq!(memory.before.keys().collect::<Vec<_>>(), [&key(1)]);
    // A thread that is created later may have what the other one had.
    assert!(memory.is_ours(key(99), |mask| *mask == set("1")));
    assert_eq!(memory, Memory::of(&memory.records()));
    journal.append(vec![intent(1, "5")]).expect("it goes on");
    assert!(world.memory().is_ours(key(1), |mask| *mask == set("5")));
}

#[test]
fn a_file_with_members_of_a_newer_version_is_not_written_anew() {
    let (world, mut journal) = World::new();
    let undo = "{\"partition\":{\"unit\":\"u\",\"cgroup\":\"c\",\"drop_in\":null,\"allowed_set\":null,\
                \"had_controller\":false,\"cpus\":\"1\",\"mems\":\"0\"}}\n";
    journal.append(vec![intent(1, "1")]).expect("written");
    world.write(&(world.text() + undo));
    let (mut journal, _) = Journal::resume(&world.path()).expect("resumed");
    assert_eq!(journal.memory().partition().map(|undo| undo.cpus), Some(set("1")));
    let before = world.text();
    journal.compact(|_| true).expect("left as it is");
    assert_eq!(world.text(), before);
}

fn record() -> impl Strategy<Value = Record> {
    let masks = ["0", "1", "2-3", "0-7"];
    let (tid, a, b) = (1..6_i32, 0..masks.len(), 0..masks.len());
    let other = Scheduling::OTHER;
    (0..9, tid, a, b).prop_map(move |(kind, tid, a, b)| {
        let (a, b) = (set(masks[a]), set(masks[b]));
        let threads = vec![(Tid(tid), StartTicks(7), a)];
        let fifo = Scheduling { priority: u8::try_from(tid).unwrap_or(1), ..other };
        match kind {
            0 => Record::Baseline(Baseline { main: b, threads }),
            1 => Record::Outside(threads),
            2 | 3 => Record::Intent(Intent { thread: key(tid), from: a, to: b }),
            4 => Record::Slices(a),
            5 => Record::Priorities(vec![(Tid(tid), StartTicks(7), other)]),
            6 => Record::Priority(PriorityIntent { thread: key(tid), from: other, to: fifo }),
            7 => Record::Cookie(CookieRecord::Intended),
            _ => {
                let number = u64::try_from(tid).ok().and_then(std::num::NonZeroU64::new);
                number.map_or(Record::Slices(a), |number| {
                    Record::Cookie(CookieRecord::Made(Cookie(number)))
                })
            }
        }
    })
}

proptest! {
    #[test]
    fn the_records_of_a_memory_come_to_that_memory(records in prop::collection::vec(record(), 0..40)) {
        let memory = Memory::of(&records);
        let again = memory.records();
        prop_assert!(again.len() <= records.len() + 2);
        prop_assert_eq!(Memory::of(&again), memory);
    }

    #[test]
    fn masks_of_living_threads_are_kept(
        records in prop::collection::vec(record(), 0..40),
        ended in prop::collection::btree_set(1..6_i32, 0..5),
    ) {
        let memory = Memory::of(&records);
        let mut shorter = memory.clone();
        shorter.forget_threads(|key| !ended.contains(&key.tid.0));
        let shorter = Memory::of(&shorter.records());
        for tid in (1..6).filter(|tid| !ended.contains(tid)).chain([99]) {
            prop_assert_eq!(shorter.before(key(tid)), memory.before(key(tid)));
            prop_assert_eq!(shorter.scheduling().before(key(tid)), memory.scheduling().before(key(tid)));
            for mask in ["0", "1", "2-3", "0-7"].map(set) {
                let is_ours = |memory: &Memory| memory.is_ours(key(tid), |ours| *ours == mask);
                prop_assert_eq!(is_ours(&shorter), is_ours(&memory), "thread {} on {}", tid, mask);
            }
        }
    }
}
