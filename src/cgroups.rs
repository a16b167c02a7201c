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
