//! *restore ∘ apply* is identity, wherever qmpin is killed: in the journal's first line, in a batch of
//! intents, between two writes, before what the kernel made of them is noted, and in restoring itself.
//!
//! ```text
//!   a process of a few threads: new threads, ends, foreign changes, and qmpin's own steps, in any order;
//!   and kernel threads of the VM, which other VMs' partitions move as they come and go
//!      └─ killed somewhere ─ attached again, or not ─ killed in restore, or not ─ restore
//!            ─▶ every thread has its mask of before, but those that another program has moved since
//! ```
//!
//! It drives the real `Journal`, `apply` and `restore`, with a /proc in a folder and a table for the
//! kernel's masks.

#![allow(clippy::expect_used)] // that is how a test says no

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use proptest::prelude::*;
use proptest::sample::Index;

use qmpin::cpuset::CpuSet;
use qmpin::discover::Grips;
use qmpin::ids::{Pid, StartTicks, Tid};
use qmpin::journal;
use qmpin::journal::{Baseline, Header, Journal, Record, SCHEMA};
use qmpin::knobs::affinity::decide::{Around, Decision, Kind, decide};
use qmpin::knobs::affinity::diff::MaskStep;
use qmpin::knobs::affinity::restore::{Nothing, RestoreReport, restore};
use qmpin::knobs::bench::Bench;
use qmpin::knobs::execute::execute;
use qmpin::knobs::host::memory::{HostMemory, HostRecord};
use qmpin::sched::Sched;
use qmpin::sysroot::SysRoot;
use qmpin::threads::{ProcessKey, Role, ThreadKey};

const MAIN: i32 = 1000;
const BOOT: &str = "this-boot";
const ONLINE: &str = "0-15";
/// Masks that a plan may ask for.
const OURS: [&str; 6] = ["0-3", "4", "5", "6", "4-9", "8-11"];
/// Masks that another program may give; none is one of ours, or what is left of one in a cpuset.
const FOREIGN: [&str; 3] = ["1,3", "0,2,5", "1-2,6"];
/// What the VM's cgroup may allow.
const CPUSETS: [&str; 2] = ["0-15", "0-6"];
/// What single threads may have had before, beside the whole cpuset.
const ODD: [&str; 2] = ["0-1", "2-3"];
/// CPUs of other VMs, which have partitions now and then: in any order, and each by itself.
const OTHERS: [&str; 2] = ["12-13", "14-15"];

fn set(text: &str) -> CpuSet {
    CpuSet::parse_cpulist(text).expect("a cpulist")
}

/// A thread, and what must become of it.
#[derive(Clone, Copy, Debug)]
struct Task {
    start: u64,
    mask: CpuSet,
    /// Its mask without qmpin.
    before: CpuSet,
    /// Whether another program has moved it since qmpin did.
    foreign: bool,
    kernel: bool,
}

#[derive(Debug)]
struct State {
    cpuset: CpuSet,
    tasks: BTreeMap<i32, Task>,
    next_start: u64,
    /// How many more writes qmpin lives to do.
    writes_left: usize,
    /// Threads created in the middle of restoring: after how many writes, of whom.
    born_then: Vec<(usize, Index)>,
    writes: usize,
}

/// The kernel, as far as masks go.
struct World {
    root: SysRoot,
    /// None are held: there can be no pidfd of a thread that is none.
    grips: Grips,
    folder: tempfile::TempDir,
    state: RefCell<State>,
}

impl Sched for World {
    fn affinity(&self, tid: Tid) -> io::Result<CpuSet> {
        let state = self.state.borrow();
        let task = state.tasks.get(&tid.0);
        task.map(|task| task.mask).ok_or_else(|| io::Error::from_raw_os_error(nix::libc::ESRCH))
    }

    fn set_affinity(&self, tid: Tid, cpus: &CpuSet) -> io::Result<()> {
        {
            let mut state = self.state.borrow_mut();
            if state.writes_left == 0 {
                // A process that writes is dead; that no answer comes back either cannot be played here.
                return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
            }
            state.writes_left -= 1;
            state.writes += 1;
            let cpuset = state.cpuset;
            let task = state.tasks.get_mut(&tid.0);
            let task = task.ok_or_else(|| io::Error::from_raw_os_error(nix::libc::ESRCH))?;
            let allowed = if task.kernel { set(ONLINE) } else { cpuset };
            let mask = *cpus & allowed;
            if mask.is_empty() {
                return Err(io::Error::from_raw_os_error(nix::libc::EINVAL));
            }
            task.mask = mask;
            task.foreign = false;
        }
        let writes = self.state.borrow().writes;
        let created: Vec<Index> = {
            let mut state = self.state.borrow_mut();
            let (now, later) = state.born_then.iter().partition(|(at, _)| *at <= writes);
            let now: Vec<(usize, Index)> = now;
            state.born_then = later;
            now.into_iter().map(|(_, parent)| parent).collect()
        };
        for parent in created {
            self.new_thread(parent, false);
        }
        Ok(())
    }
}

