//! Devices that are passed through: those that a QEMU has open, those that a Proxmox configuration names, and the nodes
//! where the host has set such devices aside.
//!
//! ```text
//!   running    /proc/PID/fd/* ─▶ a character device of vfio's ─▶ PCI devices
//!   declared   hostpci0: 01:00  or  host=0000:01:00.0;01:00.1  or  mapping=gpu (etc/pve/mapping/pci.cfg)
//!   set aside  sys/bus/pci/drivers/vfio-pci/*
//!                                                             each ─▶ class, numa_node
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::is_alive;
use super::proxmox_config::is_numbered;
use crate::devices::{Device, DeviceKind};
use crate::ids::NodeId;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// Where groups (`/dev/vfio/12`) and devices (`/dev/vfio/devices/vfio0`) are
/// (`Documentation/driver-api/vfio.rst`).
const DEVICES: &str = "/dev/vfio/";
/// What is there without any group.
const CONTAINER: &str = "vfio";
/// Where the kernel has all PCI devices.
const PCI: &str = "sys/bus/pci/devices";
/// Where Proxmox has the names of devices (`PVE/Mapping/PCI.pm`).
const MAPPING: &str = "etc/pve/mapping/pci.cfg";

/// The devices that this QEMU has, the most important first.
#[must_use]
pub fn of_process(root: &SysRoot, vm: ProcessKey) -> Vec<Device> {
    // Where nothing is bound to vfio, no QEMU has such a device, and its open files need not be looked through.
    let groups = root.folder("dev/vfio").and_then(|folder| folder.names()).unwrap_or_default();
    if groups.iter().all(|name| name == CONTAINER) {
        return Vec::new();
    }
    read_all(root, open_devices(root, vm))
}

/// The devices that a configuration names. What is not there is left out.
#[must_use]
pub fn declared(root: &SysRoot, lines: &BTreeMap<String, String>) -> Vec<Device> {
    let values = lines.iter().filter(|(key, _)| is_numbered(key, "hostpci"));
    let values = values.map(|(_, value)| value);
    let mut addresses = BTreeSet::new();
    for value in values {
        for (at, part) in value.split(',').enumerate() {
            let (key, text) = part.split_once('=').unwrap_or(("host", part));
            match key {
                "host" if at == 0 || part.contains('=') => {
                    addresses.extend(text.split(';').flat_map(|one| functions(root, one)));
                }
                "mapping" => {
                    let paths = mapped(root, text);
                    addresses.extend(paths.iter().flat_map(|path| functions(root, path)));
                }
                _ => {}
            }
        }
    }
    read_all(root, addresses)
}

/// The nodes with devices that the host has set aside for VMs.
#[must_use]
pub fn nodes_set_aside(root: &SysRoot) -> BTreeSet<NodeId> {
    let names = root.folder("sys/bus/pci/drivers/vfio-pci").and_then(|folder| folder.names());
    let names = names.unwrap_or_default().into_iter().filter(|name| is_pci_address(name));
    names.filter_map(|address| node_of(root, &address)).collect()
}

fn read_all(root: &SysRoot, addresses: BTreeSet<String>) -> Vec<Device> {
    let read = |address: String| Device {
        kind: kind_of(root, &address),
        node: node_of(root, &address),
        address,
    };
    let mut devices: Vec<Device> = addresses.into_iter().map(read).collect();
    devices.sort_unstable();
    devices
}

fn kind_of(root: &SysRoot, address: &str) -> DeviceKind {
    let class = root.read_attribute(&format!("{PCI}/{address}/class")).ok();
    let class =
        class.and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    class.map_or(DeviceKind::Other, DeviceKind::of_class)
}

/// -1 is a machine that does not say.
fn node_of(root: &SysRoot, address: &str) -> Option<NodeId> {
    let node = root.read_attribute(&format!("{PCI}/{address}/numa_node")).ok()?;
    node.trim().parse().ok().map(NodeId)
}

/// The devices of an address as Proxmox writes it: without a domain it is the first one, without a function it is all.
fn functions(root: &SysRoot, text: &str) -> Vec<String> {
    let text = text.trim().to_ascii_lowercase();
    let full = if text.matches(':').count() == 1 { format!("0000:{text}") } else { text };
    if is_pci_address(&full) {
        return vec![full];
    }
    let all = root.folder(PCI).and_then(|folder| folder.names()).unwrap_or_default();
    let is_of = |name: &String| {
        name.strip_prefix(&full).is_some_and(|rest| rest.starts_with('.')) && is_pci_address(name)
    };
    all.into_iter().filter(is_of).collect()
}

