//! The cgroups beside a VM's, and what they are limited to.

use std::io;

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup::{is_gone, is_plain, is_unit};
use crate::knobs::host::places::Place;

/// The places that limit the cgroups beside the path to this one: units by systemd, other cgroups by their own file,
/// where they have it.
pub(crate) fn groups_beside(cgroups: &dyn Cgroups, cgroup: &str) -> Vec<Place> {
    let mut above = String::new();
    let mut places = Vec::new();
    for part in cgroup.split('/') {
        let children = cgroups.children(&above).unwrap_or_default();
        let below = |name: &str| {
            if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") }
        };
        for name in children.iter().filter(|name| *name != part) {
            let path = below(name);
            if is_plain(name) && is_unit(name) {
                let unit = name.strip_prefix('_').unwrap_or(name).to_owned();
                places.push(Place::AllowedCpus { unit, cgroup: path });
            } else if !is_of_systemd(name) && cgroups.read(&format!("{path}/cpuset.cpus")).is_ok() {
                places.push(Place::Cpuset(path));
            }
        }
        above = below(part);
    }
    places
}

/// Whether it is a unit without processes to speak of: systemd makes groups for these, and they have no threads to
/// keep off.
fn is_of_systemd(name: &str) -> bool {
    let suffix = name.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    is_plain(name) && ["mount", "socket", "swap"].contains(&suffix)
}

/// What a cgroup is limited to; no CPU at all: it does not. `None`: there is no such cgroup.
///
/// # Errors
/// What the kernel said, or `InvalidData` where what is there makes no sense.
pub(crate) fn limit(
    cgroups: &dyn Cgroups,
    cgroup: &str,
    online: &CpuSet,
) -> io::Result<Option<CpuSet>> {
    let there = |read: io::Result<String>| match read {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    };
    if there(cgroups.read(&format!("{cgroup}/cgroup.type")))?.is_none() {
        return Ok(None);
    }
    // Without the controller there is no limit.
    let text = there(cgroups.read(&format!("{cgroup}/cpuset.cpus")))?.unwrap_or_default();
    let cpus = CpuSet::parse_cpulist(&text).map_err(io::Error::other)?;
    // What it leaves behind when a limit is lifted.
    Ok(Some(if online.is_subset(&cpus) { CpuSet::EMPTY } else { cpus }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroups::fake::FakeCgroups;

    #[test]
    fn what_is_beside_a_vm_is_limited_by_systemd_or_by_its_own_file() {
        let tree = FakeCgroups::with(&[
            ("lxc", ""),
            ("lxc/105", ""),
            ("dev-hugepages.mount", ""),
            ("qemu.slice", ""),
            ("qemu.slice/100.scope", ""),
            ("qemu.slice/101.scope", ""),
            ("system.slice", ""),
        ]);
        // Without the controller there is nothing to write.
        tree.put("lxc.monitor/cgroup.type", "domain");
        let unit = |unit: &str, cgroup: &str| Place::AllowedCpus {
            unit: unit.to_owned(),
            cgroup: cgroup.to_owned(),
        };
        let wanted = [
            Place::Cpuset("lxc".to_owned()),
            unit("system.slice", "system.slice"),
            unit("101.scope", "qemu.slice/101.scope"),
        ];
        assert_eq!(groups_beside(&tree, "qemu.slice/100.scope"), wanted);
    }
}
