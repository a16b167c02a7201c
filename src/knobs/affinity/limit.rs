//! What the rest of the host leaves to the VM: the CPUs that its own cgroup allows it, read for each plan and compared
//! in each pass; and what others were promised, read where no lock is held, because that reads every thread of the
//! host.

use std::collections::{BTreeMap, BTreeSet};

use crate::cpuset::CpuSet;
use crate::devices::Device;
use crate::discover::{self, cpusets};
use crate::guest::Allowed;
use crate::ids::NodeId;
use crate::knobs::affinity::diff::MaskStep;
use crate::knobs::ground::{Ground, Host};
use crate::knobs::partition::keep::known;
use crate::leases::StateDir;
use crate::promises::{Displaced, Promises, Surroundings};
use crate::threads::ThreadKey;
use crate::wording::{counted, cpus_in_words};

/// What the rest of the host leaves to the VM.
#[derive(Debug, Default)]
pub(crate) struct Limit {
    surroundings: Surroundings,
    /// What the kernel's files said when it was read.
    mark: String,
    /// Whether the next plan is to be made with promises that are read again.
    has_expired: bool,
    /// What was logged last about threads that cannot be pinned.
    said: Option<String>,
}

impl Limit {
    /// Reads the promises. The limit is read for each plan.
    pub(crate) fn beside_promises(ground: Ground<'_>) -> Limit {
        let mut limit = Limit::default();
        limit.read_promises(ground);
        limit
    }

    /// Reads what others were promised, and where the VM's memory is. It takes milliseconds, and no lock should be held
    /// meanwhile.
    pub(crate) fn read_promises(&mut self, ground: Ground<'_>) {
        self.has_expired = false;
        let Surroundings { allowed, expected, .. } = std::mem::take(&mut self.surroundings);
        self.surroundings = Surroundings { allowed, expected, ..around(ground) };
    }

    /// Has them read again for the next plan, because this VM or the host has changed. That a neighbour has come or
    /// gone is no reason: each VM of the host would read every thread then.
    pub(crate) fn expire(&mut self) {
        self.has_expired = true;
    }

    /// Reads them where they have expired.
    pub(crate) fn renew(&mut self, ground: Ground<'_>) {
        if self.has_expired {
            self.read_promises(ground);
        }
    }

    /// Reads the limit. The CPUs of other VMs are none; where they change meanwhile, the next pass reads it again.
    /// Returns whether it has changed.
    pub(crate) fn read(&mut self, ground: Ground<'_>, online: &CpuSet) -> bool {
        self.mark = mark(ground);
        let before = self.surroundings.allowed.take();
        self.surroundings.allowed = allowed(ground, online);
        self.surroundings.allowed != before
    }

    /// Returns whether it has changed, by reading a few small files where it has not. The promises have expired then.
    pub(crate) fn has_changed(&mut self, ground: Ground<'_>, online: &CpuSet) -> bool {
        let has_changed = self.mark != mark(ground) && self.read(ground, online);
        self.has_expired |= has_changed;
        has_changed
    }

    /// Says which CPUs VMs that are not started yet would have.
    pub(crate) fn expect(&mut self, cpus: CpuSet) {
        self.surroundings.expected = cpus;
    }

    /// What there is for the VM.
    pub(crate) fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    /// Takes out the steps that the kernel would refuse, of these threads of the process. A sentence about them.
    pub(crate) fn bar(
        &mut self,
        steps: &mut Vec<MaskStep>,
        own: &BTreeSet<ThreadKey>,
    ) -> Vec<String> {
        let Some(allowed) = &self.surroundings.allowed else { return Vec::new() };
        let is_barred =
            |step: &MaskStep| own.contains(&step.thread) && !step.to.intersects(&allowed.cpus);
        let (barred, rest): (Vec<MaskStep>, Vec<MaskStep>) = steps.drain(..).partition(is_barred);
        *steps = rest;
        if barred.is_empty() {
            self.said = None;
            return Vec::new();
        }
        let wanted = barred.iter().fold(CpuSet::EMPTY, |all, step| all | *step.to);
        let sentence = format!(
            "{} cannot be pinned to {}: {}; they stay where they are until that limit is lifted",
            counted(barred.len(), "thread"),
            cpus_in_words(&wanted),
            allowed.why
        );
        if self.said.as_ref() != Some(&sentence) {
            tracing::warn!("{sentence}");
            self.said = Some(sentence.clone());
        }
        vec![sentence]
    }
}