impl World {
    fn new(cpuset: &str, odd: &[Option<usize>]) -> World {
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let folder = folder.expect("a temporary folder");
        let cpu = folder.path().join("sys/devices/system/cpu");
        fs::create_dir_all(&cpu).expect("mkdir");
        fs::write(cpu.join("online"), ONLINE).expect("online");
        let state = State {
            cpuset: set(cpuset),
            tasks: BTreeMap::new(),
            next_start: 1,
            writes_left: usize::MAX,
            born_then: Vec::new(),
            writes: 0,
        };
        let world = World {
            root: SysRoot::at(folder.path()),
            grips: Grips::default(),
            folder,
            state: RefCell::new(state),
        };
        world.add(MAIN, set(cpuset), set(cpuset), false, false);
        for (tid, odd) in (MAIN + 1..).zip(odd) {
            let mask = odd.map_or(set(cpuset), |at| set(ODD[at]));
            world.add(tid, mask, mask, false, false);
        }
        world
    }

    fn journal(&self) -> PathBuf {
        self.folder.path().join("100.journal")
    }

    fn task_folder(&self, tid: i32, kernel: bool) -> PathBuf {
        let proc = self.folder.path().join("proc");
        if kernel { proc.join(tid.to_string()) } else { proc.join(format!("{MAIN}/task/{tid}")) }
    }

    fn add(&self, tid: i32, mask: CpuSet, before: CpuSet, foreign: bool, kernel: bool) {
        let mut state = self.state.borrow_mut();
        let start = state.next_start;
        state.next_start += 1;
        let flags = if kernel { 0x0020_0000 } else { 0 };
        // Fields 4 to 8, flags, 10 to 21, start.
        let line = format!("{tid} (x) S {}{flags} {}{start} 0\n", "0 ".repeat(5), "0 ".repeat(12));
        let folder = self.task_folder(tid, kernel);
        fs::create_dir_all(&folder).expect("mkdir");
        fs::write(folder.join("stat"), &line).expect("stat");
        if tid == MAIN {
            let process = self.folder.path().join(format!("proc/{MAIN}/stat"));
            fs::write(process, &line).expect("stat");
        }
        state.tasks.insert(tid, Task { start, mask, before, foreign, kernel });
    }

    fn pick(&self, at: Index) -> i32 {
        let state = self.state.borrow();
        let tids: Vec<i32> = state.tasks.keys().copied().collect();
        tids[at.index(tids.len())]
    }

    /// A new thread has its parent's mask. Without qmpin that would be the main thread's of before: the
    /// parent here is one that had the same.
    fn new_thread(&self, parent: Index, reuse: bool) {
        let (parent, main, tid) = {
            let state = self.state.borrow();
            let main = state.tasks[&MAIN];
            let usual = |task: &&Task| task.before == main.before && !task.kernel;
            let usual: Vec<Task> = state.tasks.values().filter(usual).copied().collect();
            let free = (MAIN + 1..MAIN + 100)
                .find(|tid| !state.tasks.contains_key(tid))
                .expect("a number");
            let new = MAIN + 100 + i32::try_from(state.next_start).expect("few");
            (usual[parent.index(usual.len())], main, if reuse { free } else { new })
        };
        self.add(tid, parent.mask, main.before, parent.foreign, false);
    }

    fn end(&self, at: Index) {
        let tid = self.pick(at);
        let mut state = self.state.borrow_mut();
        if tid != MAIN {
            let task = state.tasks.remove(&tid).expect("it is there");
            fs::remove_dir_all(self.task_folder(tid, task.kernel)).expect("rmdir");
        }
    }

    fn foreign(&self, at: Index, mask: usize) {
        let tid = self.pick(at);
        let mut state = self.state.borrow_mut();
        let task = state.tasks.get_mut(&tid).expect("it is there");
        task.mask = set(FOREIGN[mask]);
        task.foreign = true;
    }

    fn key(&self, tid: i32) -> ThreadKey {
        ThreadKey { tid: Tid(tid), start: StartTicks(self.state.borrow().tasks[&tid].start) }
    }

    fn process(&self) -> ProcessKey {
        ProcessKey { pid: Pid(MAIN), start: self.key(MAIN).start }
    }

