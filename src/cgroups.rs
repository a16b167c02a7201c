//! The cgroup v2 tree as files: read, write, make and remove. It decides nothing.
//!
//! Paths are relative to the mount point, such as `qemu.slice/100.scope/cpuset.cpus`; the root group is
//! the empty path (`Documentation/admin-guide/cgroup-v2.rst`). One small trait, the kernel behind it,
//! and in tests a table.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};

use crate::sysroot::SysRoot;

/// Where it is mounted.
const MOUNT: &str = "sys/fs/cgroup";

/// Reads and writes the cgroup tree.
pub trait Cgroups {
    /// A file's text, without the newline at its end.
    ///
    /// # Errors
    /// What the kernel says.
    fn read(&self, file: &str) -> io::Result<String>;

    /// Writes a file; it is never created.
    ///
    /// # Errors
    /// What the kernel says.
    fn write(&self, file: &str, value: &str) -> io::Result<()>;

    /// Makes a group.
    ///
    /// # Errors
    /// What the kernel says; that it is there already is no error.
    fn make(&self, group: &str) -> io::Result<()>;

    /// Removes a group without threads and groups of its own.
    ///
    /// # Errors
    /// `EBUSY` where it is not empty; that it is gone already is no error.
    fn remove(&self, group: &str) -> io::Result<()>;

    /// The names of the groups in a group, sorted.
    ///
    /// # Errors
    /// What the kernel says.
    fn children(&self, group: &str) -> io::Result<Vec<String>>;
}

/// The tree below a root.
#[derive(Clone, Debug)]
pub struct CgroupTree {
    root: SysRoot,
}

impl CgroupTree {
    /// The tree of this machine, or of a folder that looks like one.
    #[must_use]
    pub fn of(root: &SysRoot) -> CgroupTree {
        CgroupTree { root: root.clone() }
    }

    fn path(&self, path: &str) -> io::Result<std::path::PathBuf> {
        let relative = if path.is_empty() { MOUNT.to_owned() } else { format!("{MOUNT}/{path}") };
        self.root.path(&relative).map_err(|error| error.source)
    }
}

impl Cgroups for CgroupTree {
    fn read(&self, file: &str) -> io::Result<String> {
        let text = self.root.read(&format!("{MOUNT}/{file}")).map_err(|error| error.source)?;
        Ok(text.trim_end().to_owned())
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        // One write, since the kernel takes each for a whole value.
        let mut knob = OpenOptions::new().write(true).open(self.path(file)?)?;
        knob.write_all(format!("{value}\n").as_bytes())
    }

