//! `qmpin verify`: does all hold? By the kernel's own files and QEMU's own answer.

use super::args::{Global, VerifyArgs};
use super::host_look::host_facts;
use super::look::look;
use super::{Answer, output};
use crate::cgroups::CgroupTree;
use crate::check::verify::{VmFacts, host_checks, vm_checks};
use crate::discover::{self, boot_id, read_topology, tasks};
use crate::error::{Failure, Kind};
use crate::journal;
use crate::knobs::core_scheduling::plan::beside;
use crate::knobs::core_scheduling::read::cookies;
use crate::knobs::host::irqbalance::read::Silent;
use crate::knobs::host::kernel_threads::{KthreadScan, kernel_threads};
use crate::plan::memory_seen;
use crate::render::VerifyDocument;
use crate::sched::{Kernel, Sched as _};
use crate::standing::read_standing;
use crate::threads::{Role, Thread};

pub(super) fn run(global: &Global, args: &VerifyArgs) -> Result<Answer, Failure> {
    let root = args.root.root()?;
    let (vm, ask, state) = (&args.vm.vm, &args.vm.ask, global.state(&root));
    // Of another QEMU it bounds nothing: that is found out below.
    let bound = state.lease(vm).ok().flatten().and_then(|lease| lease.max_vcpus);
    let (location, limits) = (ask.location(global), ask.limits(bound));
    let topology = read_topology(&root)?;
    let view = look(vm, &location, &limits, &state)?;
    let boot_id = boot_id(&root)?;
    let lease = state.lease(vm)?;
    let Some(lease) = lease.filter(|lease| lease.qemu == view.process && lease.boot_id == boot_id)
    else {
        let failure = Failure::new(Kind::No, format!("VM {vm} is not attached"));
        return Err(failure.hint(format!("`qmpin attach {vm}` attaches it")));
    };
    let pid = view.process.pid;
    let mut threads = tasks::observe(view.process, view.scan, &view.identified).threads;
    let cookies = cookies(&Kernel, &threads).unwrap_or_default();
    threads.extend(kernel_threads(&root, &Kernel, pid, KthreadScan::All));
    let scheduled = |thread: &Thread| Some((thread.key, Kernel.scheduling(thread.key.tid).ok()?));
    let scheduling = threads.iter().filter_map(scheduled).collect();
    let memory = journal::memory(&state.journal_path(vm));
    let mut checks = vm_checks(&VmFacts {
        lease: &lease,
        threads: &threads,
        scheduling: &scheduling,
        cookies: &cookies,
        beside: beside(&topology, &lease.exclusive),
        memory: &memory,
    });
    let facts = host_facts(&root, &state, &boot_id, &lease, &memory, &mut Silent::new())?;
    checks.extend(host_checks(&facts));
    let findings = read_standing(&state, vm).map(|standing| standing.findings).unwrap_or_default();
    let document = VerifyDocument::new(vm, checks, findings);
    let guest = discover::guest(&view.roles);
    let on = |vcpu| {
        let is_its = |thread: &&Thread| thread.role == Role::Vcpu(vcpu);
        threads.iter().find(is_its).map(|thread| *thread.allowed).unwrap_or_default()
    };
    let lies = discover::memory::by_node(&root, &CgroupTree::of(&root), pid);
    let document = document.with_memory(memory_seen(&topology, &guest, &lies, &on));
    output::answer(args.json, &document, VerifyDocument::to_text)?;
    Ok(if document.holds() { Answer::Done } else { Answer::No })
}
