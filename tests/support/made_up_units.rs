//! A made-up systemd and a made-up cgroup tree, both on the files of a made-up host: code that
//! reads these files sees what they write. They do what systemd and the kernel do as far as partitions go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard};

use qmpin::cgroups::{CgroupTree, Cgroups};
use qmpin::cpuset::CpuSet;
use qmpin::sysroot::SysRoot;
use qmpin::systemd::{SystemdError, UnitState, Units};

const MOUNT: &str = "sys/fs/cgroup";
/// What a group with the controller has.
const CPUSET: [(&str, &str); 3] =
    [("cpuset.cpus", ""), ("cpuset.cpus.exclusive", ""), ("cpuset.cpus.partition", "member")];
const CORE: [&str; 4] = ["cgroup.type", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];

/// The kernel behind a cgroup tree.
pub(crate) struct Tree {
    files: CgroupTree,
    root: SysRoot,
    /// What is read after `isolated` was written, where the kernel does not make a partition.
    invalid: Mutex<Option<String>>,
}

impl Tree {
    pub(crate) fn of(root: &SysRoot) -> Tree {
        Tree { files: CgroupTree::of(root), root: root.clone(), invalid: Mutex::default() }
    }

    /// From now on no partition becomes valid, for this reason.
    pub(crate) fn refuse_partitions(&self, why: &str) {
        *self.invalid.lock().expect("sound") = Some(format!("isolated invalid ({why})"));
    }

    /// A group with the controller and these threads.
    pub(crate) fn add(&self, group: &str, threads: &[i32]) {
        self.files.make(group).expect("made");
        self.fill(group, "domain", true);
        self.hold(&format!("{group}/cgroup.threads"), &threads.iter().copied().collect());
    }

    /// By number, however they came: what is there before and after can be compared.
    fn hold(&self, file: &str, tids: &BTreeSet<i32>) {
        let lines: Vec<String> = tids.iter().map(ToString::to_string).collect();
        self.put(file, &lines.join("\n"));
    }

    fn fill(&self, group: &str, kind: &str, has_cpuset: bool) {
        for file in CORE {
            self.put(&format!("{group}/{file}"), if file == "cgroup.type" { kind } else { "" });
        }
        if has_cpuset {
            self.cpuset(group);
        }
    }

    fn cpuset(&self, group: &str) {
        for (file, text) in CPUSET {
            self.put(&format!("{group}/{file}"), text);
        }
    }

    /// Makes a file say this.
    pub(crate) fn put(&self, file: &str, text: &str) {
        let path = self.root.path(&format!("{MOUNT}/{file}")).expect("a path");
        fs::write(path, format!("{text}\n")).expect("written");
    }

    /// What a file says; nothing where it is not there.
    pub(crate) fn get(&self, file: &str) -> String {
        self.files.read(file).unwrap_or_default()
    }

    /// All groups, the root group first.
    fn groups(&self) -> Vec<String> {
        let mut groups = vec![String::new()];
        let mut at = 0;
        while let Some(group) = groups.get(at).cloned() {
            let below = |name: String| {
                if group.is_empty() { name } else { format!("{group}/{name}") }
            };
            groups.extend(self.files.children(&group).expect("a group").into_iter().map(below));
            at += 1;
        }
        groups
    }

    /// A thread is in one group.
    fn move_thread(&self, tid: i32, to: &str) {
        for group in self.groups() {
            let file = format!("{group}/cgroup.threads");
            let Ok(text) = self.files.read(&file) else { continue };
            let mut tids: BTreeSet<i32> = text.lines().filter_map(|tid| tid.parse().ok()).collect();
            if file == to {
                tids.insert(tid);
            } else {
                tids.remove(&tid);
            }
            self.hold(&file, &tids);
        }
    }
}

impl Cgroups for Tree {
    fn read(&self, file: &str) -> io::Result<String> {
        self.files.read(file)
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        self.files.read(file)?;
        let (group, name) = file.rsplit_once('/').unwrap_or(("", file));
        match (name, value) {
            ("cgroup.threads", tid) => {
                self.move_thread(tid.parse().map_err(io::Error::other)?, file);
            }
            ("cgroup.subtree_control", "+cpuset") => {
                self.put(file, "cpuset");
                for child in self.files.children(group)? {
                    self.cpuset(&format!("{group}/{child}"));
                }
            }
            ("cgroup.subtree_control", _) => self.put(file, ""),
            ("cpuset.cpus.partition", "isolated") => {
                let invalid = self.invalid.lock().expect("sound").clone();
                self.put(file, invalid.as_deref().unwrap_or(value));
            }
            _ => self.put(file, value),
        }
        Ok(())
    }

