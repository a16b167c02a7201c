//! Which VMs a unit of qmpin is enabled for: the links that `systemctl enable qmpin@100.path` makes
//! (`systemd.unit(5)`, "WantedBy=").

use std::collections::BTreeSet;

use crate::ids::VmName;
use crate::sysroot::SysRoot;

/// Where the links to enabled units of qmpin are.
const WANTS: &str = "etc/systemd/system/multi-user.target.wants";

/// Reads them, in the order of their names.
#[must_use]
pub fn enabled_vms(root: &SysRoot) -> BTreeSet<VmName> {
    let units = root.folder(WANTS).and_then(|folder| folder.names()).unwrap_or_default();
    units.iter().filter_map(|unit| vm_of(unit)).collect()
}

fn vm_of(unit: &str) -> Option<VmName> {
    let instance = unit.strip_prefix("qmpin@")?;
    let vm = instance.strip_suffix(".path").or_else(|| instance.strip_suffix(".service"))?;
    vm.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_vm_is_enabled_by_a_link_to_one_of_its_units() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = SysRoot::at(dir.path());
        assert!(enabled_vms(&root).is_empty());
        for unit in [
            "qmpin@100.path",
            "qmpin@win.service",
            "qmpin-sweep.service",
            "qmpin@.path",
            "qmpin-running@103.timer",
        ] {
            let path = dir.path().join(WANTS).join(unit);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, "").expect("written");
        }
        let found: Vec<String> = enabled_vms(&root).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["100", "win"]);
    }
}
