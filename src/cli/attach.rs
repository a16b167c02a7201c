//! `qmpin attach`.

use super::args::{AttachArgs, Global};
use super::{Answer, block_on, output, plan};
use crate::apply::{Applied, StepOutcome};
use crate::error::Failure;
use crate::render::{restore_lines, thread_in_words};
use crate::sched::Kernel;
use crate::supervise::{Follow, Host, Settings, attach_once, follow};
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &AttachArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let policy = args.policy.policy(global, &root, &args.vm.vm)?;
    let settings = Settings {
        vm: args.vm.vm.clone(),
        location: args.vm.location(global),
        state: global.state(&root),
        policy,
        limits: args.vm.limits(),
        follow: if args.once { Follow::Once } else { Follow::Stay },
    };
    if args.dry_run {
        return plan::show(&root, &settings, plan::Shape::Text(crate::render::Explain::Shortfalls));
    }
    let host = Host { root: &root, sched: &Kernel };
    if args.once {
        let (plan, report, isolated) = block_on(attach_once(host, settings))??;
        let refused: Vec<&Applied> =
            report.applied.iter().filter(|applied| applied.fell_short()).collect();
        output::text(&format!(
            "VM {}: vCPUs on {}, iothreads on {}, emulator on {}; {} threads moved, {} refused\n",
            plan.vm,
            plan.exclusive,
            plan.iothread_cpus,
            plan.emulator,
            report.applied.len() - refused.len(),
            refused.len()
        ))?;
        for applied in &refused {
            output::text(&format!("  refused: {}\n", refusal(applied)))?;
        }
        for refused in &report.partition {
            output::text(&format!("  refused: {refused}\n"))?;
        }
        let is_whole = refused.is_empty() && report.partition.is_empty() && !isolated.fell_short();
        return Ok(if is_whole { Answer::Done } else { Answer::Partly });
    }
    let vm = settings.vm.clone();
    let ended = block_on(follow(host, settings))??;
    for line in restore_lines(&vm, &ended.restored) {
        tracing::info!("{line}");
    }
    Ok(if ended.restored.is_complete() { Answer::Done } else { Answer::Partly })
}

fn refusal(applied: &Applied) -> String {
    let step = &applied.step;
    let who = thread_in_words(step.thread.tid, &step.role, &step.comm);
    match &applied.outcome {
        StepOutcome::Refused { error } => format!("{who}: {} → {}: {error}", step.from, step.to),
        StepOutcome::Narrowed { to } => {
            format!("{who}: wanted {}, the kernel made it {to}", step.to)
        }
        StepOutcome::Done | StepOutcome::Gone => who,
    }
}
