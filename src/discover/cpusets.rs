//! What the cpusets of the cgroup tree leave to a VM, and which cgroups hold CPUs that it wants.
//!
//! ```text
//!   effective CPUs of the VM's cgroup        without what a partition anywhere has taken
//!   | CPUs of attached VMs                   those partitions are qmpin's own, and planned around
//!   & cpuset.cpus of each level              a limit, also where a partition could be granted CPUs past it
//! ```

use std::collections::BTreeMap;

use crate::cgroups::Cgroups;
use crate::cpuset::CpuSet;
use crate::discover::cgroup::{self, above, below, effective};
use crate::guest::Allowed;
use crate::ids::{Pid, Tid};
use crate::site::{Group, ISOLATED, Share, Site, levels};
use crate::sysroot::SysRoot;
use crate::wording::cpus_in_words;

/// The most cgroups that one search visits, and how deep it goes.
const GROUPS_MAX: usize = 4096;
const DEPTH_MAX: usize = 16;

/// How a cgroup holds CPUs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hold {
    /// `cpuset.cpus.exclusive` has them: no other cgroup beside it can.
    Exclusive,
    /// It is the root of a partition that has them.
    Partition,
    /// All CPUs of its `cpuset.cpus` are among them: many kernels refuse to take the last CPUs of a cgroup.
    AllItsCpus,
}

/// A cgroup that holds CPUs that a VM wants.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Holder {
    /// Its path below the root.
    pub cgroup: String,
    /// How it holds them.
    pub how: Hold,
    /// All CPUs that it holds in this way, as a cpulist.
    pub cpus: String,
}

impl Holder {
    fn new(cgroup: &str, how: Hold, cpus: &CpuSet) -> Holder {
        Holder { cgroup: cgroup.to_owned(), how, cpus: cpus.to_string() }
    }

    /// A clause: "rt.slice has CPUs 12-13 (cpuset.cpus)".
    #[must_use]
    pub fn in_words(&self) -> String {
        let cpus = self.cpus.parse().map_or(self.cpus.clone(), |cpus| cpus_in_words(&cpus));
        format!("{} has {cpus} ({})", self.cgroup, self.file())
    }

    /// The file that says so.
    #[must_use]
    pub fn file(&self) -> &'static str {
        match self.how {
            Hold::Exclusive => "cpuset.cpus.exclusive",
            Hold::Partition => "cpuset.cpus.partition",
            Hold::AllItsCpus => "cpuset.cpus",
        }
    }
}

/// The path of the v2 tree in a `/proc/PID/cgroup`; `None` also where it is of another namespace.
fn path_in(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?.trim_end();
    (!path.split('/').any(|part| part == "..")).then_some(path)
}

/// The cgroup of a process in the v2 tree, without a group of qmpin's own at its end.
pub(super) fn cgroup_of(root: &SysRoot, process: Pid) -> Option<String> {
    let text = root.read(&format!("proc/{process}/cgroup")).ok()?;
    let path = path_in(&text)?;
    let own = Group::ALL.into_iter().find_map(|group| path.strip_suffix(&group.below("")));
    Some(own.unwrap_or(path).to_owned())
}

