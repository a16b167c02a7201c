//! The knob *housekeeping*: which CPUs are the host's, where helpers may meet, what other VMs have;
//! and the check of every set that was given by hand.

use super::machine::Group;
use super::{Lasts, PlanError, Request, allowed, fixed, helpers, iothreads, promised};
use crate::cpuset::CpuSet;
use crate::ids::IothreadId;
use crate::policy::{CpuChoice, Origin, Sourced};
use crate::wording::{cpus_in_words, listed};

/// Who has a claim on which CPUs, before this VM gets any.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claims {
    /// Every online CPU.
    pub(super) online: CpuSet,
    /// Those of them that the VM's cgroup allows it.
    pub(super) allowed: CpuSet,
    /// The host's: never a vCPU's.
    pub(super) reserved: CpuSet,
    /// Where helpers of all VMs may meet: never a vCPU's. Empty: not set.
    pub(super) shared: CpuSet,
    /// Kept for this VM's helpers, where the CPUs that it is allowed have none of the host's: never a vCPU's.
    pub(super) kept: CpuSet,
    /// Other VMs', by whole cores.
    pub(super) others: CpuSet,
    /// Other programs', which the kernel keeps from a VM.
    pub(super) hard: CpuSet,
}

/// The CPUs of emulator or iothreads, and how they were found.
#[derive(Clone, Debug)]
pub(super) struct Helpers {
    pub(super) cpus: CpuSet,
    pub(super) found: Found,
}

#[derive(Clone, Debug)]
pub(super) enum Found {
    ByRule(helpers::Away),
    ByHand(Origin),
}

impl Claims {
    /// Gathers the claims and checks the policy against the machine.
    ///
    /// # Errors
    /// [`PlanError::Policy`] for CPUs by hand that are absent, offline, or another owner's by policy;
    /// [`PlanError::Infeasible`] for CPUs by hand that another VM has.
    pub(super) fn gather(request: &Request<'_>) -> Result<Claims, PlanError> {
        let topology = request.machine.topology;
        let host = &request.policy.host;
        let online = request.machine.online;
        let others = request.machine.whole_cores(&request.neighbours.exclusive());
        let mut reserved = match host.reserved.value.cpus() {
            None => topology.cores.first().map_or(CpuSet::EMPTY, |core| core.cpus),
            Some(cpus) => {
                check_online(request, &online, "[host] reserved", &cpus, &host.reserved.origin)?;
                cpus
            }
        };
        let hard = request.surroundings.promises.hard();
        let taken = others | request.machine.whole_cores(&hard);
        if reserved.is_subset(&taken) {
            // VMs that came under an older policy, or a partition, have it all, and the host needs a core.
            let left = topology.cores.iter().find(|core| !core.cpus.intersects(&taken));
            reserved = left.map_or(reserved, |core| core.cpus);
        }
        let shared = host.shared.value.unwrap_or(CpuSet::EMPTY);
        check_online(request, &online, "[host] shared", &shared, &host.shared.origin)?;
        let allowed = allowed::cpus(request);
        let kept = allowed::kept_for_helpers(request, &(reserved | shared), &taken);
        let claims = Claims { online, allowed, reserved, shared, kept, others, hard };
        if let Some(cpus) = request.policy.vm.vcpus.value.cpus() {
            claims.check_vcpus(request, "vcpus", &request.policy.vm.vcpus, &cpus)?;
        }
        for (IothreadId(id), cpus) in &request.policy.vm.iothread_cpus {
            let key = format!("[iothread.{id}] cpu");
            check_online(request, &claims.online, &key, &cpus.value, &cpus.origin)?;
            let choice = cpus.clone().map(CpuChoice::Cpus);
            claims.check_by_hand(request, &key, &cpus.value, &cpus.value, &choice)?;
        }
        Ok(claims)
    }

    /// The CPUs that no vCPU of this VM gets.
    pub(super) fn never(&self) -> CpuSet {
        self.reserved | self.shared | self.kept | self.others | self.hard
    }

    /// Checks CPUs that vCPUs have by hand under this key.
    ///
    /// # Errors
    /// As [`Claims::gather`].
    pub(super) fn check_vcpus(
        &self,
        request: &Request<'_>,
        key: &str,
        choice: &Sourced<CpuChoice>,
        cpus: &CpuSet,
    ) -> Result<(), PlanError> {
        let origin = &choice.origin;
        check_online(request, &self.online, key, cpus, origin)?;
        let cores = request.machine.whole_cores(cpus);
        for (owner, theirs, instead) in [
            (
                "the host ([host] reserved)",
                self.reserved,
                "choose others, or name other CPUs in [host] reserved of qmpin.toml",
            ),
            (
                "the helpers of all VMs ([host] shared)",
                self.shared,
                "choose others, or take them out of [host] shared in qmpin.toml",
            ),
        ] {
            if !cores.intersects(&theirs) {
                continue;
            }
            let (clash, verb) = match *cpus & theirs {
                direct if direct.len() == 1 => (direct, "belongs to"),
                direct if !direct.is_empty() => (direct, "belong to"),
                _ => {
                    let beside = *cpus & request.machine.whole_cores(&(cores & theirs));
                    (
                        beside,
                        if beside.len() == 1 { "shares a core with" } else { "share cores with" },
                    )
                }
            };
            let reason =
                format!("{key} = \"{cpus}\": {} {verb} {owner}; {instead}", cpus_in_words(&clash));
            let lasts = Lasts::ForGood;
            return Err(PlanError::Policy { origin: origin.clone(), reason, lasts });
        }
        self.check_by_hand(request, key, cpus, &cores, choice)
    }

