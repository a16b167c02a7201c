//! `qmpin attach`.

use super::args::{AttachArgs, Global};
use super::{Answer, block_on, output, plan};
use crate::error::Failure;
use crate::render::{priority_refusal, restore_lines, thread_refusal};
use crate::sched::Kernel;
use crate::supervise::{Follow, Host, Settings, attach_once, follow};
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &AttachArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let policy = if args.last_good {
        args.policy.policy_or_last_good(global, &root, &args.vm)?
    } else {
        args.policy.policy(global, &root, &args.vm)?
    };
    let settings = Settings {
        vm: args.vm.vm.clone(),
        location: args.vm.ask.location(global),
        state: global.state(&root),
        policy,
        limits: args.vm.ask.limits(),
        follow: if args.once { Follow::Once } else { Follow::Stay },
    };
    if args.dry_run {
        return plan::show(&root, &settings, plan::Shape::Text(crate::render::Explain::Shortfalls));
    }
    let host = Host { root: &root, sched: &Kernel };
    if args.once {
        let (plan, report, isolated) = block_on(attach_once(host, settings))??;
        let threads: Vec<String> = report.applied.iter().filter_map(thread_refusal).collect();
        output::text(&format!(
            "VM {}: vCPUs on {}, iothreads on {}, emulator on {}; {} threads moved, {} refused\n",
            plan.vm,
            plan.exclusive,
            plan.iothread_cpus,
            plan.emulator,
            report.applied.len() - threads.len(),
            threads.len()
        ))?;
        let priority = report.priority.applied.iter().filter_map(priority_refusal);
        let reonline = report.reonline;
        let failed: Vec<String> =
            priority.chain(report.cookie.refused).chain(reonline.failed).collect();
        let is_whole = threads.is_empty()
            && failed.is_empty()
            && report.partition.is_empty()
            && !isolated.fell_short();
        let partition = report.partition.iter().map(ToString::to_string);
        let sentences = threads.into_iter().chain(failed).chain(reonline.left_out).chain(partition);
        for sentence in sentences.chain(isolated.refusals()) {
            output::text(&format!("  refused: {sentence}\n"))?;
        }
        for sentence in isolated.kept_by_the_kernel() {
            output::text(&format!("  stays: {sentence}\n"))?;
        }
        return Ok(if is_whole { Answer::Done } else { Answer::Partly });
    }
    let vm = settings.vm.clone();
    let ended = block_on(follow(host, settings))??;
    let Some(restored) = ended.restored else { return Ok(Answer::Done) };
    for line in restore_lines(&vm, &restored) {
        tracing::info!("{line}");
    }
    Ok(if restored.is_complete() { Answer::Done } else { Answer::Partly })
}
