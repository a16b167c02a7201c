//! Machines that were captured on the test host: `tests/hosts/`.

use std::fs;
use std::path::{Path, PathBuf};

use qmpin::discover::read_topology;
use qmpin::sysroot::SysRoot;
use qmpin::topology::Topology;

use super::fake_host;

/// Each one's folder, and its topology as it is read.
pub(crate) fn machines() -> Vec<(PathBuf, Topology)> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let read = |host: PathBuf| {
        let tree = fake_host::empty_tree().expect("a folder");
        let unpacked = super::clean::command(tests.join("capture-host"))
            .arg("--unpack")
            .args([&host.join("sysroot.tsv"), tree.path()])
            .status();
        assert!(unpacked.expect("capture-host runs").success(), "{}", host.display());
        let topology = read_topology(&SysRoot::at(tree.path())).expect("its topology");
        (host, topology)
    };
    let entries = fs::read_dir(tests.join("hosts")).expect("the captures");
    entries.map(|entry| read(entry.expect("a capture").path())).collect()
}