    /// Checks that no CPU of a set by hand, nor a sibling of one, is another VM's, and that the VM is allowed all of
    /// them.
    fn check_by_hand(
        &self,
        request: &Request<'_>,
        key: &str,
        cpus: &CpuSet,
        taken: &CpuSet,
        choice: &Sourced<CpuChoice>,
    ) -> Result<(), PlanError> {
        let what = format!("{}: {key} = \"{}\"", choice.origin, choice.value);
        if !cpus.intersects(&self.others) {
            promised::check(request, &what, taken)?;
            return allowed::check(request, &what, cpus);
        }
        let mut clashes = Vec::new();
        let mut owners = Vec::new();
        for other in request.neighbours.iter() {
            let direct = *cpus & other.exclusive;
            let beside = (*cpus & request.machine.whole_cores(&other.exclusive)) - other.exclusive;
            if direct.is_empty() && beside.is_empty() {
                continue;
            }
            owners.push(other.vm.clone());
            if !direct.is_empty() {
                let belong = if direct.len() == 1 { "belongs" } else { "belong" };
                clashes.push(format!("{} {belong} to VM {}", cpus_in_words(&direct), other.vm));
            }
            if !beside.is_empty() {
                let are = if beside.len() == 1 {
                    "is the sibling half"
                } else {
                    "are the sibling halves"
                };
                let theirs = request.machine.whole_cores(&beside) & other.exclusive;
                clashes.push(format!(
                    "{} {are} of VM {}'s {theirs}",
                    cpus_in_words(&beside),
                    other.vm
                ));
            }
        }
        let names: Vec<&str> = owners.iter().map(|vm| vm.as_str()).collect();
        let halves = if clashes.iter().any(|clash| clash.contains("sibling")) {
            ", and whole cores are not shared"
        } else {
            ""
        };
        let reason = format!(
            "{what}: {}{halves}; choose others, or detach VM {}",
            listed(&clashes, 3, ", "),
            listed(&names, 3, " and VM "),
        );
        Err(PlanError::Infeasible { reason, nearest: None, waits_for: owners })
    }

    /// The CPUs for emulator threads or iothreads.
    ///
    /// # Errors
    /// As [`Claims::gather`], and [`PlanError::Infeasible`] where no housekeeping CPU is left.
    pub(super) fn helpers(
        &self,
        request: &Request<'_>,
        groups: &[Group<'_>],
        key: &'static str,
        choice: &Sourced<CpuChoice>,
        exclusive: &CpuSet,
        housekeeping: &CpuSet,
    ) -> Result<Helpers, PlanError> {
        if let Some(cpus) = choice.value.cpus() {
            check_online(request, &self.online, key, &cpus, &choice.origin)?;
            self.check_by_hand(request, key, &cpus, &cpus, choice)?;
            return Ok(Helpers { cpus, found: Found::ByHand(choice.origin.clone()) });
        }
        let rest = promised::but_isolated(request, (*housekeeping & self.allowed) - self.hard);
        let shared = self.shared & rest;
        let pool = if shared.is_empty() { rest } else { shared };
        let (cpus, away) = helpers::choose(request, groups, exclusive, &pool).ok_or_else(|| {
            PlanError::Infeasible {
                reason: format!(
                    "no housekeeping CPU is left for {key}: the VM has {}, other VMs {}{}",
                    cpus_in_words(exclusive),
                    cpus_in_words(&self.others),
                    request.allowed().map_or(String::new(), |limit| format!("; {}", limit.why))
                ),
                nearest: None,
                waits_for: request.neighbours.names(),
            }
        })?;
        Ok(Helpers { cpus, found: Found::ByRule(away) })
    }
}

/// The cores that helpers, or vCPUs that are not plugged, were given by hand, and vCPUs leave to them where they can:
/// not those that vCPUs have already, and none where the vCPUs' CPUs are by hand, too.
pub(super) fn spared(request: &Request<'_>) -> CpuSet {
    let vm = &request.policy.vm;
    if vm.vcpus.value != CpuChoice::Auto {
        return CpuSet::EMPTY;
    }
    let mut spared = CpuSet::EMPTY;
    spared |= iothreads::taken_by_hand(request) | fixed::of_absent(request);
    for choice in [&vm.emulator.value, &vm.iothreads.value.cpus] {
        spared |= choice.cpus().unwrap_or(CpuSet::EMPTY);
    }
    let held: CpuSet = request.held.values().copied().collect();
    request.machine.whole_cores(&spared) - request.machine.whole_cores(&held)
}

fn check_online(
    request: &Request<'_>,
    online: &CpuSet,
    key: &str,
    cpus: &CpuSet,
    origin: &Origin,
) -> Result<(), PlanError> {
    let missing = *cpus - *online;
    if missing.is_empty() {
        return Ok(());
    }
    let present: CpuSet = request.machine.topology.cpus.iter().map(|cpu| cpu.id).collect();
    let absent = missing - present;
    let (which, what, lasts) = if absent.is_empty() {
        (missing, "offline", Lasts::WhileOffline)
    } else {
        (absent, "not in this machine", Lasts::ForGood)
    };
    let verb = if which.len() == 1 { "is" } else { "are" };
    let reason = format!(
        "{key} = \"{cpus}\": {} {verb} {what}; online are {}",
        cpus_in_words(&which),
        online
    );
    Err(PlanError::Policy { origin: origin.clone(), reason, lasts })
}