/// The addresses that a name stands for on this node of the cluster.
fn mapped(root: &SysRoot, name: &str) -> Vec<String> {
    let this_node = root.link("etc/pve/local").ok();
    let this_node = this_node.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    let text = root.read_lossy(MAPPING).unwrap_or_default();
    let mut is_here = false;
    let mut paths = Vec::new();
    for line in text.lines() {
        if !line.starts_with(char::is_whitespace) {
            is_here = line.trim() == name;
        } else if let (true, Some(map)) = (is_here, line.trim().strip_prefix("map ")) {
            let value = |key: &str| {
                let parts = map.split(',').filter_map(|part| part.split_once('='));
                parts.filter(|(name, _)| *name == key).map(|(_, value)| value).next()
            };
            if this_node.is_none() || value("node") == this_node {
                paths.extend(value("path").into_iter().flat_map(|path| path.split(';')));
            }
        }
    }
    paths.into_iter().map(str::to_owned).collect()
}

/// The PCI addresses of all devices that the process has.
#[must_use]
pub fn open_devices(root: &SysRoot, vm: ProcessKey) -> BTreeSet<String> {
    let fds = format!("proc/{}/fd", vm.pid);
    let numbers = root.folder(&fds).and_then(|folder| folder.numbers()).unwrap_or_default();
    let mut devices = BTreeSet::new();
    for number in numbers {
        let fd = format!("{fds}/{number}");
        // Read first, since to look at a file may mean to wait for who serves it.
        let is_named = |name: &Path| name.to_str().is_some_and(|name| name.contains(DEVICES));
        if root.link(&fd).is_ok_and(|name| is_named(&name))
            && let Some(device) = character_device(root, &fd)
        {
            devices.extend(of_character_device(root, device));
        }
    }
    // The number may have become another process's meanwhile.
    if is_alive(root, vm) { devices } else { BTreeSet::new() }
}