/// Reads the CPUs that the VM's threads can be pinned to; `None` where these are all online CPUs, or the host
/// has no cpusets. `others` reads the CPUs of all other attached VMs; it is asked only where something is missing.
#[must_use]
pub fn allowed(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    process: Pid,
    online: &CpuSet,
    others: impl FnOnce() -> CpuSet,
) -> Option<Allowed> {
    let path = cgroup_of(root, process)?;
    let (group, effective) = effective(cgroups, &path)?;
    let own = effective | own_partition(cgroups, &path);
    let sets = levels(&path).into_iter();
    let sets: Vec<(&str, CpuSet)> =
        sets.map(|level| (level, cgroup::set(cgroups, level, "cpuset.cpus") & *online)).collect();
    let is_free = |set: &CpuSet| set.is_empty() || online.is_subset(set);
    if online.is_subset(&own) && sets.iter().all(|(_, set)| is_free(set)) {
        return None;
    }
    let others = others();
    let mut cpus = (own | others) & *online;
    let mut granted = *online;
    let mut narrowest = None;
    for (level, set) in sets {
        // The kernel ignores a set of which nothing is left by the cgroups above.
        if !(granted & set).is_empty() && !granted.is_subset(&(set | others)) {
            granted = granted & (set | others);
            narrowest = Some((level, set));
        }
    }
    cpus = cpus & granted;
    if online.is_subset(&cpus) {
        return None;
    }
    let limit = narrowest
        .map(|(level, set)| format!("{level} allows only {} (cpuset.cpus)", cpus_in_words(&set)));
    let taken = granted - cpus;
    let taken = (!taken.is_empty()).then(|| {
        named_holders(cgroups, &taken, &|cgroup| cgroup == path).unwrap_or_else(|| {
            let group = if group.is_empty() { "/" } else { group };
            format!("{group} lacks {} (cpuset.cpus.effective)", cpus_in_words(&taken))
        })
    });
    let why: Vec<String> = limit.into_iter().chain(taken).collect();
    Some(Allowed { cpus, why: why.join("; ") })
}

/// The CPUs of the VM's own partition, while it is in force.
fn own_partition(cgroups: &dyn Cgroups, path: &str) -> CpuSet {
    let vcpus = Group::Vcpus.below(path);
    match cgroups.read(&format!("{vcpus}/cpuset.cpus.partition")) {
        Ok(state) if state == ISOLATED => {
            cgroup::set(cgroups, &vcpus, "cpuset.cpus.exclusive.effective")
        }
        _ => CpuSet::EMPTY,
    }
}

/// A text that changes whenever [`allowed`] may: a few small files, for a look at every pass.
#[must_use]
pub fn allowed_mark(root: &SysRoot, cgroups: &dyn Cgroups, process: Pid) -> String {
    let Some(path) = cgroup_of(root, process) else { return String::new() };
    let effective = effective(cgroups, &path).map(|(_, cpus)| cpus.to_string());
    let sets = levels(&path).into_iter().map(|level| {
        cgroups.read(&format!("{level}/cpuset.cpus")).unwrap_or_default().replace(';', "")
    });
    effective.into_iter().chain(sets).collect::<Vec<_>>().join(";")
}

/// Names the cgroup because of which the kernel refuses to run a thread on any of these CPUs, in a clause; `None`
/// where no cgroup does. A group of a partition is no cause: what it has is what the plan gave it.
#[must_use]
pub fn forbidden_by(
    root: &SysRoot,
    cgroups: &dyn Cgroups,
    process: Pid,
    thread: Tid,
    wanted: &CpuSet,
) -> Option<String> {
    let text = root.read(&format!("proc/{process}/task/{thread}/cgroup")).ok()?;
    let v1 = text.lines().find_map(|line| line.split_once(":cpuset:").map(|(_, path)| path));
    if let Some(path) = v1.filter(|path| *path != "/") {
        return Some(format!("the cpuset {path} (cgroup v1) does not allow it"));
    }
    let path = path_in(&text)?;
    let lacks = |group: &str| {
        let found = effective(cgroups, group).filter(|(at, _)| *at == group)?;
        (!found.1.intersects(wanted)).then_some(found.1)
    };
    if lacks("").is_some() {
        return named_holders(cgroups, wanted, &|_| false);
    }
    levels(path).into_iter().find_map(|level| {
        let has = lacks(level)?;
        Some(format!("{level} allows only {} (cpuset.cpus.effective)", cpus_in_words(&has)))
    })
}

