//! Splits the online CPUs into groups, asking as few of them as will do.
//!
//! *The short way*: the lowest CPU not yet in a group is asked for its group; of groups larger than
//! two, the highest member is asked as well. That is enough where the kernel is consistent, and it is
//! by construction: it links two CPUs in both directions at once (`link_mask` in
//! `arch/x86/kernel/smpboot.c`, `cache_shared_cpu_map_setup` in `drivers/base/cacheinfo.c`). A file
//! that does not name its own CPU, that names an offline one, two groups that overlap or two members
//! that differ end the short way.
//!
//! *The careful way*: everyone is asked, and a group stands when all its members say the same. The
//! others are not known. A CPU that says nothing belongs to the one group that names it, if any; one
//! that names itself alone has no CPU to confirm it, so no other CPU may name it.
//!
//! One lie gets through: of two siblings the lower is believed and the upper not asked, since asking
//! would double the work for every healthy machine.

use super::attribute::{Notes, Why};
use super::{CPU, attribute};
use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::sysroot::SysRoot;

/// What can be asked which CPUs are in the group of one.
pub(super) trait Witness {
    /// The group as `cpu` reports it.
    fn ask(&mut self, cpu: CpuId) -> Result<CpuSet, Why>;

    /// The group as `cpu` reports it, where the one asked last is known to be in it too.
    fn ask_another(&mut self, cpu: CpuId) -> Result<CpuSet, Why> {
        self.ask(cpu)
    }
}

/// A cpulist in `cpuN/topology`, which has an older name on kernels before 5.3.
pub(super) struct ListWitness<'a> {
    root: &'a SysRoot,
    name: &'static str,
    old_name: Option<&'static str>,
    /// Whole architectures do without the file: the first CPU's answer then holds for all.
    optional: bool,
    lacking: Option<Why>,
}

impl<'a> ListWitness<'a> {
    pub(super) fn cores(root: &'a SysRoot) -> ListWitness<'a> {
        ListWitness::new(root, "core_cpus_list", Some("thread_siblings_list"))
    }

    pub(super) fn packages(root: &'a SysRoot) -> ListWitness<'a> {
        ListWitness::new(root, "package_cpus_list", Some("core_siblings_list"))
    }

    pub(super) fn dies(root: &'a SysRoot) -> ListWitness<'a> {
        ListWitness { optional: true, ..ListWitness::new(root, "die_cpus_list", None) }
    }

    fn new(
        root: &'a SysRoot,
        name: &'static str,
        old_name: Option<&'static str>,
    ) -> ListWitness<'a> {
        ListWitness { root, name, old_name, optional: false, lacking: None }
    }

    /// Whether this machine has no such file at all.
    pub(super) fn is_lacking(&self) -> bool {
        self.lacking.is_some()
    }

    fn read(&self, cpu: CpuId, name: &str) -> Result<CpuSet, Why> {
        attribute::cpulist(self.root, &format!("{CPU}/cpu{cpu}/topology/{name}"))
    }
}

impl Witness for ListWitness<'_> {
    fn ask(&mut self, cpu: CpuId) -> Result<CpuSet, Why> {
        if let Some(why) = &self.lacking {
            return Err(why.clone());
        }
        let why = match self.read(cpu, self.name) {
            Err(why) if why.absent => why,
            answer => {
                self.optional = false;
                return answer;
            }
        };
        if let Some(old_name) = self.old_name
            && let Ok(set) = self.read(cpu, old_name)
        {
            (self.name, self.old_name) = (old_name, Some(self.name));
            return Ok(set);
        }
        if self.optional {
            self.lacking = Some(why.clone());
        }
        Err(why)
    }
}

/// Splits the online CPUs; the groups are disjoint, not empty, and in the order of their first CPUs.
/// Of the CPUs that are in none, `notes` says why `subject` is not known.
pub(super) fn split(
    subject: &'static str,
    online: &CpuSet,
    witness: &mut impl Witness,
    notes: &mut Notes,
) -> Vec<CpuSet> {
    let mut groups = the_short_way(online, witness)
        .unwrap_or_else(|| the_careful_way(subject, online, witness, notes));
    let known = groups.sets.iter().fold(CpuSet::EMPTY, |known, group| known | *group);
    for (cpu, why) in groups.silent {
        if !known.contains(cpu) {
            notes.add_cpu(subject, cpu, why);
        }
    }
    groups.sets.sort_unstable_by_key(CpuSet::first);
    groups.sets
}

struct Groups {
    sets: Vec<CpuSet>,
    silent: Vec<(CpuId, Why)>,
}

/// `None` where two answers contradict each other.
fn the_short_way(online: &CpuSet, witness: &mut impl Witness) -> Option<Groups> {
    let mut groups = Groups { sets: Vec::new(), silent: Vec::new() };
    let mut placed = CpuSet::EMPTY;
    for cpu in online.iter() {
        if placed.contains(cpu) {
            continue;
        }
        let group = match witness.ask(cpu) {
            Ok(group) => group,
            Err(why) => {
                groups.silent.push((cpu, why));
                continue;
            }
        };
        let plausible =
            group.contains(cpu) && group.is_subset(online) && !group.intersects(&placed);
        if !plausible {
            return None;
        }
        if group.len() > 2
            && let Some(last) = group.iter().last()
            && witness.ask_another(last).is_ok_and(|other| other != group)
        {
            return None;
        }
        placed |= group;
        groups.sets.push(group);
    }
    Some(groups)
}

fn the_careful_way(
    subject: &'static str,
    online: &CpuSet,
    witness: &mut impl Witness,
    notes: &mut Notes,
) -> Groups {
    let mut groups = Groups { sets: Vec::new(), silent: Vec::new() };
    let mut claims: Vec<(CpuId, CpuSet)> = Vec::new();
    for cpu in online.iter() {
        match witness.ask(cpu) {
            Err(why) => groups.silent.push((cpu, why)),
            Ok(claim) => {
                if !claim.is_subset(online) {
                    let extra = claim - *online;
                    let what = format!("{subject} among offline CPUs");
                    let why = format!("CPU {cpu} names {claim}, of which {extra} are not online");
                    notes.add(what, Why::new(why));
                }
                claims.push((cpu, claim & *online));
            }
        }
    }
    let mut placed = CpuSet::EMPTY;
    for (cpu, claim) in &claims {
        if placed.contains(*cpu) {
            continue;
        }
        match objection(*cpu, claim, &claims) {
            None => {
                placed |= *claim;
                groups.sets.push(*claim);
            }
            Some(reason) => notes.add_cpu(subject, *cpu, Why::new(reason)),
        }
    }
    groups
}

/// What speaks against the group that `cpu` claims: itself, a member that says otherwise, or another
/// CPU that claims a member which no other CPU of the group has confirmed.
fn objection(cpu: CpuId, claim: &CpuSet, claims: &[(CpuId, CpuSet)]) -> Option<String> {
    if !claim.contains(cpu) {
        return Some(format!("CPU {cpu} says {claim}, which does not name itself"));
    }
    let speakers: CpuSet = claims.iter().map(|(speaker, _)| *speaker).collect();
    let unconfirmed = if claim.len() == 1 { *claim } else { *claim - speakers };
    claims.iter().find_map(|(other, said)| {
        let concerned = claim.contains(*other) || said.intersects(&unconfirmed);
        (concerned && said != claim)
            .then(|| format!("CPU {cpu} says {claim} and CPU {other} says {said}"))
    })
}
