//! `qmpin attach`.

use super::args::{AttachArgs, Global};
use super::{Answer, block_on, output, plan, serve};
use crate::attachment::reports::PassReport;
use crate::attachment::settings::{Follow, Settings};
use crate::cgroups::CgroupTree;
use crate::discover::{boot_id, is_alive};
use crate::error::Failure;
use crate::knobs::execute::Applied;
use crate::knobs::ground::Host;
use crate::knobs::vm::VmReport;
use crate::marks::{Detached, remove_mark, sweep_marks};
use crate::policy::Policy;
use crate::sched::Kernel;
use crate::supervise::{PolicySource, attach_once};
use crate::sysroot::SysRoot;
use crate::systemd::SystemBus;

pub(super) fn run(global: &Global, args: &AttachArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let policy = || {
        if args.last_good {
            args.policy.policy_or_last_good(global, &root, &args.vm)
        } else {
            args.policy.policy(global, &root, &args.vm)
        }
    };
    let follow = if args.once { Follow::Once } else { Follow::Stay };
    let settings = args.vm.settings(global, &root, policy()?, follow);
    if args.dry_run {
        let shape = plan::Shape::Text(crate::render::Explain::Shortfalls);
        return plan::show(&root, &settings, shape, plan::Stopped::Refuse);
    }
    let cgroups = CgroupTree::of(&root);
    let host = Host { root: &root, sched: &Kernel, cgroups: &cgroups, units: &SystemBus };
    forget_marks(&root, &settings, args.service);
    if args.once {
        let (plan, report, isolated) = block_on(attach_once(host, settings))??;
        let PassReport { knobs, reonline, .. } = report;
        let VmReport { partition, affinity, priority, cookie, .. } = knobs;
        let threads: Vec<String> = affinity.applied.iter().filter_map(Applied::refusal).collect();
        output::sentence(&format!(
            "VM {}: {}; {} threads moved, {} refused",
            plan.vm,
            affinity.placed.in_words(&plan),
            affinity.applied.len() - threads.len(),
            threads.len()
        ))?;
        let priority = priority.applied.iter().filter_map(Applied::refusal);
        let failed: Vec<String> = priority.chain(cookie.refused).chain(reonline.failed).collect();
        let is_whole = threads.is_empty()
            && failed.is_empty()
            && partition.is_empty()
            && !isolated.fell_short();
        let partition = partition.iter().map(ToString::to_string);
        let sentences = threads.into_iter().chain(failed).chain(reonline.left_out).chain(partition);
        for sentence in sentences.chain(isolated.refusals()) {
            output::sentence(&format!("  refused: {sentence}"))?;
        }
        for sentence in isolated.kept_by_the_kernel() {
            output::sentence(&format!("  stays: {sentence}"))?;
        }
        return Ok(if is_whole { Answer::Done } else { Answer::Partly });
    }
    let files = global.policy_dirs(&root, args.vm.ask.place()).files(Some(&settings.vm));
    let files: Vec<_> = files.into_iter().map(|(path, _)| path).collect();
    let source = PolicySource { files: &files, read: &policy };
    let limits = |policy: &Policy| args.vm.ask.limits(policy.vm.max_vcpus.value);
    serve::serve(host, source, settings, args.service, &limits)
}

/// Removes marks that are of no use any more: of VMs that have ended, and that of this one, since a user who attaches
/// it by hand wants it attached. What a service may do was decided before it was started.
fn forget_marks(root: &SysRoot, settings: &Settings, is_service: bool) {
    let Settings { state, vm, .. } = settings;
    if let Ok(boot_id) = boot_id(root) {
        sweep_marks(state, &boot_id, &|process| is_alive(root, process));
    }
    if !is_service && let Err(error) = remove_mark::<Detached>(state, vm) {
        tracing::debug!("VM {vm}: the mark of a detach by hand stays: {error}");
    }
}
