//! Reads the policy files: `qmpin.toml`, the cluster's `<vm>.toml`, then the host's `<vm>.toml`. A file that
//! is not there says nothing.
//!
//! ```text
//!   all good ─▶ the policy ─▶ remembered, for when they are not
//!   one is bad ─▶ refused; or, where that is wanted, what is remembered
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::chain;
use crate::ids::VmName;
use crate::policy::{FileKind, Policy, PolicyError};
use crate::state_file::{create_folder, read_config, read_state};

/// The longest policy file read. A policy is a page of text; a larger file is a mistake.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// The longest copy read: three files, and what JSON makes of them.
const COPY_BYTES_MAX: u64 = 8 * FILE_BYTES_MAX;
/// The schema of a copy.
const SCHEMA: &str = "qmpin.policy-copy/1";

/// Why the policy could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// The file is there and cannot be read.
    #[error("could not read the policy {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file was read and refused.
    #[error(transparent)]
    Refused(#[from] PolicyError),
    /// Proxmox's cluster file system is not there, and a policy may be in it.
    #[error("{} is empty: the cluster's file system is not mounted", path.display())]
    NoCluster {
        /// Where it would be.
        path: PathBuf,
    },
}

/// Where policy files are.
#[derive(Clone, Debug)]
pub struct PolicyDirs {
    /// The host's own: `/etc/qmpin`.
    pub host: PathBuf,
    /// The cluster's file system, `/etc/pve`, where it may have a say.
    pub cluster: Option<PathBuf>,
    /// Where the last good ones are remembered: `/var/lib/qmpin`.
    pub copies: PathBuf,
}

/// A policy file as it was read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct PolicyText {
    path: PathBuf,
    text: String,
}

/// The files of one VM, as they were when they were good.
#[derive(Serialize, Deserialize)]
struct Copy {
    schema: String,
    files: Vec<PolicyText>,
}

impl PolicyDirs {
    /// The policy of the files, over the defaults.
    ///
    /// # Errors
    /// [`PolicyFileError`], with file, line and reason.
    pub fn load(&self, vm: Option<&VmName>) -> Result<Policy, PolicyFileError> {
        Ok(self.parse(vm, &self.read(vm)?)?)
    }

    /// As [`load`](PolicyDirs::load), and remembers what is good. Where it is not, what was good the last
    /// time is taken, with the reason.
    ///
    /// # Errors
    /// [`PolicyFileError`] where nothing is remembered.
    pub fn load_or_last_good(&self, vm: &VmName) -> Result<Policy, PolicyFileError> {
        let parse = |texts: &[PolicyText]| self.parse(Some(vm), texts);
        let read = self.read(Some(vm));
        let good = read.and_then(|texts| Ok((parse(&texts)?, texts)));
        match good {
            Ok((policy, files)) => {
                // Without it, the next bad file is refused.
                if let Err(error) = self.remember(vm, files) {
                    let path = self.copy_path(vm);
                    tracing::warn!("{} could not be written: {error}", path.display());
                }
                Ok(policy)
            }
            Err(error) => match self.remembered(vm).map(|texts| parse(&texts)) {
                Some(Ok(policy)) => Ok(Policy { instead_of: Some(chain(&error)), ..policy }),
                _ => Err(error),
            },
        }
    }

    /// The files that have a say, the weakest first.
    #[must_use]
    pub fn files(&self, vm: Option<&VmName>) -> Vec<(PathBuf, FileKind)> {
        let mut files = vec![(self.host.join("qmpin.toml"), FileKind::Host)];
        if let Some(vm) = vm {
            let name = format!("{vm}.toml");
            let of_cluster = self.cluster.as_ref().map(|dir| dir.join("qmpin").join(&name));
            files.extend(of_cluster.map(|path| (path, FileKind::Cluster)));
            files.push((self.host.join(name), FileKind::Vm));
        }
        files
    }

