//! A VM's configuration as Proxmox has it, `/etc/pve/qemu-server/<vmid>.conf` (`PVE/QemuServer.pm: parse_vm_config`):
//! lines `key: value`, then sections of snapshots. It is read and never written.

use crate::ids::VmName;
use crate::state_file::read_config;
use crate::sysroot::SysRoot;

/// The longest configuration that is read: pmxcfs itself takes no file above 1 MiB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What of it concerns where a VM runs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxmoxConfig {
    /// `affinity`: the cpulist that all of QEMU is started on.
    pub affinity: Option<String>,
    /// `cpulimit`: how many CPUs' time it gets; 0 is no limit.
    pub cpulimit: Option<String>,
}

/// A VM's configuration.
///
/// # Errors
/// Why it cannot be read, with the path.
pub fn proxmox_config(root: &SysRoot, vm: &VmName) -> Result<ProxmoxConfig, String> {
    let name = format!("etc/pve/qemu-server/{vm}.conf");
    let text = if root.is_live() {
        let path = root.path(&name).map_err(|error| format!("{error}: {}", error.source))?;
        let text = read_config(&path, CONFIG_BYTES_MAX);
        text.map_err(|error| format!("could not read {}: {error}", path.display()))?
    } else {
        root.read_lossy(&name).map_err(|error| format!("{error}: {}", error.source))?
    };
    Ok(parse(&text))
}

fn parse(text: &str) -> ProxmoxConfig {
    let own = text.lines().take_while(|line| !line.starts_with('['));
    let mut config = ProxmoxConfig::default();
    for (key, value) in own.filter_map(|line| line.split_once(':')) {
        let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        match key {
            "affinity" => config.affinity = value,
            "cpulimit" => config.cpulimit = value.filter(|limit| limit.parse() != Ok(0.0)),
            _ => {}
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_and_comments_say_nothing_of_now() {
        let text = "#affinity: 1\ncores: 8\naffinity: 6-11,18-23\ncpulimit: 0\n\n[before]\naffinity: 0\ncpulimit: 4\n";
        let config = parse(text);
        assert_eq!(config.affinity.as_deref(), Some("6-11,18-23"));
        assert_eq!(config.cpulimit, None);
        assert_eq!(parse("cpulimit: 2.5\n").cpulimit.as_deref(), Some("2.5"));
        assert_eq!(parse("affinity:\nno line\n\u{fffd}: 1"), ProxmoxConfig::default());
    }
}
