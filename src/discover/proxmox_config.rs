//! A VM's configuration as Proxmox has it, `/etc/pve/qemu-server/<vmid>.conf` (`PVE/QemuServer.pm: parse_vm_config`):
//! lines `key: value`, then sections of snapshots. It is read and never written.

use std::collections::BTreeMap;

use crate::ids::VmName;
use crate::state_file::read_config;
use crate::sysroot::SysRoot;

/// The longest configuration that is read: pmxcfs itself takes no file above 1 MiB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What of it concerns where a VM runs, and how QEMU is started.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxmoxConfig {
    /// `affinity`: the cpulist that all of QEMU is started on.
    pub affinity: Option<String>,
    /// `cpulimit`: how many CPUs' time it gets; 0 is no limit.
    pub cpulimit: Option<String>,
    /// How many vCPUs it may have, `sockets` times `cores`, each 1 where it is absent; `None` where they are no such
    /// numbers.
    pub max_vcpus: Option<u32>,
    /// The line of `cores`, or else the first, counted from 1.
    pub cores_line: usize,
    /// `args`: options for QEMU's command line.
    pub args: Option<String>,
    /// Whether the guest's memory is bound to nodes of the host: `numa: 1`, and `hostnodes=` in every `numaN`.
    pub is_memory_bound: bool,
    /// Every line that has a value, by key; of several lines with one key the last counts.
    pub lines: BTreeMap<String, String>,
}

impl ProxmoxConfig {
    /// Reads the text of a configuration.
    #[must_use]
    pub fn of_text(text: &str) -> ProxmoxConfig {
        parse(text)
    }

    /// Returns the value of a line.
    #[must_use]
    pub fn line(&self, key: &str) -> Option<&str> {
        self.lines.get(key).map(String::as_str)
    }

    /// Returns the lines whose key is this name with a number, such as `scsi0`, by number.
    pub fn numbered<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (u32, &'a str)> {
        let mut found: Vec<(u32, &str)> = self
            .lines
            .iter()
            .filter(|(key, _)| is_numbered(key, name))
            .filter_map(|(key, value)| Some((key.get(name.len()..)?.parse().ok()?, value.as_str())))
            .collect();
        found.sort_unstable();
        found.into_iter()
    }

    /// Returns whether a kind of device can be plugged while the VM runs (`PVE/QemuServer.pm:
    /// parse_hotplug_features`).
    #[must_use]
    pub fn has_hotplug(&self, feature: &str) -> bool {
        let features = match self.line("hotplug") {
            None | Some("1") => HOTPLUG_DEFAULT,
            Some(features) => features,
        };
        let is_between = |char: char| [',', ';', '\0'].contains(&char) || char.is_whitespace();
        features.split(is_between).any(|one| one == feature)
    }
}

/// What can be plugged where the configuration does not say.
const HOTPLUG_DEFAULT: &str = "network,disk,usb";

/// Where a VM's configuration is, below the root.
#[must_use]
pub fn proxmox_config_path(vm: &VmName) -> String {
    format!("etc/pve/qemu-server/{vm}.conf")
}

/// A VM's configuration.
///
/// # Errors
/// Why it cannot be read, with the path.
pub fn proxmox_config(root: &SysRoot, vm: &VmName) -> Result<ProxmoxConfig, String> {
    Ok(parse(&text(root, vm)?))
}

/// The lines of a VM's configuration, by key.
///
/// # Errors
/// As [`proxmox_config`].
pub(super) fn config_lines(
    root: &SysRoot,
    vm: &VmName,
) -> Result<BTreeMap<String, String>, String> {
    Ok(lines_of(&text(root, vm)?))
}

/// The same of a text. Of several lines with one key the last counts.
pub(super) fn lines_of(text: &str) -> BTreeMap<String, String> {
    let lines = own_lines(text).filter(|(_, value, _)| !value.is_empty());
    lines.map(|(key, value, _)| (key.to_owned(), value.to_owned())).collect()
}

/// Key, value and number, from 1, of the lines that hold now: what follows is of snapshots, and of changes that wait
/// for the next start.
fn own_lines(text: &str) -> impl Iterator<Item = (&str, &str, usize)> {
    let own = text.lines().take_while(|line| !line.starts_with('['));
    own.zip(1..).filter_map(|(line, at)| {
        let (key, value) = line.split_once(':')?;
        Some((key, value.trim(), at))
    })
}

fn text(root: &SysRoot, vm: &VmName) -> Result<String, String> {
    let name = proxmox_config_path(vm);
    if !root.is_live() {
        return root.read_lossy(&name).map_err(|error| format!("{error}: {}", error.source));
    }
    let path = root.path(&name).map_err(|error| format!("{error}: {}", error.source))?;
    let text = read_config(&path, CONFIG_BYTES_MAX);
    text.map_err(|error| format!("could not read {}: {error}", path.display()))
}

