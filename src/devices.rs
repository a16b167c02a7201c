//! Devices of the host that a VM has for itself. A word: no I/O.

use std::fmt;

use crate::ids::NodeId;

/// What kind of device it is: by that, the first of these kinds decides where its VM is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DeviceKind {
    /// Draws or computes.
    Gpu,
    /// A disk.
    Nvme,
    /// Sends and receives.
    Network,
    /// Any other: USB, sound.
    Other,
}

impl DeviceKind {
    /// All of them, the most important first.
    pub const ALL: [DeviceKind; 4] =
        [DeviceKind::Gpu, DeviceKind::Nvme, DeviceKind::Network, DeviceKind::Other];

    /// By the class of a PCI device, 24 bits (`include/linux/pci_ids.h`).
    #[must_use]
    pub fn of_class(class: u32) -> DeviceKind {
        match (class >> 16, class >> 8) {
            (0x03, _) => DeviceKind::Gpu,
            (_, 0x0108) => DeviceKind::Nvme,
            (0x02, _) => DeviceKind::Network,
            _ => DeviceKind::Other,
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Gpu => "GPU",
            DeviceKind::Nvme => "NVMe",
            DeviceKind::Network => "network device",
            DeviceKind::Other => "device",
        })
    }
}

/// A device that a VM has, or is to have.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Device {
    /// What kind it is.
    pub kind: DeviceKind,
    /// Its PCI address.
    pub address: String,
    /// The node that it is attached to; `None`: the kernel does not say.
    pub node: Option<NodeId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_says_what_kind_it_is() {
        for (class, kind) in [
            (0x03_0000, DeviceKind::Gpu),
            (0x03_0200, DeviceKind::Gpu),
            (0x01_0802, DeviceKind::Nvme),
            (0x01_0601, DeviceKind::Other),
            (0x02_0000, DeviceKind::Network),
            (0x04_0300, DeviceKind::Other),
            (0x0c_0330, DeviceKind::Other),
        ] {
            assert_eq!(DeviceKind::of_class(class), kind, "{class:06x}");
        }
    }
}
