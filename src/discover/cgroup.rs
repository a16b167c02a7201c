//! Which unit a VM is in, whether it is the VM's own, and how its partition looks.
//!
//! Nothing is decided by versions: the files are there, or they are not.

use std::collections::BTreeSet;
use std::{io, iter};

use super::{isolcpus, stat};
use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::ids::{Pid, Tid};
use crate::shown;
use crate::site::{Group, GroupSeen, Seen, Site, levels};
use crate::sysroot::SysRoot;
use crate::wording::cpus_in_words;

/// Processes that Proxmox and libvirt put beside QEMU for the VM's sake; names as in `/proc/PID/stat`,
/// which has 15 characters of them.
const HELPERS: [&str; 6] =
    ["swtpm", "virtiofsd", "qemu-storage-da", "passt", "vhost-device-so", "dbus-vmstate"];

/// The most processes that are looked at to see whose unit it is.
const PROCESSES_MAX: usize = 256;

/// The VM's own unit, where a partition can be made in it.
///
/// # Errors
/// Why not, in a sentence.
pub fn partition_site(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Result<Site, String> {
    let text = systemd_cgroup(root, cgroups, process)?;
    has_exclusive(cgroups)?;
    let site = site_of(&text)?;
    is_own(root, cgroups, process, &site)?;
    Ok(site)
}

/// The cgroup of the VM's unit, where that holds QEMU and what serves it, and nothing else.
pub(super) fn own_cgroup(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Option<String> {
    let site = site_of(&root.read(&format!("proc/{process}/cgroup")).ok()?).ok()?;
    is_own(root, cgroups, process, &site).ok()?;
    Some(site.cgroup)
}

/// Whether a VM in a unit of its own could have a partition on this host.
///
/// # Errors
/// Why not, in a sentence.
pub fn can_partition(root: &SysRoot, cgroups: &dyn Cgroups) -> Result<(), String> {
    has_systemd_cpusets(root, cgroups)?;
    has_exclusive(cgroups)
}

/// The cgroup of a process, where systemd can keep the units beside it off its CPUs: of scopes and
/// services a user's own systemd has made, the part above that.
///
/// # Errors
/// Why not, in a sentence.
pub fn slices_site(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Result<String, String> {
    let text = systemd_cgroup(root, cgroups, process)?;
    let path = path_of(&text)?;
    let mut parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let is_users = |part: &&str| part.starts_with("user@") && has_suffix(part, "service");
    if let Some(at) = parts.iter().position(is_users) {
        parts.truncate(at + 1);
    }
    let is_known = |part: &&str| is_plain(part) && is_unit(part);
    let known: Vec<&str> = parts.into_iter().take_while(is_known).collect();
    if known.is_empty() {
        return Err(format!("QEMU is in {path}, which is no unit of systemd's"));
    }
    Ok(known.join("/"))
}

/// Whether an error says that a group or a file of it is gone: removed before it was opened, or since
/// (`fs/kernfs`).
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV))
}

