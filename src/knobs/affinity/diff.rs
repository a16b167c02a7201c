//! `Plan × Observed → Vec<MaskStep>`. Empty means converged.
//!
//! A step carries all that the executor needs: which thread, from what, to what. The order is the one
//! that lets inheritance work for us: main thread first, since new threads are created with its mask;
//! then the rest of the emulator, iothreads, and vCPUs.

use crate::cpuset::CpuSet;
use crate::ids::Pid;
use crate::knobs::step::ThreadStep;
use crate::mask::{Mask, Masks};
use crate::plan::Plan;
use crate::policy::Level;
use crate::threads::{Role, Thread, ThreadKey};

/// One change of a thread's mask.
pub type MaskStep = ThreadStep<Mask>;

/// The CPUs a thread belongs on by the plan; `None`: it is left alone.
#[must_use]
pub fn desired(plan: &Plan, role: &Role) -> Option<CpuSet> {
    if plan.isolation == Level::None {
        return None;
    }
    match role {
        Role::Vcpu(index) => plan.vcpu(*index),
        Role::Iothread(id) => Some(plan.iothread(id)),
        Role::Emulator | Role::Worker | Role::Vhost | Role::Kernel => Some(plan.emulator),
    }
}

/// The steps that lead from what was seen to the plan. `online` are the host's online CPUs: the
/// kernel shows masks without offline ones, so masks are compared there.
#[must_use]
pub fn diff<'a>(
    plan: &Plan,
    process: Pid,
    observed: impl IntoIterator<Item = &'a Thread>,
    online: &CpuSet,
) -> Vec<MaskStep> {
    let mut masks = Masks::default();
    let mut steps: Vec<MaskStep> = observed
        .into_iter()
        .filter_map(|thread| {
            let to = desired(plan, &thread.role)?;
            (*thread.allowed & *online != to & *online).then(|| ThreadStep {
                thread: thread.key,
                role: thread.role.clone(),
                comm: thread.comm.clone(),
                from: thread.allowed.clone(),
                to: masks.of(to),
            })
        })
        .collect();
    steps.sort_by_key(|step| (rank(&step.role, step.thread, process), step.thread.tid));
    steps
}

fn rank(role: &Role, thread: ThreadKey, process: Pid) -> u8 {
    match role {
        _ if thread.tid == process.main_thread() => 0,
        Role::Emulator | Role::Worker | Role::Vhost => 1,
        Role::Iothread(_) => 2,
        Role::Vcpu(_) => 3,
        Role::Kernel => 4,
    }
}