fn mark(ground: Ground<'_>) -> String {
    let Host { root, cgroups, .. } = ground.host;
    cpusets::allowed_mark(root, cgroups, ground.process.pid)
}

/// Reads all of it.
pub(crate) fn surroundings(ground: Ground<'_>, online: &CpuSet) -> Surroundings {
    Surroundings { allowed: allowed(ground, online), ..around(ground) }
}

/// What is read where no lock is held.
fn around(ground: Ground<'_>) -> Surroundings {
    let (devices, set_aside) = devices(ground);
    let (promises, memory_on) = (promises(ground), memory_on(ground));
    Surroundings { promises, memory_on, devices, set_aside, ..Surroundings::default() }
}

/// The VM's own devices, and the nodes with devices for VMs. On a host with one node they decide nothing.
fn devices(ground: Ground<'_>) -> (Vec<Device>, BTreeSet<NodeId>) {
    let root = ground.host.root;
    if discover::memory::has_one_node(root) {
        return Default::default();
    }
    let own = discover::devices::of_process(root, ground.process);
    (own, discover::devices::nodes_set_aside(root))
}

fn memory_on(ground: Ground<'_>) -> BTreeMap<NodeId, u64> {
    let Host { root, cgroups, .. } = ground.host;
    discover::memory::by_node(root, cgroups, ground.process.pid)
}

/// Reads what a host has promised to others than the VMs that are attached. That of another machine below a root is not
/// known: its threads do not run.
pub(crate) fn promises_beside(host: Host<'_>, state: &StateDir, boot_id: &str) -> Promises {
    let Host { root, sched, cgroups, .. } = host;
    if !root.is_live() {
        return Promises::default();
    }
    let leases = discover::live_leases(root, state, boot_id);
    discover::promises(root, sched, cgroups, &known(state, boot_id, &leases, &[]))
}

fn promises(ground: Ground<'_>) -> Promises {
    let Ground { host: Host { root, sched, cgroups, .. }, state, vm, boot_id, process } = ground;
    let mut promises = discover::promises(root, sched, cgroups, &ground.known());
    // A thread that was moved off the VM's CPUs looks like one that wants nothing.
    let lease = state.lease_of(vm, boot_id, process);
    let lives = |displaced: &Displaced| {
        let thread = displaced.tid.and_then(|tid| root.path(&format!("proc/{tid}")).ok());
        displaced.tid.is_some() && thread.is_some_and(|path| path.exists())
    };
    let displaced = lease.into_iter().flat_map(|lease| lease.displaced);
    promises.add_displaced(displaced.filter(lives));
    promises
}

/// Reads the CPUs that the VM's cgroup allows it; `None` where these are all.
fn allowed(ground: Ground<'_>, online: &CpuSet) -> Option<Allowed> {
    let Host { root, cgroups, .. } = ground.host;
    let others = || ground.others_cpus();
    cpusets::allowed(root, cgroups, ground.process.pid, online, others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{StartTicks, Tid};
    use crate::threads::Role;

    #[test]
    fn threads_that_cannot_be_pinned_are_named_once_and_not_written() {
        let key = |tid| ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        let cpus = |list: &str| -> CpuSet { list.parse().expect("a cpulist") };
        let step = |tid, to: &str| MaskStep {
            thread: key(tid),
            role: Role::Emulator,
            comm: String::new(),
            from: cpus("0-9").into(),
            to: cpus(to).into(),
        };
        let allowed = Allowed { cpus: cpus("2-9"), why: "100.scope allows only …".to_owned() };
        let surroundings = Surroundings { allowed: Some(allowed), ..Surroundings::default() };
        let mut limit = Limit { surroundings, ..Limit::default() };
        let own = BTreeSet::from([key(1), key(2), key(3)]);
        // The last one is the kernel's, and in no cgroup of the VM.
        let all = [step(1, "12"), step(2, "13"), step(3, "8-12"), step(4, "12")];
        let mut steps = all.to_vec();
        let said = limit.bar(&mut steps, &own);
        assert_eq!(steps, all[2..]);
        assert_eq!(
            said,
            [
                "2 threads cannot be pinned to CPUs 12-13: 100.scope allows only …; they stay where they are \
              until that limit is lifted"
            ]
        );
        let mut steps = Vec::new();
        assert_eq!(limit.bar(&mut steps, &own), [""; 0]);
    }
}