/// The `/proc/PID/cgroup` of a process on a host where systemd has the cpuset controller.
fn systemd_cgroup(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Result<String, String> {
    has_systemd_cpusets(root, cgroups)?;
    root.read(&format!("proc/{process}/cgroup"))
        .map_err(|error| format!("{error}: {}", error.source))
}

fn has_systemd_cpusets(root: &SysRoot, cgroups: &dyn Cgroups) -> Result<(), String> {
    let controllers = cgroups
        .read("cgroup.controllers")
        .map_err(|_| "there is no cgroup v2 tree at /sys/fs/cgroup".to_owned())?;
    if !has_word(&controllers, "cpuset") {
        return Err("the cgroup v2 tree has no cpuset controller".to_owned());
    }
    if !root.path("run/systemd/system").is_ok_and(|path| path.is_dir()) {
        return Err("the host is not run by systemd".to_owned());
    }
    // The kernel keeps `isolcpus=` as the mask that every process inherits. It gives all of them their cpuset's CPUs
    // instead once there is a cpuset, also once that is gone (`cpuset_update_tasks_cpumask` in kernel/cgroup/cpuset.c).
    let isolated = isolcpus(root);
    if !isolated.is_empty() {
        return Err(format!(
            "{} are isolated on the kernel command line (isolcpus=), and a cpuset would end that for every process",
            cpus_in_words(&isolated)
        ));
    }
    Ok(())
}

fn path_of(text: &str) -> Result<&str, String> {
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    line.ok_or_else(|| "QEMU is in no cgroup of the v2 tree".to_owned())
}

/// Whether the name is one of a unit with a cgroup.
#[must_use]
pub fn is_unit(name: &str) -> bool {
    ["slice", "scope", "service"].into_iter().any(|suffix| has_suffix(name, suffix))
}

/// What a kernel before 6.7 lacks.
pub const NO_EXCLUSIVE: &str = "the kernel has no cpuset.cpus.exclusive, so it cannot partition CPUs below a slice (Linux 6.7 can)";

/// Whether the kernel knows exclusive CPUs. A group that has the controller shows it, and where
/// there is none, a file of the root group's that Linux 6.8 has. Nothing is enabled to find out: before 6.2
/// that takes the masks of all threads of the host away.
fn has_exclusive(cgroups: &dyn Cgroups) -> Result<(), String> {
    let groups = cgroups.children("").unwrap_or_default();
    let has = |group: &str, file: &str| cgroups.read(&format!("{group}/{file}")).is_ok();
    let is_known = match groups.iter().find(|group| has(group, "cpuset.cpus")) {
        Some(group) => has(group, "cpuset.cpus.exclusive"),
        None => cgroups.read("cpuset.cpus.isolated").is_ok(),
    };
    if is_known { Ok(()) } else { Err(NO_EXCLUSIVE.to_owned()) }
}

/// The unit in a `/proc/PID/cgroup`. A main thread that is in one of our groups already is taken for what
/// it is.
fn site_of(text: &str) -> Result<Site, String> {
    let path = path_of(text)?;
    let mut parts: Vec<&str> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    if !parts.iter().all(|part| is_plain(part)) {
        return Err(format!("QEMU is in a cgroup with a name that is not understood: {path}"));
    }
    let last = parts.last().copied().unwrap_or_default();
    if Group::ALL.into_iter().any(|group| group.name() == last) {
        parts.pop();
    }
    let unit = parts.last().copied().unwrap_or_default();
    if !has_suffix(unit, "scope") && !has_suffix(unit, "service") {
        return Err(match parts.iter().rev().find(|part| has_suffix(part, "scope")) {
            Some(scope) => {
                format!("QEMU is in {path}, where another program creates groups of {scope}")
            }
            None => format!("QEMU is in {path}, which is no scope or service"),
        });
    }
    let user = parts.iter().find(|part| part.starts_with("user@") && has_suffix(part, "service"));
    if let Some(user) = user {
        return Err(format!("QEMU is in {path}, which is {user}'s to manage and not the host's"));
    }
    if unit == "init.scope" || (unit.starts_with("session-") && has_suffix(unit, "scope")) {
        return Err(format!(
            "QEMU has no unit of its own, it was started in {unit}; start it with systemd-run --scope"
        ));
    }
    // systemd puts `_` before a name that the kernel would take for one of its own files.
    let name = unit.strip_prefix('_').unwrap_or(unit);
    Ok(Site { unit: name.to_owned(), cgroup: parts.join("/") })
}

/// Whether the unit holds QEMU and what serves it, and nothing else.
fn is_own(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid, site: &Site) -> Result<(), String> {
    let Site { unit, cgroup } = site;
    let unreadable = |error: io::Error| format!("{cgroup} cannot be read: {error}");
    let ours = |name: &String| Group::ALL.into_iter().any(|group| group.name() == *name);
    let children = cgroups.children(cgroup).map_err(unreadable)?;
    if let Some(other) = children.iter().find(|name| !ours(name)) {
        return Err(format!("another program has created the group {other} in {unit}"));
    }
    let text = cgroups.read(&format!("{cgroup}/cgroup.procs")).map_err(unreadable)?;
    let pids: Vec<Pid> = text.lines().filter_map(|pid| pid.parse().ok()).map(Pid).collect();
    let strangers = pids.iter().filter(|pid| **pid != process);
    for (seen, pid) in strangers.enumerate() {
        let Ok(stat) = stat::of(root, pid) else { continue };
        let is_helper = stat.is_kernel_thread()
            || stat.is_dead()
            || HELPERS.contains(&stat.comm.as_str())
            || descends(root, *pid, process);
        if !is_helper || seen >= PROCESSES_MAX {
            return Err(format!(
                "{unit} also contains process {pid} ({})",
                shown::line(&stat.comm)
            ));
        }
    }
    Ok(())
}

/// Whether QEMU started it, or what started it.
fn descends(root: &SysRoot, pid: Pid, from: Pid) -> bool {
    let parent = |pid: Pid| -> Option<Pid> {
        let status = root.read_lossy(&format!("proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        line.trim().parse().ok().map(Pid)
    };
    let above = iter::successors(parent(pid), |at| if at.0 > 1 { parent(*at) } else { None });
    above.take(8).any(|parent| parent == from)
}

/// What the kernel says of the group that the vCPUs are in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartitionFile {
    /// Where, below `/sys/fs/cgroup`.
    pub group: String,
    /// `cpuset.cpus.partition`, or why it cannot be read.
    pub state: String,
    /// `cpuset.cpus.exclusive.effective`.
    pub cpus: CpuSet,
    /// The drop-in that makes the groups ours (`Delegate=`), where it is gone.
    pub lost_drop_in: Option<String>,
}

/// What the kernel says of the vCPUs' group in this cgroup, and whether what was written to keep it is there.
#[must_use]
pub fn partition_file(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    cgroup: &str,
    drop_in: Option<&str>,
) -> PartitionFile {
    let group = Group::Vcpus.below(cgroup);
    let state = cgroups.read(&format!("{group}/cpuset.cpus.partition"));
    let state = state.map_or_else(|error| error.to_string(), |state| state.trim().to_owned());
    let cpus = set(cgroups, &group, "cpuset.cpus.exclusive.effective");
    let is_gone = |path: &&str| root.read(path).is_err_and(|error| error.is_gone());
    let lost_drop_in = drop_in.filter(is_gone).map(str::to_owned);
    PartitionFile { group, state, cpus, lost_drop_in }
}

/// The partition as it is now: a dozen small files.
///
/// # Errors
/// Where the unit's cgroup cannot be read: most likely it is gone.
pub fn partition_seen(cgroups: &dyn Cgroups, site: &Site) -> io::Result<Seen> {
    let mut seen = Seen {
        loose: threads(cgroups, &site.cgroup)?,
        levels: levels(&site.cgroup)
            .into_iter()
            .map(|level| (level.to_owned(), set(cgroups, level, "cpuset.cpus.exclusive")))
            .collect(),
        ..Seen::default()
    };
    for group in Group::ALL {
        let path = group.below(&site.cgroup);
        let kind = cgroups.read(&format!("{path}/cgroup.type"));
        if kind.is_ok_and(|kind| kind == "threaded") {
            let found = GroupSeen {
                has_cpuset: cgroups.read(&format!("{path}/cpuset.cpus")).is_ok(),
                cpus: set(cgroups, &path, "cpuset.cpus"),
                exclusive: set(cgroups, &path, "cpuset.cpus.exclusive"),
                partition: cgroups
                    .read(&format!("{path}/cpuset.cpus.partition"))
                    .unwrap_or_default(),
                threads: threads(cgroups, &path)?,
            };
            seen.groups.insert(group, found);
        }
    }
    Ok(seen)
}

/// The threads of a group.
///
/// # Errors
/// What the kernel says.
pub fn threads(cgroups: &dyn Cgroups, group: &str) -> io::Result<BTreeSet<Tid>> {
    let text = cgroups.read(&format!("{group}/cgroup.threads"))?;
    Ok(text.lines().filter_map(|tid| tid.parse().ok()).map(Tid).collect())
}

/// A cpulist of a group; none where it has no such file.
#[must_use]
pub fn set(cgroups: &dyn Cgroups, group: &str, file: &str) -> CpuSet {
    let text = cgroups.read(&format!("{group}/{file}")).unwrap_or_default();
    CpuSet::parse_cpulist(&text).unwrap_or_default()
}

/// The CPUs that cpusets leave to the process, and to kernel threads: what a thread without a mask of its
/// own may run on. A set that cannot be learnt is left out.
#[must_use]
pub fn cpuset_limits(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> Vec<CpuSet> {
    let text = root.read(&format!("proc/{process}/cgroup")).unwrap_or_default();
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let is_safe = path.split('/').all(|part| part.is_empty() || is_plain(part));
    let groups = [if is_safe { path } else { "" }, ""].into_iter();
    groups.filter_map(|group| effective(cgroups, group)).map(|(_, cpus)| cpus).collect()
}

/// The effective CPUs of a cgroup, or of the nearest one above that has cpusets, and which one that is.
pub(super) fn effective<'a>(cgroups: &dyn Cgroups, path: &'a str) -> Option<(&'a str, CpuSet)> {
    iter::successors(Some(path), |group| (!group.is_empty()).then(|| above(group))).find_map(
        |group| {
            let text = cgroups.read(&below(group, "cpuset.cpus.effective")).ok()?;
            let cpus = CpuSet::parse_cpulist(&text).ok()?;
            (!cpus.is_empty()).then_some((group, cpus))
        },
    )
}

/// The group that a group is in; of the topmost ones it is the root, the empty path.
pub(super) fn above(group: &str) -> &str {
    group.rsplit_once('/').map_or("", |(above, _)| above)
}

/// The path of a group or file in a group.
pub(super) fn below(group: &str, name: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{group}/{name}") }
}

/// Whether one of the words of a line is this one.
#[must_use]
pub fn has_word(line: &str, word: &str) -> bool {
    line.split_ascii_whitespace().any(|found| found == word)
}

fn has_suffix(name: &str, suffix: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(stem, found)| !stem.is_empty() && found == suffix)
}

/// Whether it is a name as systemd gives them (`man 5 systemd.unit`), and stays where it is.
pub fn is_plain(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    !part.is_empty() && part.len() <= 255 && part != "." && part != ".." && part.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroups::CgroupTree;
    use std::fs;
    use std::path::Path;

    fn unit_of(path: &str) -> Result<(String, String), String> {
        site_of(&format!("0::{path}\n")).map(|site| (site.unit, site.cgroup))
    }

    #[test]
    fn where_the_command_line_isolates_cpus_there_is_no_cpuset() {
        let dir = tempfile::tempdir().expect("a folder");
        write(dir.path(), "sys/fs/cgroup/cgroup.controllers", "cpuset cpu\n");
        write(dir.path(), "sys/fs/cgroup/cpuset.cpus.isolated", "\n");
        write(dir.path(), "run/systemd/system/x", "");
        let root = SysRoot::at(dir.path());
        let tree = CgroupTree::of(&root);
        assert_eq!(can_partition(&root, &tree), Ok(()));
        write(dir.path(), "proc/cmdline", "quiet isolcpus=domain,managed_irq,2-11\n");
        write(dir.path(), "sys/devices/system/cpu/isolated", "2-11\n");
        let why = can_partition(&root, &tree).expect_err("it would end that");
        assert!(why.contains("CPUs 2-11") && why.contains("isolcpus="), "{why}");
        assert_eq!(slices_site(&root, &tree, Pid(500)), Err(why));
    }

    #[test]
    fn a_unit_is_found_in_a_path() {
        let is = |path: &str, unit: &str, cgroup: &str| {
            assert_eq!(unit_of(path), Ok((unit.to_owned(), cgroup.to_owned())));
        };
        is("/qemu.slice/100.scope", "100.scope", "qemu.slice/100.scope");
        is("/qemu.slice/100.scope/emulator", "100.scope", "qemu.slice/100.scope");
        is("/system.slice/my-vm@7.service", "my-vm@7.service", "system.slice/my-vm@7.service");
        let libvirt = "/machine.slice/machine-qemu\\x2d1\\x2dwin.scope";
        is(libvirt, &libvirt[15..], &libvirt[1..]);
    }

    #[test]
    fn what_is_no_unit_of_the_vms_own_is_named() {
        for (path, word) in [
            ("/user.slice/user-0.slice/session-3.scope", "session-3.scope"),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service",
                "user@1000.service",
            ),
            ("/machine.slice/vm.scope/libvirt/emulator", "vm.scope"),
            ("/init.scope", "init.scope"),
            ("/", "not understood"),
            ("/qemu.slice", "no scope or service"),
            ("/qemu.slice/../100.scope", "not understood"),
            ("/qemu.slice/10 0.scope", "not understood"),
            ("/../../100.scope", "not understood"),
        ] {
            let error = unit_of(path).expect_err(path);
            assert!(error.contains(word), "{path}: {error}");
        }
        assert!(site_of("1:cpuset:/100.scope\n").is_err());
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, text).expect("a file");
    }

    fn stat(pid: i32, comm: &str) -> String {
        format!("{pid} ({comm}) S 1{} 7 0 0{}\n", " 0".repeat(17), " 0".repeat(30))
    }

    fn host() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = dir.path();
        fs::create_dir_all(root.join("run/systemd/system")).expect("a folder");
        write(root, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io\n");
        write(root, "sys/fs/cgroup/cpuset.cpus.isolated", "\n");
        write(root, "sys/fs/cgroup/qemu.slice/100.scope/cgroup.procs", "500\n501\n");
        write(root, "proc/500/cgroup", "0::/qemu.slice/100.scope\n");
        write(root, "proc/500/stat", &stat(500, "kvm"));
        write(root, "proc/501/stat", &stat(501, "swtpm"));
        dir
    }

    fn found(dir: &tempfile::TempDir) -> Result<Site, String> {
        let root = SysRoot::at(dir.path());
        partition_site(&root, &CgroupTree::of(&root), Pid(500))
    }

    #[test]
    fn a_scope_with_qemu_and_its_helpers_is_the_vms_own() {
        let dir = host();
        assert_eq!(found(&dir).expect("a site").unit, "100.scope");
        write(dir.path(), "proc/501/stat", &stat(501, "bash"));
        assert!(found(&dir).expect_err("a shell").contains("process 501 (bash)"));
        write(dir.path(), "proc/501/status", "Name:\tbash\nPPid:\t500\n");
        assert!(found(&dir).is_ok(), "a child of QEMU's");
        fs::create_dir(dir.path().join("sys/fs/cgroup/qemu.slice/100.scope/libvirt"))
            .expect("a folder");
        assert!(found(&dir).expect_err("groups").contains("libvirt"));
    }

    #[test]
    fn host_without_core_scheduling_is_recognised_by_its_files() {
        let dir = host();
        fs::remove_file(dir.path().join("sys/fs/cgroup/cpuset.cpus.isolated")).expect("remove");
        assert!(found(&dir).expect_err("it is not known").contains("cpuset.cpus.exclusive"));
        let slice = "sys/fs/cgroup/qemu.slice/cpuset.cpus";
        write(dir.path(), slice, "\n");
        assert!(found(&dir).expect_err("an old kernel").contains("cpuset.cpus.exclusive"));
        write(dir.path(), &format!("{slice}.exclusive"), "\n");
        assert!(found(&dir).is_ok());
        fs::remove_dir(dir.path().join("run/systemd/system")).expect("remove");
        assert!(found(&dir).expect_err("no systemd").contains("systemd"));
        write(dir.path(), "sys/fs/cgroup/cgroup.controllers", "cpu io\n");
        assert!(found(&dir).expect_err("no cpuset").contains("cpuset"));
        fs::remove_file(dir.path().join("sys/fs/cgroup/cgroup.controllers")).expect("remove");
        assert!(found(&dir).expect_err("no v2").contains("cgroup v2"));
    }

    #[test]
    fn a_partition_is_read_as_it_is() {
        let dir = host();
        let scope = "sys/fs/cgroup/qemu.slice/100.scope";
        let site = found(&dir).expect("a site");
        let tree = CgroupTree::of(&SysRoot::at(dir.path()));
        write(dir.path(), &format!("{scope}/cgroup.threads"), "500\n");
        let seen = partition_seen(&tree, &site).expect("seen");
        assert!(seen.groups.is_empty() && seen.loose.contains(&Tid(500)));
        write(dir.path(), &format!("{scope}/vcpus/cgroup.type"), "threaded\n");
        write(dir.path(), &format!("{scope}/vcpus/cgroup.threads"), "502\n503\n");
        write(dir.path(), &format!("{scope}/vcpus/cpuset.cpus"), "\n");
        write(dir.path(), &format!("{scope}/vcpus/cpuset.cpus.exclusive"), "2-3\n");
        write(dir.path(), &format!("{scope}/vcpus/cpuset.cpus.partition"), "isolated\n");
        let seen = partition_seen(&tree, &site).expect("seen");
        let vcpus = &seen.groups[&Group::Vcpus];
        assert!(vcpus.has_cpuset && vcpus.threads.len() == 2 && vcpus.partition == "isolated");
        assert_eq!(vcpus.exclusive, CpuSet::parse_cpulist("2-3").expect("cpus"));
    }
}