    fn header(&self) -> Header {
        Header {
            schema: SCHEMA.to_owned(),
            vm: "100".parse().expect("a name"),
            boot_id: BOOT.to_owned(),
            process: self.process(),
        }
    }

    /// All masks as they are, which from then on are those of before.
    fn baseline(&self) -> Record {
        let mut state = self.state.borrow_mut();
        for task in state.tasks.values_mut().filter(|task| !task.kernel) {
            task.before = task.mask;
            task.foreign = false;
        }
        let known = state.tasks.iter().filter(|(_, task)| !task.kernel);
        let threads =
            known.map(|(tid, task)| (Tid(*tid), StartTicks(task.start), task.mask)).collect();
        Record::Baseline(Baseline { main: state.tasks[&MAIN].mask, threads })
    }

    /// A kernel thread of the VM is found: its mask is noted before it is written.
    fn outside(&self, journal: &mut Journal, odd: Option<usize>) {
        let start = self.state.borrow().next_start;
        let tid = 50 + i32::try_from(start).expect("few");
        let mask = set(odd.map_or(ONLINE, |at| ODD[at]));
        self.add(tid, mask, mask, false, true);
        let thread = (Tid(tid), StartTicks(start), mask);
        journal.append(vec![Record::Outside(vec![thread])]).expect("append");
    }

    /// The kernel sets its own threads to all CPUs that are in no partition, whatever they had.
    fn exclusion_mask(&self, others: [bool; OTHERS.len()]) {
        let mask = OTHERS
            .iter()
            .zip(others)
            .filter(|(_, has_partition)| *has_partition)
            .fold(set(ONLINE), |mask, (other, _)| mask - set(other));
        for task in self.state.borrow_mut().tasks.values_mut().filter(|task| task.kernel) {
            task.mask = mask;
            task.foreign = false;
        }
    }

    fn step(&self, tid: i32, to: CpuSet) -> MaskStep {
        let task = self.state.borrow().tasks[&tid];
        MaskStep {
            thread: self.key(tid),
            role: if task.kernel { Role::Kernel } else { Role::Emulator },
            comm: String::new(),
            from: task.mask.into(),
            to: to.into(),
        }
    }

    /// One step at most for a thread, and none where it is already.
    fn steps(&self, wanted: &[(Index, usize)]) -> Vec<MaskStep> {
        let mut steps: Vec<MaskStep> = Vec::new();
        for (at, to) in wanted {
            let step = self.step(self.pick(*at), set(OURS[*to]));
            if steps.iter().all(|other| other.thread != step.thread) && step.from != step.to {
                steps.push(step);
            }
        }
        steps
    }

    fn bench(&self) -> Bench<'_> {
        Bench { root: &self.root, sched: self, grips: &self.grips, process: self.process() }
    }

    fn restore(&self) -> RestoreReport {
        let host = others();
        restore(&self.root, self, BOOT, &self.journal(), &host).expect("the journal is readable")
    }

    /// Every thread is as it was before, or as another program left it.
    fn check(&self) -> Result<(), TestCaseError> {
        for (tid, task) in &self.state.borrow().tasks {
            let journal = fs::read_to_string(self.journal()).unwrap_or_default();
            if task.foreign {
                let foreign = FOREIGN.iter().any(|mask| task.mask == set(mask));
                prop_assert!(
                    foreign,
                    "thread {tid} belonged to another program: {task:?}\n{journal}"
                );
            } else {
                prop_assert_eq!(task.mask, task.before, "thread {}: {:?}\n{}", tid, task, journal);
            }
        }
        Ok(())
    }
}

/// What the host's journal has of the other VMs.
fn others() -> HostMemory {
    HostMemory::of(&OTHERS.map(|other| HostRecord::Off(set(other))))
}

/// What happens to the process.
#[derive(Clone, Debug)]
enum Event {
    Apply(Vec<(Index, usize)>),
    NewThread { parent: Index, reuse: bool },
    End(Index),
    Foreign(Index, usize),
    Outside(Option<usize>),
    Exclude([bool; OTHERS.len()]),
}

/// Where qmpin is killed in its last batch of steps.
#[derive(Clone, Copy, Debug)]
enum Kill {
    /// While the intents were written: the journal ends anywhere among them, and nothing is done.
    InIntents(Index),
    /// After so many writes.
    BetweenWrites(Index),
    /// While what the kernel made of them was noted.
    InNotes(Index),
}

