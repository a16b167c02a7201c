//! The knob *needs*: which kind of cores, and which cache, a VM is to have. A need is a word that is right on
//! every machine: where all cores or caches are alike, all of them meet it.
//!
//! | `cores` | `cache` | |
//! |---|---|---|
//! | `any` | `any` | the fast ones and the large one first |
//! | `performance` | `large` | those alone |
//! | `efficiency` | `ordinary` | the others alone: those are left to other VMs |

use std::fmt::Display;

use super::machine::Group;
use super::report::Finding;
use crate::cpuset::CpuSet;
use crate::policy::{CacheNeed, CoreNeed, CpuChoice, Sourced, VmPolicy};
use crate::topology::CoreKind;

/// Takes the cores away that do not meet the VM's needs. CPUs that are given by hand are taken as they are.
pub(super) fn restrict(groups: &mut [Group<'_>], vm: &VmPolicy) {
    if vm.vcpus.value != CpuChoice::Auto {
        return;
    }
    let meets = Needs::of(groups, vm);
    for group in groups.iter_mut().filter(|group| !(meets.cores(group) && meets.cache(group))) {
        group.free.clear();
    }
}

/// What is said of the needs that were named.
pub(super) fn findings(groups: &[Group<'_>], vm: &VmPolicy, used: &CpuSet) -> Vec<Finding> {
    let meets = Needs::of(groups, vm);
    let by_hand = match vm.vcpus.value {
        CpuChoice::Auto => None,
        CpuChoice::Cpus(_) | CpuChoice::InOrder(_) | CpuChoice::Float(_) => Some(&vm.vcpus.origin),
    };
    let finding = |rule, wish: String, differ: bool, met: &dyn Fn(&Group<'_>) -> bool| {
        let unmet = groups.iter().any(|group| group.cpus.intersects(used) && !met(group));
        match by_hand {
            _ if !differ => Finding::met(rule, format!("{wish}: all of this machine are alike")),
            Some(origin) if unmet => Finding::degraded(
                rule,
                format!("{wish}: the CPUs given by hand ({origin}) are others"),
            ),
            _ => Finding::met(rule, format!("{wish}: the vCPUs have no others")),
        }
    };
    let mut findings = Vec::new();
    if vm.cores.value != CoreNeed::Any {
        let wish = in_words("cores", &vm.cores);
        findings.push(finding("cores-need", wish, meets.kinds_differ, &|group| meets.cores(group)));
    }
    if vm.cache.value != CacheNeed::Any {
        let wish = in_words("cache", &vm.cache);
        findings
            .push(finding("cache-need", wish, meets.caches_differ, &|group| meets.cache(group)));
    }
    findings
}

/// The needs that leave cores out, for a message about too few; empty where none does.
pub(super) fn in_force(groups: &[Group<'_>], vm: &VmPolicy) -> Vec<String> {
    let needs = Needs::of(groups, vm);
    if vm.vcpus.value != CpuChoice::Auto {
        return Vec::new();
    }
    let mut words = Vec::new();
    if groups.iter().any(|group| !needs.cores(group)) {
        words.push(in_words("cores", &vm.cores));
    }
    if groups.iter().any(|group| !needs.cache(group)) {
        words.push(in_words("cache", &vm.cache));
    }
    words
}

fn in_words<T: Display>(key: &str, from: &Sourced<T>) -> String {
    format!("{key} = \"{}\" ({})", from.value, from.origin)
}

struct Needs {
    cores: CoreNeed,
    cache: CacheNeed,
    kinds_differ: bool,
    caches_differ: bool,
}

impl Needs {
    fn of(groups: &[Group<'_>], vm: &VmPolicy) -> Needs {
        let differ =
            |is: &dyn Fn(&Group<'_>) -> bool| groups.iter().any(is) && !groups.iter().all(is);
        Needs {
            cores: vm.cores.value,
            cache: vm.cache.value,
            kinds_differ: differ(&|group| group.kind == Some(CoreKind::Efficiency)),
            caches_differ: differ(&|group| group.large_cache),
        }
    }

    fn cores(&self, group: &Group<'_>) -> bool {
        let is_small = group.kind == Some(CoreKind::Efficiency);
        match self.cores {
            CoreNeed::Performance => !(self.kinds_differ && is_small),
            CoreNeed::Efficiency => !self.kinds_differ || is_small,
            CoreNeed::Any => true,
        }
    }

    fn cache(&self, group: &Group<'_>) -> bool {
        match self.cache {
            CacheNeed::Large => !self.caches_differ || group.large_cache,
            CacheNeed::Ordinary => !(self.caches_differ && group.large_cache),
            CacheNeed::Any => true,
        }
    }
}