fn parse(text: &str) -> ProxmoxConfig {
    let mut config = ProxmoxConfig::default();
    let mut has_numa = false;
    let mut nodes: BTreeMap<&str, bool> = BTreeMap::new();
    let (mut sockets, mut cores) = (Some(1), Some(1));
    config.cores_line = 1;
    config.lines = lines_of(text);
    for (key, value, at) in own_lines(text) {
        let value = Some(value.to_owned()).filter(|value| !value.is_empty());
        match key {
            "affinity" => config.affinity = value,
            "cpulimit" => config.cpulimit = value.filter(|limit| limit.parse() != Ok(0.0)),
            "args" => config.args = value,
            "sockets" => sockets = value.and_then(|value| value.parse::<u32>().ok()),
            "cores" => {
                cores = value.and_then(|value| value.parse::<u32>().ok());
                config.cores_line = at;
            }
            "numa" => has_numa = value.as_deref() == Some("1"),
            key if is_numbered(key, "numa") => {
                let is_bound =
                    |value: &String| value.split(',').any(|part| part.starts_with("hostnodes="));
                nodes.insert(key, value.as_ref().is_some_and(is_bound));
            }
            _ => {}
        }
    }
    config.max_vcpus = sockets.zip(cores).and_then(|(sockets, cores)| sockets.checked_mul(cores));
    config.is_memory_bound = has_numa && !nodes.is_empty() && nodes.values().all(|bound| *bound);
    config
}

/// Whether it is that name with a number behind it.
pub(super) fn is_numbered(key: &str, name: &str) -> bool {
    let number = key.strip_prefix(name).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_lines_the_last_counts_and_a_snapshot_has_none() {
        let config = parse("args: -k de\nargs: -S \n[before]\nargs: -old\n[PENDING]\nargs: -new\n");
        assert_eq!(config.args.as_deref(), Some("-S"));
        assert_eq!(parse("cores: 2\n\n[before]\nargs: -old\n").args, None);
    }

    #[test]
    fn memory_is_bound_where_every_node_of_the_guest_is() {
        let bound = "numa0: cpus=0-3,hostnodes=1,memory=4096,policy=bind\n";
        for (text, is_bound) in [
            (format!("numa: 1\n{bound}"), true),
            (bound.to_owned(), false),
            (format!("numa: 0\n{bound}"), false),
            (format!("numa: 1\n{bound}numa1: cpus=4-7,memory=4096\n"), false),
            (format!("numa: 1\n[before]\n{bound}"), false),
        ] {
            assert_eq!(parse(&text).is_memory_bound, is_bound, "{text}");
        }
    }

    #[test]
    fn snapshots_and_comments_say_nothing_of_now() {
        let text = "#affinity: 1\ncores: 8\naffinity: 6-11,18-23\ncpulimit: 0\n\n[before]\naffinity: 0\ncpulimit: 4\n";
        let config = parse(text);
        assert_eq!(config.affinity.as_deref(), Some("6-11,18-23"));
        assert_eq!(config.cpulimit, None);
        assert_eq!(parse("cpulimit: 2.5\n").cpulimit.as_deref(), Some("2.5"));
        let lines = [("\u{fffd}".to_owned(), "1".to_owned())].into();
        let nothing =
            ProxmoxConfig { max_vcpus: Some(1), cores_line: 1, lines, ..ProxmoxConfig::default() };
        assert_eq!(parse("affinity:\nno line\n\u{fffd}: 1"), nothing);
    }

    #[test]
    fn the_number_of_vcpus_is_sockets_times_cores() {
        for (text, max, line) in [
            ("cores: 4\n", Some(4), 1),
            ("name: x\nsockets: 2\ncores: 4\nvcpus: 3\n", Some(8), 3),
            ("sockets: 2\n[PENDING]\ncores: 64\n", Some(2), 1),
            ("cores: many\n", None, 1),
            ("sockets: 4294967295\ncores: 2\n", None, 2),
        ] {
            let config = parse(text);
            assert_eq!((config.max_vcpus, config.cores_line), (max, line), "{text}");
        }
    }

    #[test]
    fn lines_are_found_by_key_and_number() {
        let config = parse("scsi10: b\nscsi2: a\nscsihw: lsi\nscsi: x\nscsi3:\n[old]\nscsi4: c\n");
        assert_eq!(config.numbered("scsi").collect::<Vec<_>>(), [(2, "a"), (10, "b")]);
        assert_eq!((config.line("scsihw"), config.line("scsi4")), (Some("lsi"), None));
    }

    #[test]
    fn hotplug_is_what_the_line_or_the_default_says() {
        for (text, cpu, disk) in [
            ("", false, true),
            ("hotplug: 1\n", false, true),
            ("hotplug: 0\n", false, false),
            ("hotplug: network,cpu\n", true, false),
            ("hotplug: disk;cpu usb\n", true, true),
        ] {
            let config = parse(text);
            assert_eq!(
                (config.has_hotplug("cpu"), config.has_hotplug("disk")),
                (cpu, disk),
                "{text}"
            );
        }
    }
}