    /// Whether one of the files can be used; one that is not there can.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, path: &Path, kind: FileKind) -> Result<(), PolicyFileError> {
        if let Some(text) = self.read_file(path, kind)? {
            Policy::default().with_file(&text, path, kind)?;
        }
        Ok(())
    }

    /// Every VM that has a file, and every file whose name is none, in order.
    ///
    /// # Errors
    /// [`PolicyFileError::Read`] where a folder cannot be listed; one that is not there has none.
    pub fn all(&self) -> Result<(Vec<VmName>, Vec<PathBuf>), PolicyFileError> {
        let (mut vms, mut nobodys) = (Vec::new(), Vec::new());
        let of_cluster = self.cluster.as_ref().map(|dir| dir.join("qmpin"));
        for dir in std::iter::once(self.host.clone()).chain(of_cluster) {
            let fail = |source| PolicyFileError::Read { path: dir.clone(), source };
            let entries = match fs::read_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(fail)?,
            };
            for entry in entries {
                let name = entry.map_err(fail)?.file_name();
                let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(".toml")) else {
                    continue;
                };
                match stem.parse() {
                    Ok(_) if dir == self.host && stem == "qmpin" => {}
                    Ok(vm) => vms.push(vm),
                    Err(_) => nobodys.push(dir.join(&name)),
                }
            }
        }
        vms.sort_unstable();
        vms.dedup();
        nobodys.sort_unstable();
        Ok((vms, nobodys))
    }

    fn read(&self, vm: Option<&VmName>) -> Result<Vec<PolicyText>, PolicyFileError> {
        let mut texts = Vec::new();
        for (path, kind) in self.files(vm) {
            let text = self.read_file(&path, kind)?;
            texts.extend(text.map(|text| PolicyText { path, text }));
        }
        Ok(texts)
    }

    /// `None`: it is not there.
    fn read_file(&self, path: &Path, kind: FileKind) -> Result<Option<String>, PolicyFileError> {
        if kind == FileKind::Cluster {
            self.check_cluster()?;
        }
        match read_config(path, FILE_BYTES_MAX) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(PolicyFileError::Read { path: path.to_owned(), source }),
        }
    }

    /// pmxcfs is never empty; its mount point is. No file in it says something else then than no policy.
    fn check_cluster(&self) -> Result<(), PolicyFileError> {
        let Some(path) = &self.cluster else { return Ok(()) };
        let path = path.clone();
        let first = match fs::read_dir(&path) {
            Ok(mut entries) => entries.next(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // As when the daemon behind it has ended.
            Err(source) => return Err(PolicyFileError::Read { path, source }),
        };
        if first.is_none() { Err(PolicyFileError::NoCluster { path }) } else { Ok(()) }
    }

    fn parse(&self, vm: Option<&VmName>, texts: &[PolicyText]) -> Result<Policy, PolicyError> {
        let of = |path: &Path| texts.iter().find(|text| text.path == path);
        let files = self.files(vm).into_iter();
        let mut found = files.filter_map(|(path, kind)| Some((of(&path)?, kind)));
        found.try_fold(Policy::default(), |policy, (text, kind)| {
            policy.with_file(&text.text, &text.path, kind)
        })
    }

    fn copy_path(&self, vm: &VmName) -> PathBuf {
        self.copies.join(format!("{vm}.policy"))
    }

    fn remembered(&self, vm: &VmName) -> Option<Vec<PolicyText>> {
        let text = read_state(&self.copy_path(vm), COPY_BYTES_MAX).ok()?;
        let copy: Copy = serde_json::from_str(&text).ok()?;
        (copy.schema == SCHEMA).then_some(copy.files)
    }

    fn remember(&self, vm: &VmName, files: Vec<PolicyText>) -> io::Result<()> {
        if self.remembered(vm).as_ref() == Some(&files) {
            return Ok(());
        }
        let copy = serde_json::to_vec(&Copy { schema: SCHEMA.to_owned(), files })?;
        create_folder(&self.copies)?.replace(format!("{vm}.policy").as_ref(), &copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Level;

    struct World {
        dir: tempfile::TempDir,
    }

    impl World {
        fn new() -> World {
            let world = World { dir: tempfile::tempdir().expect("a folder") };
            fs::create_dir_all(world.path("etc/qmpin")).expect("made");
            world
        }

        fn path(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn write(&self, path: &str, text: impl AsRef<[u8]>) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            fs::write(path, text).expect("written");
        }

        fn dirs(&self) -> PolicyDirs {
            PolicyDirs {
                host: self.path("etc/qmpin"),
                cluster: Some(self.path("etc/pve")),
                copies: self.path("var/lib/qmpin"),
            }
        }

        fn level(&self) -> Result<(Level, Option<String>), String> {
            let policy = self.dirs().load_or_last_good(&vm()).map_err(|error| error.to_string())?;
            Ok((policy.vm.isolation.value, policy.instead_of))
        }
    }

    fn vm() -> VmName {
        "100".parse().expect("a name")
    }

    #[test]
    fn the_cluster_is_stronger_than_the_hosts_defaults_and_weaker_than_the_hosts_own_file() {
        let world = World::new();
        assert_eq!(world.level(), Ok((Level::Exclusive, None)), "no file at all");
        for (path, level) in [
            ("etc/qmpin/qmpin.toml", Level::None),
            ("etc/pve/qmpin/100.toml", Level::Strict),
            ("etc/qmpin/100.toml", Level::Pinned),
        ] {
            let word = serde_json::to_string(&level).expect("a word");
            world.write(path, format!("isolation = {word}\n"));
            assert_eq!(world.level(), Ok((level, None)), "{path}");
        }
    }

    #[test]
    fn what_was_good_stays_while_a_file_is_bad_and_only_then() {
        let world = World::new();
        let path = "etc/pve/qmpin/100.toml";
        let huge = "# ".repeat(usize::try_from(FILE_BYTES_MAX).expect("fits"));
        for (bad, reason) in [
            (&b"isolation = \"strict\"\nshare = tr"[..], "100.toml:2"),
            (b"vcpus = \"1-3\"\n", "on every node"),
            (b"\xff\xfe", "could not read"),
            (huge.as_bytes(), "could not read"),
        ] {
            world.write(path, bad);
            fs::remove_dir_all(world.path("var")).ok();
            let error = world.level().expect_err("nothing is remembered");
            assert!(error.contains(reason) && error.contains("100.toml"), "{error}");
            world.write(path, "isolation = \"strict\"\n");
            assert_eq!(world.level(), Ok((Level::Strict, None)));
            world.write(path, bad);
            let (level, why) = world.level().expect("the last good one");
            assert_eq!(level, Level::Strict);
            assert!(why.is_some_and(|why| why.contains(reason)));
        }
        fs::remove_file(world.path(path)).expect("removed");
        assert_eq!(world.level(), Ok((Level::Exclusive, None)), "no file is no bad file");
    }

    #[test]
    fn a_cluster_that_is_not_mounted_is_not_a_cluster_without_a_policy() {
        let world = World::new();
        fs::create_dir_all(world.path("etc/pve")).expect("made");
        assert!(world.level().expect_err("empty").contains("not mounted"));
        world.write("etc/pve/.members", "{}");
        assert_eq!(world.level(), Ok((Level::Exclusive, None)));
        fs::remove_file(world.path("etc/pve/.members")).expect("removed");
        let (_, why) = world.level().expect("the last good one");
        assert!(why.is_some_and(|why| why.contains("not mounted")));
    }

    #[test]
    fn a_copy_that_makes_no_sense_is_none() {
        let world = World::new();
        world.write("etc/qmpin/100.toml", "isolation = 7\n");
        for text in ["", "{", "{\"schema\":\"other/1\",\"files\":[]}"] {
            world.write("var/lib/qmpin/100.policy", text);
            assert!(world.level().is_err(), "{text}");
        }
        // One that cannot be written is no reason not to attach.
        world.write("etc/qmpin/100.toml", "isolation = \"none\"\n");
        fs::remove_dir_all(world.path("var/lib")).expect("removed");
        world.write("var/lib", "a file");
        assert_eq!(world.level(), Ok((Level::None, None)));
    }

    #[test]
    fn every_vm_with_a_file_is_found_and_so_is_a_file_of_no_vm() {
        let world = World::new();
        for path in ["etc/qmpin/qmpin.toml", "etc/qmpin/100.toml", "etc/qmpin/two words.toml"] {
            world.write(path, "");
        }
        for path in ["etc/pve/qmpin/101.toml", "etc/pve/qmpin/100.toml", "etc/qmpin/100.toml.bak"] {
            world.write(path, "");
        }
        let (vms, nobodys) = world.dirs().all().expect("listed");
        assert_eq!(vms.iter().map(VmName::as_str).collect::<Vec<_>>(), ["100", "101"]);
        assert_eq!(nobodys, [world.path("etc/qmpin/two words.toml")]);
    }
}
