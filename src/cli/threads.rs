//! `qmpin threads`.

use super::args::{Global, ThreadsArgs};
use super::look::look;
use super::{Answer, output};
use crate::discover::tasks;
use crate::error::Failure;
use crate::knobs::host::kernel_threads::{KthreadScan, kernel_threads};
use crate::render::ThreadsDocument;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &ThreadsArgs) -> Result<Answer, Failure> {
    // Checked, so that a mistyped folder is not taken in silence; the VM itself is always live.
    args.root.root()?;
    let root = SysRoot::live();
    let (vm, ask) = (&args.vm.vm, &args.vm.ask);
    let (location, limits) = (ask.location(global), ask.limits(None));
    let view = look(vm, &location, &limits, &global.state(&root))?;
    let kind = view.channel.kind();
    let process = view.process;
    let mut threads = tasks::observe(process, view.scan, &view.identified).threads;
    threads.extend(kernel_threads(&root, &Kernel, process.pid, KthreadScan::Children));
    let document = ThreadsDocument::new(vm, process.pid, kind, &view.roles, threads);
    output::answer(args.json, &document, ThreadsDocument::to_text)?;
    Ok(Answer::Done)
}