fn any_event() -> impl Strategy<Value = Event> {
    let steps = prop::collection::vec((any::<Index>(), 0..OURS.len()), 1..6);
    prop_oneof![
        4 => steps.prop_map(Event::Apply),
        2 => (any::<Index>(), any::<bool>())
            .prop_map(|(parent, reuse)| Event::NewThread { parent, reuse }),
        1 => any::<Index>().prop_map(Event::End),
        2 => (any::<Index>(), 0..FOREIGN.len()).prop_map(|(at, mask)| Event::Foreign(at, mask)),
        1 => prop::option::of(0..ODD.len()).prop_map(Event::Outside),
        1 => any::<[bool; OTHERS.len()]>().prop_map(Event::Exclude),
    ]
}

fn any_kill() -> impl Strategy<Value = Kill> {
    let at = any::<Index>;
    prop_oneof![
        at().prop_map(Kill::InIntents),
        at().prop_map(Kill::BetweenWrites),
        at().prop_map(Kill::InNotes),
    ]
}

fn live(world: &World, journal: &mut Journal, events: &[Event]) {
    for event in events {
        match event {
            Event::Apply(wanted) => {
                execute(world.bench(), journal, None, world.steps(wanted)).expect("apply");
            }
            Event::NewThread { parent, reuse } => world.new_thread(*parent, *reuse),
            Event::End(at) => world.end(*at),
            Event::Foreign(at, mask) => world.foreign(*at, *mask),
            Event::Outside(odd) => world.outside(journal, *odd),
            Event::Exclude(others) => world.exclusion_mask(*others),
        }
    }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).expect("the journal").len()
}

fn cut(path: &Path, from: u64, to: u64, at: Index) {
    let places = usize::try_from(to - from).expect("small") + 1;
    let file = fs::OpenOptions::new().write(true).open(path).expect("the journal");
    file.set_len(from + at.index(places) as u64).expect("cut");
}

