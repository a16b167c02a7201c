//! The process that follows a VM, and goes on with the next one where it is a service. It owns what outlives one VM:
//! the runtime, and the signals.

use std::thread;

use super::source::PolicySource;
use tokio::runtime::Runtime;

use super::run::{Ended, run};
use super::signals::Signals;
use super::state::Ending;
use super::waiting::{Patience, wait};
use super::worker::Worker;
use crate::attachment::error::StartError;
use crate::attachment::settings::Settings;
use crate::error::Failure;
use crate::knobs::ground::Host;

/// Follows VMs, one after the other.
pub struct Supervisor<'a> {
    host: Host<'a>,
    source: PolicySource<'a>,
    runtime: Runtime,
    signals: Signals,
}

impl<'a> Supervisor<'a> {
    /// Takes the signals: from then on none may end this process without a restore.
    ///
    /// # Errors
    /// [`StartError::Watch`].
    pub fn new(host: Host<'a>, source: PolicySource<'a>) -> Result<Supervisor<'a>, StartError> {
        let runtime = crate::runtime::build();
        let runtime = runtime.map_err(|source| StartError::Watch { what: "the VM", source })?;
        let signals = {
            let _within = runtime.enter();
            Signals::of(host.root)?
        };
        Ok(Supervisor { host, source, runtime, signals })
    }

    /// Attaches the VM, follows it until it ends or a signal comes, and restores everything.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn follow(&mut self, settings: &Settings) -> Result<Ended, StartError> {
        let Supervisor { host, source, runtime, signals } = self;
        let (host, source) = (*host, *source);
        thread::scope(|scope| {
            let worker = Worker::start(scope, host, settings.clone(), source)?;
            // On the heap: it is large.
            runtime.block_on(Box::pin(run(host, settings.clone(), worker, signals)))
        })
    }

    /// Waits until it is worth trying again to attach a VM that could not be attached. Returns why it is no longer to
    /// be attached; `None`: it is worth trying again.
    ///
    /// # Errors
    /// Why it could not be attached, where no change of the host mends that.
    pub fn wait(
        &mut self,
        settings: &mut Settings,
        error: StartError,
        patience: &mut Patience,
    ) -> Result<Option<Ending>, Failure> {
        let (host, source, signals) = (self.host, self.source, &mut self.signals);
        self.runtime.block_on(Box::pin(wait(host, settings, source, signals, error, patience)))
    }
}
