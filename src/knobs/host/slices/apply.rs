//! The fallback of the knob *partition*: has systemd limit a unit.
//!
//! Nothing is said for longer than until the next boot, and nothing of it stays: a limit that is lifted
//! leaves a file with an empty setting behind, and all CPUs in the cgroup.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::error::chain;
use crate::knobs::partition::drop_ins::unit_of;
use crate::services;
use crate::sysroot::SysRoot;
use crate::systemd::{SystemdError, Units};

/// Tells systemd about units, and cleans up once for all of them.
pub(crate) struct Limits<'a> {
    root: &'a SysRoot,
    cgroups: &'a dyn Cgroups,
    units: &'a dyn Units,
    /// Every CPU that there is, so that one that comes online is allowed, too.
    all: CpuSet,
    /// The slices that have a unit whose limit was lifted.
    lifted: BTreeSet<String>,
    /// Units that systemd has read a drop-in of which is gone.
    delegated: bool,
}

impl Limits<'_> {
    pub(crate) fn new<'a>(
        root: &'a SysRoot,
        cgroups: &'a dyn Cgroups,
        units: &'a dyn Units,
        all: CpuSet,
    ) -> Limits<'a> {
        Limits { root, cgroups, units, all, lifted: BTreeSet::new(), delegated: false }
    }

    /// Limits a unit to these CPUs; none lifts the limit. On return the cgroup has them.
    ///
    /// # Errors
    /// What systemd said; `NotFound` where the unit is gone.
    pub(crate) fn set(&mut self, unit: &str, cgroup: &str, cpus: &CpuSet) -> io::Result<()> {
        let said = |error| match error {
            SystemdError::NoSuchUnit { .. } => io::Error::from_raw_os_error(nix::libc::ENOENT),
            error => io::Error::other(chain(&error)),
        };
        if cpus.is_empty() {
            // systemd would leave the last limit in the cgroup.
            self.units.set_allowed_cpus(unit, &self.all).map_err(said)?;
            self.lifted.insert(slice_of(cgroup));
        }
        self.units.set_allowed_cpus(unit, cpus).map_err(said)?;
        // What is queued is carried out before the next question is answered.
        self.units.state(unit).map(drop).map_err(said)?;
        if cpus.is_empty() {
            for path in files(unit) {
                remove(self.root, &path)?;
            }
        }
        Ok(())
    }

    /// Limits a cgroup that is no unit; none lifts the limit. The kernel does not empty the file of a cgroup that
    /// processes are in (`kernel/cgroup/cpuset.c: validate_change`): then all CPUs are written, which limits
    /// nothing, as systemd does.
    ///
    /// # Errors
    /// What the kernel said.
    pub(crate) fn set_cpuset(&self, cgroup: &str, cpus: &CpuSet) -> io::Result<()> {
        let file = format!("{cgroup}/cpuset.cpus");
        match self.cgroups.write(&file, &cpus.to_string()) {
            Err(error) if cpus.is_empty() && error.raw_os_error() == Some(nix::libc::ENOSPC) => {
                self.cgroups.write(&file, &self.all.to_string())
            }
            written => written,
        }
    }

    /// Removes what a limit that is lifted has left: the process that lifted it may have been killed before it could.
    ///
    /// # Errors
    /// What the kernel said.
    pub(crate) fn tidy(&mut self, unit: &str, cgroup: &str) -> io::Result<()> {
        for path in files(unit) {
            let is_left = self.root.read(&path).is_ok_and(|text| lifts(&text));
            if is_left && remove(self.root, &path)? {
                self.lifted.insert(slice_of(cgroup));
            }
        }
        Ok(())
    }

    /// Removes the drop-in of a VM that is not attached. Where its scope runs, systemd has to read that.
    ///
    /// # Errors
    /// What the kernel said.
    pub(crate) fn remove_drop_in(&mut self, path: &str) -> io::Result<()> {
        remove(self.root, path)?;
        let unit = unit_of(path);
        self.delegated |= unit.is_some_and(|unit| {
            let state = self.units.state(unit);
            state.is_ok_and(|state| !state.control_group.is_empty() && !state.delegated.is_empty())
        });
        Ok(())
    }

    /// Has systemd forget the files, and release the controller where it is not needed.
    pub(crate) fn clean_up(&mut self) {
        let lifted = std::mem::take(&mut self.lifted);
        let delegated = std::mem::take(&mut self.delegated);
        if lifted.is_empty() && !delegated {
            return;
        }
        if let Err(error) = services::reload(self.units) {
            tracing::warn!("{}", chain(&error));
        }
        for slice in &lifted {
            match self.units.realize(slice) {
                Ok(()) | Err(SystemdError::NoSuchUnit { .. }) => {}
                Err(error) => {
                    tracing::debug!("the cpuset controller stays for a while: {}", chain(&error));
                }
            }
        }
    }
}

/// The slice that a unit's cgroup is in.
fn slice_of(cgroup: &str) -> String {
    let above = cgroup.rsplit_once('/').map_or("", |(above, _)| above);
    let slice = above.rsplit('/').next().filter(|name| !name.is_empty());
    slice.unwrap_or("-.slice").to_owned()
}

/// Where systemd writes `AllowedCPUs=` that is set at run time: of a transient unit, and of any other.
pub(crate) fn files(unit: &str) -> [String; 2] {
    ["transient", "system.control"]
        .map(|folder| format!("run/systemd/{folder}/{unit}.d/50-AllowedCPUs.conf"))
}

/// Whether the file only says that there is no limit.
pub(crate) fn lifts(text: &str) -> bool {
    let mut limits = text.lines().map(str::trim).filter(|line| line.starts_with("AllowedCPUs="));
    limits.all(|line| line == "AllowedCPUs=")
}

/// Removes a file and its folder, where that is empty then. Whether it was there.
pub(crate) fn remove(root: &SysRoot, relative: &str) -> io::Result<bool> {
    let path = root.path(relative).map_err(|error| error.source)?;
    let removed = match fs::remove_file(&path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if removed && let Some(folder) = path.parent() {
        // Another program may have something in it; then it stays.
        let _ = fs::remove_dir(folder);
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroups::CgroupTree;
    use crate::systemd::fake::FakeUnits;

    #[test]
    fn remains_of_a_lifted_limit_are_removed_by_the_next_qmpin() {
        let dir = tempfile::tempdir().expect("a folder");
        let (root, units) = (SysRoot::at(dir.path()), FakeUnits::default());
        let tree = CgroupTree::of(&root);
        let [_, path] = files("system.slice");
        let file = dir.path().join(&path);
        fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        for (text, stays) in
            [("[Slice]\nAllowedCPUs=\nAllowedCPUs=0-3\n", true), ("[Slice]\nAllowedCPUs=\n", false)]
        {
            fs::write(&file, text).expect("written");
            let mut limits = Limits::new(&root, &tree, &units, CpuSet::EMPTY);
            limits.tidy("system.slice", "system.slice").expect("tidied");
            limits.clean_up();
            assert_eq!(file.exists(), stays, "{text}");
        }
        assert_eq!(
            *units.log.borrow(),
            ["reload", "realize -.slice"],
            "once, for the one that has gone"
        );
        assert!(!file.parent().expect("a folder").exists());
    }
}