/// Finds the cgroups that conflict with a partition of these CPUs at this site. `shares` are the partitions of
/// other VMs, which are no conflict: the plan is around them. `before` are the limits of cgroups before qmpin
/// changed them: these count, because they are restored.
#[must_use]
pub fn conflicts(
    cgroups: &dyn Cgroups,
    site: &Site,
    cpus: &CpuSet,
    shares: &[Share],
    before: &BTreeMap<String, CpuSet>,
) -> Vec<Holder> {
    let ours = levels(&site.cgroup);
    let is_ours = |cgroup: &str| {
        ours.contains(&cgroup)
            || is_within(cgroup, &site.cgroup)
            || shares.iter().any(|share| is_within(cgroup, &share.cgroup))
    };
    let mut found = holders(cgroups, cpus, &is_ours);
    let all = shares.iter().fold(*cpus, |all, share| all | share.cpus);
    for level in &ours {
        let above = above(level);
        for name in cgroups.children(above).unwrap_or_default() {
            let beside = below(above, &name);
            let now = || cgroup::set(cgroups, &beside, "cpuset.cpus");
            let set = before.get(&beside).copied().unwrap_or_else(now);
            let is_known = found.iter().any(|holder| holder.cgroup == beside);
            if !is_ours(&beside) && !is_known && set.intersects(cpus) && set.is_subset(&all) {
                found.push(Holder::new(&beside, Hold::AllItsCpus, &set));
            }
        }
    }
    found
}

/// Names what [`holders`] finds, in clauses; `None` where it finds none.
fn named_holders(
    cgroups: &dyn Cgroups,
    cpus: &CpuSet,
    skip: &dyn Fn(&str) -> bool,
) -> Option<String> {
    let found: Vec<String> = holders(cgroups, cpus, skip).iter().map(Holder::in_words).collect();
    (!found.is_empty()).then(|| found.join(", "))
}

/// Finds the cgroups that have some of these CPUs to themselves: the highest of each branch.
fn holders(cgroups: &dyn Cgroups, cpus: &CpuSet, skip: &dyn Fn(&str) -> bool) -> Vec<Holder> {
    let mut found = Vec::new();
    visit(cgroups, &mut |group, _| {
        let held = if skip(group) { None } else { held_by(cgroups, group, cpus) };
        let below = if held.is_some() { Below::Skip } else { Below::Visit };
        found.extend(held);
        below
    });
    found.sort_unstable();
    found
}

/// How a cgroup has some of these CPUs to itself.
pub(super) fn held_by(cgroups: &dyn Cgroups, group: &str, cpus: &CpuSet) -> Option<Holder> {
    let exclusive = cgroup::set(cgroups, group, "cpuset.cpus.exclusive");
    if exclusive.intersects(cpus) {
        return Some(Holder::new(group, Hold::Exclusive, &exclusive));
    }
    let state = cgroups.read(&format!("{group}/cpuset.cpus.partition"));
    if !state.is_ok_and(|state| state == ISOLATED || state == "root") {
        return None;
    }
    let set = cgroup::set(cgroups, group, "cpuset.cpus.effective");
    set.intersects(cpus).then(|| Holder::new(group, Hold::Partition, &set))
}

/// Whether a search goes on in a cgroup.
pub(super) enum Below {
    Visit,
    Skip,
}

/// Visits the cgroups that have cpusets, the higher ones first, with what each asks for (`cpuset.cpus`).
pub(super) fn visit(cgroups: &dyn Cgroups, see: &mut dyn FnMut(&str, CpuSet) -> Below) {
    let mut left = vec![(String::new(), 0)];
    let mut visited = 0;
    while let Some((group, depth)) = left.pop() {
        visited += 1;
        if visited > GROUPS_MAX {
            break;
        }
        if !group.is_empty() {
            let cpus = cgroups.read(&format!("{group}/cpuset.cpus"));
            let set = cpus.as_ref().ok().and_then(|text| text.parse().ok()).unwrap_or_default();
            // Groups in one without the controller do not have it, either.
            if matches!(see(&group, set), Below::Skip) || cpus.is_err() {
                continue;
            }
        }
        if depth < DEPTH_MAX {
            let children = cgroups.children(&group).unwrap_or_default().into_iter();
            left.extend(children.map(|name| (below(&group, &name), depth + 1)));
        }
    }
}