    fn make(&self, group: &str) -> io::Result<()> {
        match fs::create_dir(self.path(group)?) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    fn remove(&self, group: &str) -> io::Result<()> {
        match fs::remove_dir(self.path(group)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn children(&self, group: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(group)?)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// A tree in memory that behaves as the kernel's as far as partitions go, for tests.
#[cfg(test)]
pub(crate) mod fake {
    use std::cell::{Cell, RefCell};
    use std::collections::{BTreeMap, BTreeSet};

    use super::{Cgroups, io};

    #[derive(Debug, Default, Clone)]
    pub(crate) struct FakeCgroups {
        pub(crate) files: RefCell<BTreeMap<String, String>>,
        pub(crate) log: RefCell<Vec<String>>,
        /// How many more writes its user lives to do.
        pub(crate) writes_left: Cell<Option<usize>>,
        /// The group that goes just before the next write.
        pub(crate) lost_at_write: RefCell<Option<String>>,
    }

    fn errno(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    impl FakeCgroups {
        /// Groups with these threads, and the controller down to them.
        pub(crate) fn with(groups: &[(&str, &str)]) -> FakeCgroups {
            let fake = FakeCgroups::default();
            for (group, threads) in groups {
                fake.add(group, threads, true);
                fake.put(&format!("{group}/cgroup.procs"), threads);
            }
            fake
        }

        fn add(&self, group: &str, threads: &str, has_cpuset: bool) {
            self.put(&format!("{group}/cgroup.type"), "domain");
            self.put(&format!("{group}/cgroup.threads"), threads);
            self.put(&format!("{group}/cgroup.subtree_control"), "");
            if has_cpuset {
                self.cpuset(group);
            }
        }

        fn cpuset(&self, group: &str) {
            for file in ["cpuset.cpus", "cpuset.cpus.exclusive"] {
                self.put(&format!("{group}/{file}"), "");
            }
            self.put(&format!("{group}/cpuset.cpus.partition"), "member");
        }

        pub(crate) fn put(&self, file: &str, text: &str) {
            self.files.borrow_mut().insert(file.to_owned(), text.to_owned());
        }

        pub(crate) fn get(&self, file: &str) -> String {
            self.files.borrow().get(file).cloned().unwrap_or_default()
        }

        /// Everything below a group goes, as systemd removes a unit.
        pub(crate) fn lose(&self, group: &str) {
            self.files.borrow_mut().retain(|file, _| !file.starts_with(&format!("{group}/")));
        }

        fn tids(&self, file: &str) -> BTreeSet<String> {
            self.get(file).lines().map(str::to_owned).collect()
        }

        fn live(&self, what: String) -> io::Result<()> {
            match self.writes_left.get() {
                Some(0) => return Err(errno(nix::libc::EINTR)),
                Some(left) => self.writes_left.set(Some(left - 1)),
                None => {}
            }
            self.log.borrow_mut().push(what);
            Ok(())
        }

        fn groups_in(&self, group: &str) -> Vec<String> {
            let files = self.files.borrow();
            let types = files.keys().filter_map(|file| file.strip_suffix("/cgroup.type"));
            let above = if group.is_empty() { String::new() } else { format!("{group}/") };
            let within = types.filter_map(|path| path.strip_prefix(above.as_str()));
            within.filter(|name| !name.contains('/')).map(str::to_owned).collect()
        }
    }

    impl Cgroups for FakeCgroups {
        fn read(&self, file: &str) -> io::Result<String> {
            let files = self.files.borrow();
            let is_group = || files.keys().any(|other| other.starts_with(&format!("{file}/")));
            let no_file = || if is_group() { nix::libc::EISDIR } else { nix::libc::ENOENT };
            files.get(file).cloned().ok_or_else(|| errno(no_file()))
        }

        fn write(&self, file: &str, value: &str) -> io::Result<()> {
            self.read(file)?;
            if let Some(group) = self.lost_at_write.take() {
                self.lose(&group);
                return Err(errno(nix::libc::ENODEV));
            }
            self.live(format!("{file}={value}"))?;
            let (group, name) = file.rsplit_once('/').ok_or_else(|| errno(nix::libc::EINVAL))?;
            match name {
                "cgroup.threads" => {
                    let files: Vec<String> = self.files.borrow().keys().cloned().collect();
                    for other in files.iter().filter(|file| file.ends_with("/cgroup.threads")) {
                        let mut tids = self.tids(other);
                        if other == file {
                            tids.insert(value.to_owned());
                        } else {
                            tids.remove(value);
                        }
                        self.put(other, &tids.into_iter().collect::<Vec<_>>().join("\n"));
                    }
                }
                "cgroup.subtree_control" if value == "+cpuset" => {
                    self.put(file, "cpuset");
                    for child in self.groups_in(group) {
                        self.cpuset(&format!("{group}/{child}"));
                    }
                }
                "cgroup.subtree_control" => {
                    self.put(file, "");
                    for child in self.groups_in(group) {
                        let prefix = format!("{group}/{child}/cpuset");
                        self.files.borrow_mut().retain(|file, _| !file.starts_with(&prefix));
                    }
                }
                _ => self.put(file, value),
            }
            Ok(())
        }

        fn make(&self, group: &str) -> io::Result<()> {
            self.live(format!("mkdir {group}"))?;
            let parent = group.rsplit_once('/').map_or("", |(parent, _)| parent);
            let has_cpuset = self.get(&format!("{parent}/cgroup.subtree_control")) == "cpuset";
            if self.read(&format!("{group}/cgroup.type")).is_err() {
                self.add(group, "", has_cpuset);
            }
            Ok(())
        }

        fn remove(&self, group: &str) -> io::Result<()> {
            if self.read(&format!("{group}/cgroup.type")).is_err() {
                return Ok(());
            }
            self.live(format!("rmdir {group}"))?;
            if !self.get(&format!("{group}/cgroup.threads")).is_empty() {
                return Err(errno(nix::libc::EBUSY));
            }
            self.lose(group);
            Ok(())
        }

        fn children(&self, group: &str) -> io::Result<Vec<String>> {
            Ok(self.groups_in(group))
        }
    }
}