/// The number of the character device that is open there.
fn character_device(root: &SysRoot, fd: &str) -> Option<(u32, u32)> {
    let path = root.path(fd).ok()?;
    let stat = statx(CWD, &path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_character_device =
        FileType::from_raw_mode(stat.stx_mode.into()) == FileType::CharacterDevice;
    is_character_device.then_some((stat.stx_rdev_major, stat.stx_rdev_minor))
}

/// The devices behind a character device of vfio's: one for itself (`Documentation/driver-api/vfio.rst`,
/// "VFIO device cdev"), or all of a group.
fn of_character_device(root: &SysRoot, (major, minor): (u32, u32)) -> Vec<String> {
    let node = format!("sys/dev/char/{major}:{minor}");
    let Ok(link) = root.link(&node) else { return Vec::new() };
    let name = |path: Option<&Path>| Some(path?.file_name()?.to_str()?.to_owned());
    let found = match (name(Some(&link)), name(link.parent()).as_deref()) {
        (Some(_), Some("vfio-dev")) => {
            let device = root.link(&format!("{node}/device")).ok();
            name(device.as_deref()).into_iter().collect()
        }
        (Some(group), Some("vfio")) => {
            // Without an IOMMU the group has a prefix (`drivers/vfio/group.c`).
            let group = group.strip_prefix("noiommu-").unwrap_or(&group);
            let folder = root.folder(&format!("sys/kernel/iommu_groups/{group}/devices"));
            folder.and_then(|folder| folder.names()).unwrap_or_default()
        }
        _ => Vec::new(),
    };
    found.into_iter().filter(|device| is_pci_address(device)).collect()
}

/// `0000:0a:00.0`, with more digits before the first colon where there are many domains.
fn is_pci_address(name: &str) -> bool {
    let is_hex = |text: &str, least: usize| {
        text.len() >= least && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts = name.rsplit_once('.').and_then(|(rest, function)| {
        let (rest, device) = rest.rsplit_once(':')?;
        let (domain, bus) = rest.rsplit_once(':')?;
        Some([(domain, 4), (bus, 2), (device, 2), (function, 1)])
    });
    parts.is_some_and(|parts| parts.into_iter().all(|(text, least)| is_hex(text, least)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::discover::proxmox_config::lines_of;
    use crate::ids::{Pid, StartTicks};

    /// Two GPUs with sound on two nodes, a disk without a node, and a network device.
    fn machine() -> (tempfile::TempDir, SysRoot) {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        for (address, class, node) in [
            ("0000:01:00.0", "0x030000", "0"),
            ("0000:01:00.1", "0x040300", "0"),
            ("0000:41:00.0", "0x030000", "1"),
            ("0000:02:00.0", "0x010802", "-1"),
            ("0001:41:00.0", "0x020000", "1"),
        ] {
            write(&format!("{PCI}/{address}/class"), &format!("{class}\n"));
            write(&format!("{PCI}/{address}/numa_node"), &format!("{node}\n"));
        }
        write("sys/bus/pci/drivers/vfio-pci/0000:41:00.0/x", "");
        write("sys/bus/pci/drivers/vfio-pci/module/x", "");
        write(
            MAPPING,
            "other\n\tmap id=1,node=pve1,path=0000:02:00.0\n\ngpu\n\tdescription the fast one\n\
             \tmap id=1,node=pve1,path=0000:41:00.0\n\tmap id=1,node=pve2,path=0000:01:00\n",
        );
        let root = SysRoot::at(dir.path());
        (dir, root)
    }

    fn found(root: &SysRoot, config: &str) -> Vec<String> {
        let devices = declared(root, &lines_of(config));
        let node = |device: &Device| device.node.map_or("?".to_owned(), |node| node.to_string());
        devices.iter().map(|one| format!("{} {} {}", one.kind, one.address, node(one))).collect()
    }

    #[test]
    fn a_configuration_names_devices_in_many_ways() {
        let (dir, root) = machine();
        let both = ["GPU 0000:01:00.0 0", "device 0000:01:00.1 0"];
        for config in [
            "hostpci0: 01:00,pcie=1",
            "hostpci0: 0000:01:00",
            "hostpci0: host=01:00.0;01:00.1,x-vga=1",
            "hostpci0: 01:00.0\nhostpci1: 01:00.1",
        ] {
            assert_eq!(found(&root, config), both, "{config}");
        }
        assert_eq!(found(&root, "hostpci0: 0001:41:00.0"), ["network device 0001:41:00.0 1"]);
        assert_eq!(found(&root, "hostpci0: 02:00.0"), ["NVMe 0000:02:00.0 ?"]);
        assert_eq!(found(&root, "hostpci: 01:00\nhostpcix: 01:00\ncores: 1"), [""; 0]);
        assert_eq!(found(&root, "hostpci0: 77:00"), [""; 0]);
        // A name of the cluster's is another device on each node.
        symlink("nodes/pve2", dir.path().join("etc/pve/local")).expect("a link");
        assert_eq!(found(&root, "hostpci0: mapping=gpu,pcie=1"), both);
        fs::remove_file(dir.path().join("etc/pve/local")).expect("removed");
        symlink("nodes/pve1", dir.path().join("etc/pve/local")).expect("a link");
        assert_eq!(found(&root, "hostpci0: mapping=gpu"), ["GPU 0000:41:00.0 1"]);
        assert_eq!(found(&root, "hostpci0: mapping=none"), [""; 0]);
    }

    #[test]
    fn an_address_is_an_address() {
        for good in ["0000:0a:00.0", "10000:e1:1f.7"] {
            assert!(is_pci_address(good), "{good}");
        }
        for bad in ["", "0a:00.0", "0000:0a:00", "../0000:0a:00.0", "0000:0a:00.0/..", "vfio0"] {
            assert!(!is_pci_address(bad), "{bad}");
        }
    }

    /// `/dev/null`, 1:3, stands for the group's character device: there is one on every machine.
    #[test]
    fn a_running_qemu_has_what_it_has_open() {
        let (dir, root) = machine();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        let vm = ProcessKey { pid: Pid(7), start: StartTicks(77) };
        write("proc/7/stat", &format!("7 (kvm) S {}77 0\n", "0 ".repeat(18)));
        write("sys/kernel/iommu_groups/12/devices/0000:41:00.0", "");
        for folder in ["proc/7/fd", "sys/dev/char", "dev/vfio"] {
            fs::create_dir_all(dir.path().join(folder)).expect("made");
        }
        symlink("../../devices/virtual/vfio/12", dir.path().join("sys/dev/char/1:3"))
            .expect("a link");
        write("dev/vfio/vfio", "");
        let group = dir.path().join("dev/vfio/12");
        symlink(&group, dir.path().join("proc/7/fd/5")).expect("a link");
        assert_eq!(of_process(&root, vm), [], "nothing is bound to vfio");
        symlink("/dev/null", &group).expect("a link");
        let found = of_process(&root, vm);
        assert_eq!(found.len(), 1, "{found:?}");
        let Device { kind, address, node } = &found[0];
        assert_eq!(
            (*kind, address.as_str(), *node),
            (DeviceKind::Gpu, "0000:41:00.0", Some(NodeId(1)))
        );
    }

    #[test]
    fn devices_that_are_set_aside_have_nodes() {
        let (_dir, root) = machine();
        assert_eq!(nodes_set_aside(&root), BTreeSet::from([NodeId(1)]));
        let nothing = tempfile::tempdir().expect("a folder");
        assert_eq!(nodes_set_aside(&SysRoot::at(nothing.path())), BTreeSet::new());
    }
}