pub(super) fn is_within(cgroup: &str, above: &str) -> bool {
    cgroup.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::cgroups::CgroupTree;

    fn cpus(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, format!("{text}\n")).expect("a file");
    }

    /// A host of 24 CPUs with QEMU in `qemu.slice/100.scope`, and these files below `/sys/fs/cgroup`.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        write(dir.path(), "proc/500/cgroup", "0::/qemu.slice/100.scope");
        write(dir.path(), "sys/fs/cgroup/cpuset.cpus.effective", "0-23");
        for (path, text) in files {
            write(dir.path(), &format!("sys/fs/cgroup/{path}"), text);
        }
        dir
    }

    fn found(dir: &tempfile::TempDir, others: &str) -> Option<(String, String)> {
        let root = SysRoot::at(dir.path());
        let tree = CgroupTree::of(&root);
        let allowed = allowed(&root, &tree, Pid(500), &cpus("0-23"), || cpus(others))?;
        Some((allowed.cpus.to_string(), allowed.why))
    }

    #[test]
    fn without_a_limit_nothing_is_reported() {
        assert_eq!(found(&host(&[]), ""), None);
        let all = host(&[
            ("qemu.slice/cpuset.cpus", ""),
            ("qemu.slice/100.scope/cpuset.cpus", "0-23"),
            ("qemu.slice/100.scope/cpuset.cpus.effective", "0-23"),
        ]);
        assert_eq!(found(&all, ""), None);
    }

    #[test]
    fn a_limit_of_the_scope_or_of_a_slice_is_named_with_its_cpus() {
        let scope = host(&[
            ("qemu.slice/cpuset.cpus", ""),
            ("qemu.slice/100.scope/cpuset.cpus", "2-9"),
            ("qemu.slice/100.scope/cpuset.cpus.effective", "2-9"),
        ]);
        let why = "qemu.slice/100.scope allows only CPUs 2-9 (cpuset.cpus)".to_owned();
        assert_eq!(found(&scope, ""), Some(("2-9".to_owned(), why)));
        // The scope itself has no cpusets.
        let slice = host(&[
            ("qemu.slice/cpuset.cpus", "0-15"),
            ("qemu.slice/cpuset.cpus.effective", "0-15"),
        ]);
        let why = "qemu.slice allows only CPUs 0-15 (cpuset.cpus)".to_owned();
        assert_eq!(found(&slice, ""), Some(("0-15".to_owned(), why)));
    }

    #[test]
    fn a_partition_of_the_vm_or_of_a_neighbour_is_no_limit() {
        let dir = host(&[
            ("cpuset.cpus.effective", "0-7,20-23"),
            ("qemu.slice/cpuset.cpus.effective", "0-7,20-23"),
            ("qemu.slice/100.scope/cpuset.cpus", "0-23"),
            ("qemu.slice/100.scope/cpuset.cpus.effective", "0-7,20-23"),
            ("qemu.slice/100.scope/vcpus/cpuset.cpus.partition", "isolated"),
            ("qemu.slice/100.scope/vcpus/cpuset.cpus.exclusive.effective", "12-19"),
        ]);
        write(dir.path(), "proc/500/cgroup", "0::/qemu.slice/100.scope/emulator");
        assert_eq!(found(&dir, "8-11"), None);
        // An administrator's limit counts although the partition is past it.
        write(dir.path(), "sys/fs/cgroup/qemu.slice/cpuset.cpus", "0-15");
        let (left, why) = found(&dir, "8-11").expect("a limit");
        assert_eq!((left.as_str(), why.contains("qemu.slice allows")), ("0-15", true), "{why}");
    }

    #[test]
    fn a_partition_of_another_program_is_named() {
        let dir = host(&[
            ("cpuset.cpus.effective", "0-11,14-23"),
            ("rt.slice/cpuset.cpus", ""),
            ("rt.slice/cpuset.cpus.exclusive", "12-13"),
            ("rt.slice/cpuset.cpus.partition", "isolated"),
        ]);
        let why = "rt.slice has CPUs 12-13 (cpuset.cpus.exclusive)".to_owned();
        assert_eq!(found(&dir, ""), Some(("0-11,14-23".to_owned(), why)));
    }

    #[test]
    fn a_conflict_is_a_cgroup_whose_cpus_a_partition_would_take() {
        let dir = host(&[
            ("qemu.slice/cpuset.cpus.exclusive", "8-11"),
            ("qemu.slice/101.scope/cpuset.cpus", "8-11"),
            ("qemu.slice/101.scope/cpuset.cpus.exclusive", "8-11"),
            ("rt.slice/cpuset.cpus", "11-12"),
            ("rt.slice/deep/cpuset.cpus.exclusive", "13"),
            ("system.slice/cpuset.cpus", "0-13"),
            ("elsewhere.slice/cpuset.cpus.exclusive", "4"),
        ]);
        let tree = CgroupTree::of(&SysRoot::at(dir.path()));
        let site = Site { unit: "100.scope".to_owned(), cgroup: "qemu.slice/100.scope".to_owned() };
        let vm = "101".parse().expect("a name");
        let cgroup = "qemu.slice/101.scope".to_owned();
        let shares = [Share { vm, cgroup, cpus: cpus("8-11") }];
        let mut before = BTreeMap::new();
        let found = |list: &str, before: &_| conflicts(&tree, &site, &cpus(list), &shares, before);
        let words: Vec<String> = found("12-19", &before).iter().map(Holder::in_words).collect();
        assert_eq!(
            words,
            [
                "rt.slice/deep has CPU 13 (cpuset.cpus.exclusive)",
                "rt.slice has CPUs 11-12 (cpuset.cpus)"
            ]
        );
        assert_eq!(found("14-19", &before), []);
        // What qmpin has limited it to meanwhile does not count.
        before.insert("rt.slice".to_owned(), cpus("14-15"));
        assert_eq!(found("14-19", &before).len(), 1);
    }

    #[test]
    fn a_refused_pin_names_the_cgroup_that_forbids_it() {
        let dir = host(&[
            ("qemu.slice/cpuset.cpus.effective", "0-23"),
            ("qemu.slice/100.scope/cpuset.cpus.effective", "2-9"),
        ]);
        let root = SysRoot::at(dir.path());
        let named = |wanted: &str| {
            let tree = CgroupTree::of(&root);
            forbidden_by(&root, &tree, Pid(500), Tid(501), &cpus(wanted))
        };
        let path = "proc/500/task/501/cgroup";
        write(dir.path(), path, "0::/qemu.slice/100.scope");
        let why = "qemu.slice/100.scope allows only CPUs 2-9 (cpuset.cpus.effective)";
        assert_eq!(named("12"), Some(why.to_owned()));
        assert_eq!(named("2"), None);
        write(dir.path(), path, "5:cpuset:/vms/100\n0::/");
        assert!(named("12").is_some_and(|why| why.contains("the cpuset /vms/100")));
        write(dir.path(), path, "0::/../../100.scope");
        assert_eq!(named("12"), None, "of another namespace");
    }

    #[test]
    fn the_mark_changes_with_every_level() {
        let dir = host(&[("qemu.slice/cpuset.cpus", ""), ("qemu.slice/100.scope/cpuset.cpus", "")]);
        let root = SysRoot::at(dir.path());
        let mark = || allowed_mark(&root, &CgroupTree::of(&root), Pid(500));
        let mut seen = vec![mark()];
        for (file, text) in [
            ("cpuset.cpus.effective", "0-22"),
            ("qemu.slice/cpuset.cpus", "0-15"),
            ("qemu.slice/100.scope/cpuset.cpus", "0-15"),
        ] {
            write(dir.path(), &format!("sys/fs/cgroup/{file}"), text);
            assert!(!seen.contains(&mark()), "{file}");
            seen.push(mark());
        }
    }
}
