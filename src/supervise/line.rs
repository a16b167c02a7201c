//! The line to QEMU: the job that works with it has it alone, beside the loop.
//!
//! ```text
//!   free ──ask, upgrade──▶ lent to a job ──done──▶ free
//! ```

use std::future::{Future, pending};
use std::pin::Pin;

use crate::discover::tasks;
use crate::error::chain;
use crate::ids::{Pid, Tid};
use crate::qmp::{Channel, ChannelKind, Happening, QmpError, Roles, Upgrade};
use crate::sysroot::SysRoot;

type Job = Pin<Box<dyn Future<Output = (Channel, Said)>>>;

enum State {
    Free(Box<Channel>),
    Lent {
        job: Job,
        kind: ChannelKind,
    },
    /// Only for the moment in which it changes hands.
    Between,
    /// A test plays QEMU: what it says, and where questions go.
    #[cfg(test)]
    Played(tokio::sync::mpsc::UnboundedReceiver<Said>, tokio::sync::mpsc::UnboundedSender<Played>),
}

/// What a played QEMU is asked.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Played {
    Ask,
    Upgrade,
}

/// What the line to QEMU reports.
pub(super) enum Said {
    Happening(Happening),
    /// The threads that were listed before QEMU was asked, and what it said; or why that is of no use, in words.
    Asked(Result<(Vec<Tid>, Roles), String>),
    Upgraded(Result<Upgrade, QmpError>),
}

/// The line to QEMU.
pub(super) struct Line {
    state: State,
    /// A question waits until it is free.
    ask_when_free: bool,
}

impl Line {
    pub(super) fn new(channel: Channel) -> Line {
        Line { state: State::Free(Box::new(channel)), ask_when_free: false }
    }

    /// Waits for what it reports. What has begun goes on the next time where this is dropped.
    pub(super) async fn said(&mut self) -> Said {
        match &mut self.state {
            State::Free(channel) => Said::Happening(channel.next_event().await),
            State::Lent { job, .. } => {
                let (channel, said) = job.await;
                self.state = State::Free(Box::new(channel));
                said
            }
            State::Between => pending().await,
            #[cfg(test)]
            State::Played(said, _) => super::sources::next_message(said).await,
        }
    }

    /// One that a test plays.
    #[cfg(test)]
    pub(super) fn played(
        said: tokio::sync::mpsc::UnboundedReceiver<Said>,
        asked: tokio::sync::mpsc::UnboundedSender<Played>,
    ) -> Line {
        Line { state: State::Played(said, asked), ask_when_free: false }
    }

    /// Returns what it has to report already; `None`: nothing.
    pub(super) async fn said_already(&mut self) -> Option<Happening> {
        match &mut self.state {
            State::Free(channel) => tokio::select! {
                biased;
                happening = channel.next_event() => Some(happening),
                () = std::future::ready(()) => None,
            },
            State::Lent { .. } | State::Between => None,
            #[cfg(test)]
            State::Played(..) => None,
        }
    }

    /// Whether nothing was asked, so that what it says is QEMU's own choice.
    pub(super) fn is_free(&self) -> bool {
        !matches!(self.state, State::Lent { .. } | State::Between)
    }

    /// Asks who is who; where it is lent, after the next [`Line::ask_if_waiting`].
    pub(super) fn ask(&mut self, root: &SysRoot, pid: Pid) {
        #[cfg(test)]
        if let State::Played(_, asked) = &self.state {
            asked.send(Played::Ask).expect("the test hears it");
            return;
        }
        let root = root.clone();
        self.ask_when_free = self.lend(|mut channel| {
            Box::pin(async move {
                let before = tasks::list(&root, pid).map_err(|error| chain(&error));
                let roles = channel.roles().await.map_err(|error| chain(&error));
                (channel, Said::Asked(before.and_then(|before| Ok((before, roles?)))))
            })
        });
    }

    /// Asks what could not be asked before.
    pub(super) fn ask_if_waiting(&mut self, root: &SysRoot, pid: Pid) {
        if self.ask_when_free {
            self.ask(root, pid);
        }
    }

    /// Tries for a monitor of its own.
    pub(super) fn upgrade(&mut self) {
        #[cfg(test)]
        if let State::Played(_, asked) = &self.state {
            asked.send(Played::Upgrade).expect("the test hears it");
            return;
        }
        self.lend(|mut channel| {
            Box::pin(async move {
                let result = channel.upgrade().await;
                (channel, Said::Upgraded(result))
            })
        });
    }

    /// How QEMU is asked.
    pub(super) fn kind(&self) -> ChannelKind {
        match &self.state {
            State::Free(channel) => channel.kind(),
            State::Lent { kind, .. } => *kind,
            State::Between => ChannelKind::Lease,
            #[cfg(test)]
            State::Played(..) => ChannelKind::Lease,
        }
    }

    /// The same in words.
    pub(super) fn name(&self) -> &'static str {
        match self.kind() {
            ChannelKind::Lease => "leases",
            ChannelKind::Socket => "its own socket",
            ChannelKind::RuntimeMonitor => "a runtime monitor",
        }
    }

    /// Gives it to a job. Whether it was busy.
    fn lend(&mut self, job: impl FnOnce(Channel) -> Job) -> bool {
        match std::mem::replace(&mut self.state, State::Between) {
            State::Free(channel) => {
                let kind = channel.kind();
                self.state = State::Lent { job: job(*channel), kind };
                false
            }
            busy => {
                self.state = busy;
                true
            }
        }
    }
}
