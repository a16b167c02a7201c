//! Which QEMU the VM's next start gets: that of the package that is installed, for the host's own architecture.

use std::fmt;

use super::cpu_type;
use crate::sysroot::SysRoot;

/// dpkg's list of packages (`dpkg-query(1)`).
const STATUS: &str = "var/lib/dpkg/status";
/// Packages with a QEMU for x86, Proxmox's first.
const PACKAGES: [&str; 2] = ["pve-qemu-kvm", "qemu-system-x86"];

/// Who makes x86 CPUs (`arch/x86/kernel/cpu`). IBM's have a vendor, too.
const X86_VENDORS: [&str; 5] =
    ["AuthenticAMD", "GenuineIntel", "HygonGenuine", "CentaurHauls", "Shanghai"];

/// A version of QEMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Version {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What is known of the QEMU that starts the VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Qemu {
    /// Its version; `None`: not known.
    pub(super) version: Option<Version>,
    /// Whether it runs x86 guests. False also where that is not known.
    pub(super) is_x86: bool,
}

impl Qemu {
    /// Reads the list of packages, and the host's CPU.
    pub(super) fn of(root: &SysRoot) -> Qemu {
        let vendor = cpu_type::field(root, "vendor_id");
        let is_x86 = vendor.is_ok_and(|vendor| X86_VENDORS.contains(&vendor.as_str()));
        Qemu { version: installed(root), is_x86 }
    }
}

/// Returns the version of the installed package; `None`: it is not known.
fn installed(root: &SysRoot) -> Option<Version> {
    let status = root.read_lossy(STATUS).ok()?;
    let of = |package: &str| {
        status.split("\n\n").find_map(|paragraph| {
            let field = |name: &str| {
                let mut lines = paragraph.lines();
                lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
            };
            let is_it = field("Package") == Some(package)
                && field("Status").is_some_and(|status| status.ends_with(" installed"));
            if is_it { parse(field("Version")?) } else { None }
        })
    };
    PACKAGES.iter().find_map(|package| of(package))
}

/// Reads `1:10.0.2+ds-2` or `10.1.2-3`.
fn parse(text: &str) -> Option<Version> {
    let text = text.split_once(':').map_or(text, |(_, rest)| rest);
    let mut numbers = text.split(|char: char| !char.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some(Version { major: next()?, minor: next()? })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Tree;
    use super::*;

    #[test]
    fn the_installed_package_is_found_and_no_other() {
        let found = |status: &str| installed(&Tree::new(&[(STATUS, status)]).root());
        let version = |major, minor| Some(Version { major, minor });
        let other = "Package: bash\nStatus: install ok installed\nVersion: 5.2-1\n\n";
        let debian = "Package: qemu-system-x86\nStatus: install ok installed\nVersion: 1:7.2+dfsg-7+deb12u18\n";
        let gone = "Package: pve-qemu-kvm\nStatus: deinstall ok config-files\nVersion: 9.2.0-1\n\n";
        let proxmox = "Package: pve-qemu-kvm\nStatus: install ok installed\nPriority: optional\nVersion: 10.1.2-3\n\n";
        assert_eq!(found(&format!("{other}{gone}{debian}")), version(7, 2));
        assert_eq!(
            found(&format!("{debian}\n{proxmox}")),
            version(10, 1),
            "Proxmox's own counts first"
        );
        assert_eq!(found(other), None);
        assert_eq!(found(&proxmox.replace("10.1.2-3", "git")), None);
        assert_eq!(installed(&Tree::new(&[]).root()), None);
        assert!(version(10, 0) > version(9, 2));
    }

    #[test]
    fn x86_is_known_by_its_vendor() {
        for (cpuinfo, is_x86) in [
            ("vendor_id\t: AuthenticAMD\n", true),
            ("vendor_id       : IBM/S390\nfeatures\t: esan3\n", false),
            ("CPU implementer\t: 0x41\nFeatures\t: fp\n", false),
        ] {
            let tree = Tree::new(&[("proc/cpuinfo", cpuinfo)]);
            assert_eq!(Qemu::of(&tree.root()).is_x86, is_x86, "{cpuinfo}");
        }
    }
}
