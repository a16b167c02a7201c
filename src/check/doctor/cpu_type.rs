//! The CPU type of a VM's configuration, and the host's vendor.

use super::read;
use crate::discover::ProxmoxConfig;
use crate::sysroot::SysRoot;

/// What Proxmox takes where the configuration has none (`PVE/QemuServer/CPUConfig.pm: get_default_cpu_type`).
const DEFAULT: &str = "kvm64";

/// Returns the CPU type: the first part of the line `cpu:`, or that named `cputype`.
pub(super) fn of(config: &ProxmoxConfig) -> &str {
    let parts = || config.line("cpu").unwrap_or_default().split(',');
    let named = parts().find_map(|part| part.strip_prefix("cputype="));
    let first = || parts().next().filter(|part| !part.is_empty() && !part.contains('='));
    named.or_else(first).unwrap_or(DEFAULT)
}

/// Returns a field of the first CPU in `/proc/cpuinfo`, such as `vendor_id` or `flags`.
///
/// # Errors
/// Why it is not known.
pub(super) fn field(root: &SysRoot, name: &str) -> Result<String, String> {
    const CPUINFO: &str = "proc/cpuinfo";
    let text = read::text(root, CPUINFO)?;
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    });
    value.ok_or_else(|| format!("/{CPUINFO} has no {name}"))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Tree;
    use super::*;

    #[test]
    fn the_type_is_the_first_part_or_the_named_one() {
        for (text, kind) in [
            ("cpu: host,flags=+aes\n", "host"),
            ("cpu: flags=+aes,cputype=EPYC\n", "EPYC"),
            ("cpu: hidden=1\n", "kvm64"),
            ("", "kvm64"),
        ] {
            assert_eq!(of(&ProxmoxConfig::of_text(text)), kind, "{text}");
        }
    }

    #[test]
    fn fields_are_of_the_first_cpu() {
        let cpuinfo =
            "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme\n\nvendor_id\t: Other\n";
        let tree = Tree::new(&[("proc/cpuinfo", cpuinfo)]);
        assert_eq!(field(&tree.root(), "vendor_id").as_deref(), Ok("AuthenticAMD"));
        assert_eq!(field(&tree.root(), "flags").as_deref(), Ok("fpu vme"));
        assert!(field(&tree.root(), "model").is_err());
    }
}