    fn make(&self, group: &str) -> io::Result<()> {
        self.files.make(group)?;
        let above = group.rsplit_once('/').map_or("", |(above, _)| above);
        let control = self.get(&format!("{above}/cgroup.subtree_control"));
        self.fill(group, "domain", control == "cpuset");
        Ok(())
    }

    fn remove(&self, group: &str) -> io::Result<()> {
        if !self.get(&format!("{group}/cgroup.threads")).is_empty() {
            return Err(io::Error::from_raw_os_error(nix::libc::EBUSY));
        }
        let path = self.root.path(&format!("{MOUNT}/{group}")).expect("a path");
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn children(&self, group: &str) -> io::Result<Vec<String>> {
        self.files.children(group)
    }
}

/// systemd, with the units that a test adds.
pub(crate) struct Systemd {
    root: SysRoot,
    units: Mutex<BTreeMap<String, UnitState>>,
    asked: Mutex<Vec<String>>,
}

impl Systemd {
    pub(crate) fn of(root: &SysRoot) -> Systemd {
        Systemd { root: root.clone(), units: Mutex::default(), asked: Mutex::default() }
    }

    /// A unit that runs in this cgroup.
    pub(crate) fn add(&self, unit: &str, cgroup: &str) {
        let control_group = format!("/{cgroup}");
        let state = UnitState { control_group, ..UnitState::default() };
        self.units().insert(unit.to_owned(), state);
    }

    /// What was asked for, but for questions.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("sound").clone()
    }

    fn units(&self) -> MutexGuard<'_, BTreeMap<String, UnitState>> {
        self.units.lock().expect("sound")
    }

    fn note(&self, what: String) {
        self.asked.lock().expect("sound").push(what);
    }

    /// Where it writes a limit that is set at run time.
    fn limit_file(unit: &str) -> String {
        format!("run/systemd/system.control/{unit}.d/50-AllowedCPUs.conf")
    }

    /// Has the kernel limit the unit's cgroup. The kernel does not empty a cpuset that is in use: without a limit, all
    /// stays until the controller goes, and that is at once here.
    fn realize_limit(&self, state: &UnitState) {
        let file = format!("{MOUNT}{}/cpuset.cpus", state.control_group);
        let path = self.root.path(&file).expect("a path");
        fs::write(path, format!("{}\n", state.allowed_cpus)).expect("written");
    }
}

impl Units for Systemd {
    fn state(&self, unit: &str) -> Result<UnitState, SystemdError> {
        let known = self.units().get(unit).cloned();
        known.ok_or_else(|| SystemdError::NoSuchUnit { unit: unit.to_owned() })
    }

    fn set_allowed_cpus(&self, unit: &str, cpus: &CpuSet) -> Result<(), SystemdError> {
        self.state(unit)?;
        self.note(format!("{unit}: AllowedCPUs={cpus}"));
        let path = self.root.path(&Self::limit_file(unit)).expect("a path");
        fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
        fs::write(path, format!("[Unit]\nAllowedCPUs={cpus}\n")).expect("written");
        if let Some(state) = self.units().get_mut(unit) {
            state.allowed_cpus = *cpus;
            self.realize_limit(state);
        }
        Ok(())
    }

    fn realize(&self, slice: &str) -> Result<(), SystemdError> {
        self.note(format!("realize {slice}"));
        Ok(())
    }

    fn listed(&self, _state: &str, _pattern: &str) -> Result<Vec<String>, SystemdError> {
        Ok(Vec::new())
    }

    fn start(&self, unit: &str) -> Result<(), SystemdError> {
        self.state(unit).map(drop)
    }

    /// Goes by the files: `Delegate=` in a drop-in, and limits that were set at run time.
    fn reload(&self) -> Result<(), SystemdError> {
        self.note("reload".to_owned());
        for (unit, state) in self.units().iter_mut() {
            let drop_in = format!("run/systemd/system/{unit}.d/50-qmpin.conf");
            let text = self.root.read(&drop_in).unwrap_or_default();
            let delegates = text.lines().any(|line| line == "Delegate=cpuset");
            state.delegated = delegates.then(|| "cpuset".to_owned()).into_iter().collect();
            if self.root.read(&Self::limit_file(unit)).is_err() {
                state.allowed_cpus = CpuSet::EMPTY;
                self.realize_limit(state);
            }
        }
        Ok(())
    }
}
