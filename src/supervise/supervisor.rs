//! The process that follows a VM, and goes on with the next one where it is a service. It owns what outlives one VM:
//! the runtime, and the signals.

use std::path::PathBuf;
use std::thread;

use tokio::runtime::Runtime;

use super::run::{Ended, run};
use super::settings::{Host, Settings};
use super::signals::Signals;
use super::start_error::StartError;
use super::waiting::{Patience, Woken, wait};
use super::worker::Worker;
use crate::error::Failure;
use crate::policy::Policy;
use crate::sched::Sched;
use crate::sysroot::SysRoot;

/// Where the VM's policy is from, so that it can be read again.
#[derive(Clone, Copy)]
pub struct PolicySource<'a> {
    /// The files that have a say. They need not exist.
    pub files: &'a [PathBuf],
    /// Reads them.
    pub read: &'a (dyn Fn() -> Result<Policy, Failure> + Sync),
}

/// Follows VMs, one after the other.
pub struct Supervisor<'a> {
    root: &'a SysRoot,
    sched: &'a (dyn Sched + Sync),
    source: PolicySource<'a>,
    runtime: Runtime,
    signals: Signals,
}

impl<'a> Supervisor<'a> {
    /// Takes the signals: from then on none may end this process without a restore.
    ///
    /// # Errors
    /// [`StartError::Watch`].
    pub fn new(
        root: &'a SysRoot,
        sched: &'a (dyn Sched + Sync),
        source: PolicySource<'a>,
    ) -> Result<Supervisor<'a>, StartError> {
        let runtime = crate::runtime::build();
        let runtime = runtime.map_err(|source| StartError::Watch { what: "the VM", source })?;
        let signals = {
            let _within = runtime.enter();
            Signals::of(root)?
        };
        Ok(Supervisor { root, sched, source, runtime, signals })
    }

    /// Attaches the VM, follows it until it ends or a signal comes, and restores everything.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn follow(&mut self, settings: &Settings) -> Result<Ended, StartError> {
        let Supervisor { root, sched, source, runtime, signals } = self;
        let (root, sched, source) = (*root, *sched, *source);
        thread::scope(|scope| {
            let worker = Worker::start(scope, root, sched, settings.clone(), source)?;
            // On the heap: it is large.
            runtime.block_on(Box::pin(run(Host { root, sched }, settings.clone(), worker, signals)))
        })
    }

    /// Waits until it is worth trying again to attach a VM that could not be attached, or is no longer to be.
    ///
    /// # Errors
    /// Why it could not be attached, where no change of the host mends that.
    pub fn wait(
        &mut self,
        settings: &mut Settings,
        error: StartError,
        patience: &mut Patience,
    ) -> Result<Woken, Failure> {
        let host = Host { root: self.root, sched: self.sched };
        let (source, signals) = (self.source, &mut self.signals);
        self.runtime.block_on(Box::pin(wait(host, settings, source, signals, error, patience)))
    }
}
