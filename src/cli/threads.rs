//! `qmpin threads`.

use super::args::{Global, ThreadsArgs};
use super::{Answer, block_on, output};
use crate::discover::{Target, VmError, channel_paths, read_vm, tasks, way_beside_supervisor};
use crate::error::Failure;
use crate::render::ThreadsDocument;
use crate::sched::Kernel;
use crate::sysroot::SysRoot;

pub(super) fn run(global: &Global, args: &ThreadsArgs) -> Result<Answer, Failure> {
    // Checked, so that a mistyped folder is not taken in silence; the VM itself is always live.
    args.root.root()?;
    let root = SysRoot::live();
    let location = args.vm.location(global);
    let paths = channel_paths(&args.vm.vm, &location);
    let limits = args.vm.limits();
    let first = way_beside_supervisor(&global.state(&root), &args.vm.vm);
    let target =
        Target { vm: &args.vm.vm, location: &location, paths: &paths, first, limits: &limits };
    let nothing = |_| Ok::<_, VmError>(());
    let (view, ()) = block_on(read_vm(&root, &Kernel, target, nothing))??;
    let kind = view.channel.kind();
    let process = view.process;
    let mut threads = tasks::observe(process, view.scan, &view.identified).threads;
    threads.extend(tasks::kernel_threads(&root, &Kernel, process.pid));
    let document = ThreadsDocument::new(&args.vm.vm, process.pid, kind, &view.roles, threads);
    if args.json {
        output::json(&document)?;
    } else {
        output::text(&document.to_text())?;
    }
    Ok(Answer::Done)
}
