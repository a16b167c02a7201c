//! Fake hosts of which a test spoils some files, and how the tests look at what was read.

use std::fs;
use std::path::Path;

use qmpin::cpuset::CpuSet;
use qmpin::discover::{DiscoverError, read_topology};
use qmpin::ids::CpuId;
use qmpin::sysroot::SysRoot;
use qmpin::topology::{Cpu, Topology};

use super::fake_host::FakeHost;

/// A machine's tree that a test spoils before it is read.
pub(crate) struct Spoilt {
    pub(crate) dir: tempfile::TempDir,
}

impl Spoilt {
    pub(crate) fn of(host: &FakeHost) -> Spoilt {
        Spoilt { dir: host.tree().expect("a tree") }
    }

    pub(crate) fn put(self, path: &str, text: &str) -> Spoilt {
        fs::write(self.dir.path().join("sys/devices").join(path), text).expect("write");
        self
    }

    pub(crate) fn remove(self, path: &str) -> Spoilt {
        let path = self.dir.path().join("sys/devices").join(path);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            .expect("remove");
        self
    }

    pub(crate) fn read(&self) -> Topology {
        read_at(self.dir.path()).expect("a topology")
    }
}

pub(crate) fn read_at(path: &Path) -> Result<Topology, DiscoverError> {
    read_topology(&SysRoot::at(path))
}

pub(crate) fn set(text: &str) -> CpuSet {
    text.parse().expect("a cpulist")
}

pub(crate) fn cpu(topology: &Topology, id: usize) -> &Cpu {
    let id = CpuId::from_index(id).expect("a CPU number");
    topology.cpu(id).expect("a CPU that is present")
}

/// The reason given for what is not known, which must be the one line that starts so.
pub(crate) fn reason<'a>(topology: &'a Topology, what: &str) -> &'a str {
    let lines: Vec<_> = topology.unknown.iter().filter(|line| line.what == what).collect();
    assert_eq!(lines.len(), 1, "{what}: {:#?}", topology.unknown);
    &lines[0].reason
}