/// The last batch, and qmpin's end in it.
fn die(world: &World, journal: &mut Journal, wanted: &[(Index, usize)], kill: Kill) {
    let path = world.journal();
    let before = length(&path);
    let steps = world.steps(wanted);
    let number = steps.len();
    world.state.borrow_mut().writes_left = match kill {
        Kill::InIntents(_) => 0,
        Kill::BetweenWrites(at) => at.index(number + 1),
        Kill::InNotes(_) => usize::MAX,
    };
    execute(world.bench(), journal, None, steps).expect("apply");
    world.state.borrow_mut().writes_left = usize::MAX;
    let text = fs::read_to_string(&path).expect("the journal");
    let after = length(&path);
    // Notes come after all intents of their batch.
    let notes = text[usize::try_from(before).expect("small")..]
        .split_inclusive('\n')
        .skip_while(|line| !line.starts_with("{\"narrowed\""))
        .map(|line| line.len() as u64)
        .sum::<u64>();
    match kill {
        Kill::InIntents(at) => cut(&path, before, after, at),
        Kill::BetweenWrites(at) => cut(&path, after - notes, after - notes, at),
        Kill::InNotes(at) => cut(&path, after - notes, after, at),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 384,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn all_is_back_wherever_qmpin_is_killed(
        cpuset in prop::sample::select(&CPUSETS[..]),
        odd in prop::collection::vec(prop::option::weighted(0.2, 0..ODD.len()), 0..5),
        events in prop::collection::vec(any_event(), 0..8),
        last in prop::collection::vec((any::<Index>(), 0..OURS.len()), 1..6),
        kill in any_kill(),
        after in prop::collection::vec(any_event(), 0..3),
        resumed in prop::option::of(prop::collection::vec(any_event(), 0..5)),
        killed_again in prop::option::of(0..6usize),
        born_then in prop::collection::vec((1..6usize, any::<Index>()), 0..3),
    ) {
        let world = World::new(cpuset, &odd);
        let mut journal = Journal::create(&world.journal(), &world.header()).expect("create");
        journal.append(vec![world.baseline()]).expect("append");
        live(&world, &mut journal, &events);
        die(&world, &mut journal, &last, kill);
        drop(journal);
        // The VM lives on without qmpin.
        for event in after {
            match event {
                Event::NewThread { parent, reuse } => world.new_thread(parent, reuse),
                Event::End(at) => world.end(at),
                Event::Foreign(at, mask) => world.foreign(at, mask),
                Event::Exclude(others) => world.exclusion_mask(others),
                Event::Apply(_) | Event::Outside(_) => {}
            }
        }
        if let Some(events) = resumed {
            let (mut journal, header) = Journal::resume(&world.journal()).expect("resume");
            prop_assert_eq!(header, world.header());
            live(&world, &mut journal, &events);
        }
        // What to do is decided from the journal alone, thread by thread.
        let content = journal::read(&world.journal()).expect("readable");
        prop_assert_eq!(content.memory.unknown(), None);
        let memory = content.memory;
        let host = others();
        let around = Around { online: set(ONLINE), limits: &[], host: &host };
        for (tid, task) in &world.state.borrow().tasks {
            let kind = if task.kernel { Kind::OfKernel } else { Kind::OfProcess };
            let decision = decide(&memory, world.key(*tid), kind, &task.mask, &around);
            match decision {
                Decision::Nothing => prop_assert!(task.foreign || task.mask == task.before),
                Decision::PutBack { to } => {
                    prop_assert!(!task.foreign, "{:?}", task);
                    prop_assert_eq!(to, task.before);
                }
                Decision::LeaveAlone { before } => {
                    prop_assert!(task.foreign, "thread {}: {:?}\n{:?}", tid, task, memory);
                    prop_assert_eq!(before, task.before);
                }
            }
        }
        if let Some(writes) = killed_again {
            world.state.borrow_mut().writes_left = writes;
            world.restore();
            world.state.borrow_mut().writes_left = usize::MAX;
        }
        {
            let mut state = world.state.borrow_mut();
            state.writes = 0;
            state.born_then = born_then;
        }
        let report = world.restore();
        prop_assert!(report.is_complete(), "{:?}", report);
        world.check()?;
        let foreign = world.state.borrow().tasks.values().filter(|task| task.foreign).count();
        prop_assert!(report.masks.foreign.len() <= foreign);
        let again = world.restore();
        prop_assert_eq!((again.masks.put_back.len(), again.masks.failed.len()), (0, 0), "restoring twice");
        world.check()?;
    }

    #[test]
    fn journal_without_a_header_is_no_obstacle(at in any::<Index>(), baseline in any::<bool>()) {
        let world = World::new(CPUSETS[0], &[None, Some(0)]);
        let path = world.journal();
        let mut journal = Journal::create(&path, &world.header()).expect("create");
        let header = length(&path);
        if baseline {
            journal.append(vec![world.baseline()]).expect("append");
        }
        drop(journal);
        cut(&path, if baseline { header } else { 0 }, length(&path), at);
        let begun = length(&path) >= header;
        let report = world.restore();
        prop_assert_eq!(report.nothing, (!begun).then_some(Nothing::NeverAttached));
        prop_assert_eq!(report.masks.put_back.len(), 0);
        world.check()?;
        // And it can be gone on with.
        if begun {
            let (mut journal, _) = Journal::resume(&path).expect("resume");
            if !journal.memory().has_baseline() {
                journal.append(vec![world.baseline()]).expect("append");
            }
            let steps = world.steps(&[(at, 1), (at, 2)]);
            execute(world.bench(), &mut journal, None, steps).expect("apply");
        }
        world.restore();
        world.check()?;
    }
}

#[test]
fn another_boot_or_process_is_not_touched() {
    let world = World::new(CPUSETS[0], &[None]);
    let mut journal = Journal::create(&world.journal(), &world.header()).expect("create");
    journal.append(vec![world.baseline()]).expect("append");
    execute(world.bench(), &mut journal, None, vec![world.step(MAIN, set(OURS[1]))])
        .expect("apply");
    let moved = world.state.borrow().tasks[&MAIN].mask;
    let report = restore(&world.root, &world, "another-boot", &world.journal(), &others())
        .expect("readable");
    assert_eq!(report.nothing, Some(Nothing::OtherBoot));
    world.add(MAIN, moved, moved, false, false); // the number again, with another start
    let report = world.restore();
    assert_eq!(report.nothing, Some(Nothing::ProcessGone));
    assert_eq!(world.state.borrow().tasks[&MAIN].mask, moved);
}

/// Compared on no CPU at all, every mask would look as it was before.
#[test]
fn masks_go_back_even_where_the_online_cpus_cannot_be_read() {
    for online in [None, Some(""), Some("nonsense")] {
        let world = World::new(CPUSETS[0], &[None]);
        let mut journal = Journal::create(&world.journal(), &world.header()).expect("create");
        journal.append(vec![world.baseline()]).expect("append");
        let file = world.folder.path().join("sys/devices/system/cpu/online");
        match online {
            None => fs::remove_file(file).expect("remove"),
            Some(text) => fs::write(file, text).expect("write"),
        }
        execute(world.bench(), &mut journal, None, vec![world.step(MAIN, set(OURS[1]))])
            .expect("apply");
        assert_eq!(world.restore().masks.put_back.len(), 1, "online: {online:?}");
        assert_eq!(world.state.borrow().tasks[&MAIN].mask, set(ONLINE));
    }
}
