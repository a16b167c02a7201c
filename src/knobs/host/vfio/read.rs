//! The interrupts of a VM's own devices (vfio): which there are now. They come and go as the guest turns
//! MSI and MSI-X on and off.
//!
//! ```text
//!   /proc/PID/fd/* ─▶ a character device of vfio's ─▶ PCI devices ─▶ msi_irqs/, irq ─▶ who has asked for it
//!     said to be in /dev/vfio   its number, in /sys/dev/char                /sys/kernel/irq/N/actions
//! ```
//!
//! No name is trusted: what QEMU has open counts by its device number, and an interrupt that the host
//! has asked for as well, such as a shared line, is not the VM's.

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::discover::devices::open_devices;
use crate::knobs::host::places::{Place, VfioIrq};
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// The interrupts of all devices that this QEMU process has, by the place that has their CPUs. What
/// cannot be read is left out: it is then treated as any other.
#[must_use]
pub fn vfio_irqs(root: &SysRoot, vm: ProcessKey) -> BTreeMap<Place, VfioIrq> {
    let mut irqs = BTreeMap::new();
    for device in open_devices(root, vm) {
        let of_device = format!("sys/bus/pci/devices/{device}");
        let numbers = root.folder(&format!("{of_device}/msi_irqs")).and_then(|msi| msi.numbers());
        let mut numbers = numbers.unwrap_or_default();
        let line = root.read_attribute(&format!("{of_device}/irq")).ok();
        numbers.extend(line.and_then(|text| text.trim().parse::<i32>().ok()));
        numbers.retain(|number| is_vfios_alone(root, *number, &device));
        let local = root.read_attribute(&format!("{of_device}/local_cpulist")).ok();
        let local = local.and_then(|text| CpuSet::parse_cpulist(&text).ok()).unwrap_or_default();
        irqs.extend(
            numbers.into_iter().map(|number| {
                (Place::of_irq(number), VfioIrq { vm, device: device.clone(), local })
            }),
        );
    }
    irqs
}

/// Whether all who have asked for the interrupt are vfio for this device
/// (`drivers/vfio/pci/vfio_pci_intrs.c`); none is not all.
fn is_vfios_alone(root: &SysRoot, number: i32, device: &str) -> bool {
    let actions = root.read_attribute(&format!("sys/kernel/irq/{number}/actions"));
    let is_vfios = |action: &str| {
        let name = action.strip_suffix(')').and_then(|name| name.strip_suffix(device));
        let kind = name.and_then(|name| name.strip_suffix('(')).unwrap_or_default();
        kind == "vfio-intx" || kind.starts_with("vfio-msi[") || kind.starts_with("vfio-msix[")
    };
    actions.is_ok_and(|actions| actions.trim().split(',').all(is_vfios))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::ids::{Pid, StartTicks};

    const VM: ProcessKey = ProcessKey { pid: Pid(7), start: StartTicks(77) };

    /// A machine with one device in group 12, and a QEMU that has something open. There is a character
    /// device on every machine that stands for the group's: `/dev/null`, 1:3.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new(node: &str) -> Machine {
            let machine = Machine(tempfile::tempdir().expect("a folder"));
            let stat = format!("7 (kvm) S {}77 0\n", "0 ".repeat(18));
            machine.write("proc/7/stat", &stat);
            machine.link("sys/dev/char/1:3", node);
            machine.link(
                "sys/devices/pci0/0000:0a:00.0/vfio-dev/vfio0/device",
                "../../../0000:0a:00.0",
            );
            machine.write("sys/kernel/iommu_groups/12/devices/0000:0a:00.0", "");
            machine.write("sys/kernel/iommu_groups/12/devices/no-device", "");
            for (file, text) in [("msi_irqs/40", ""), ("msi_irqs/41", ""), ("irq", "16\n")] {
                machine.write(&format!("sys/bus/pci/devices/0000:0a:00.0/{file}"), text);
            }
            machine.write("sys/bus/pci/devices/0000:0a:00.0/local_cpulist", "0-3\n");
            machine.actions(40, "vfio-msix[0](0000:0a:00.0)");
            machine.actions(41, "vfio-msi[1](0000:0a:00.0)");
            machine.actions(16, "vfio-intx(0000:0a:00.0)");
            machine
        }

        fn opens(self, name: &str, device: &str) -> Machine {
            let named = self.0.path().join(name);
            fs::create_dir_all(named.parent().expect("in a folder")).expect("made");
            symlink(device, &named).expect("linked");
            self.link("proc/7/fd/5", &named.display().to_string());
            self
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            fs::write(path, text).expect("written");
        }

        fn link(&self, path: &str, to: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            symlink(to, path).expect("linked");
        }

        fn actions(&self, number: u32, actions: &str) {
            self.write(&format!("sys/kernel/irq/{number}/actions"), &format!("{actions}\n"));
        }

        fn found(&self) -> Vec<u32> {
            let irqs = vfio_irqs(&SysRoot::at(self.0.path()), VM);
            let is_whole = |irq: &VfioIrq| irq.device == "0000:0a:00.0" && irq.local.len() == 4;
            assert!(irqs.values().all(is_whole), "{irqs:?}");
            let mut numbers: Vec<u32> = irqs.keys().filter_map(Place::irq).collect();
            numbers.sort_unstable();
            numbers
        }
    }

    #[test]
    fn a_group_and_a_device_lead_to_the_interrupts_of_the_device() {
        for (name, node) in [
            ("dev/vfio/12", "../../devices/virtual/vfio/12"),
            ("dev/vfio/noiommu-12", "../../devices/virtual/vfio/noiommu-12"),
            ("dev/vfio/devices/vfio0", "../../devices/pci0/0000:0a:00.0/vfio-dev/vfio0"),
        ] {
            let machine = Machine::new(node).opens(name, "/dev/null");
            assert_eq!(machine.found(), [16, 40, 41], "{name}");
        }
    }

    #[test]
    fn a_name_alone_leads_nowhere() {
        let group = "../../devices/virtual/vfio/12";
        // A file of that name, and a device that is not vfio's.
        let file = Machine::new(group);
        file.write("home/12", "");
        let target = file.0.path().join("home/12").display().to_string();
        assert_eq!(file.opens("dev/vfio/12", &target).found(), [0; 0]);
        for node in ["../../devices/virtual/mem/null", "../../devices/virtual/misc/vfio"] {
            assert_eq!(Machine::new(node).opens("dev/vfio/12", "/dev/null").found(), [0; 0]);
        }
        // Open, and not said to be vfio's: it is not even looked at.
        assert_eq!(Machine::new(group).opens("dev/null", "/dev/null").found(), [0; 0]);
        // Another process by now.
        let other = Machine::new(group).opens("dev/vfio/12", "/dev/null");
        let stat = format!("7 (kvm) S {}78 0\n", "0 ".repeat(18));
        other.write("proc/7/stat", &stat);
        assert_eq!(other.found(), [0; 0]);
    }

    #[test]
    fn an_interrupt_that_others_have_asked_for_is_the_hosts() {
        let machine =
            Machine::new("../../devices/virtual/vfio/12").opens("dev/vfio/12", "/dev/null");
        machine.actions(16, "i801_smbus,vfio-intx(0000:0a:00.0)");
        assert_eq!(machine.found(), [40, 41]);
        for host in ["nvme0q3", "", "vfio-msix[0](0000:0b:00.0)", "my-vfio-msi[0](0000:0a:00.0)"] {
            machine.actions(40, host);
            assert_eq!(machine.found(), [41], "{host}");
        }
    }
}
