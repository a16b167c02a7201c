//! A policy that is read again while the VM is attached: what of it takes effect at once, and what later.
//!
//! ```text
//!   SIGHUP ─▶ read the files ─▶ plan by them ─▶ lease ─▶ pass: pins, partition, host, priority
//!                 │ cannot be used   │ no room
//!                 └──────────────────┴─▶ the policy before stays in force, and status says why
//! ```

use std::io;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::source::PolicySource;
use crate::attachment::Attachment;
use crate::attachment::signalling::{ends_within, send};
use crate::error::chain;
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::marks::{Reloaded, read_mark};
use crate::policy::{Knob, Level, Policy};
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

/// How long a supervisor may take to read its policy again. A job that is under way comes first.
const LIMIT: Duration = Duration::from_secs(150);
const PAUSE: Duration = Duration::from_millis(50);

/// A policy that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    /// The policy, in force from now on.
    pub(super) policy: Box<Policy>,
    /// What of it takes effect when the VM is attached the next time, in words.
    pub(super) later: Vec<String>,
}

/// Reads the policy again and has the attachment go by it.
///
/// # Errors
/// Why the policy before stays in force, in words.
pub(super) fn reload(
    attachment: &mut Attachment<'_>,
    source: PolicySource<'_>,
) -> Result<Taken, String> {
    let before = attachment.settings().policy.clone();
    let taken = source.read_again().and_then(|policy| {
        let adopted = attachment.adopt(policy.clone()).map_err(|error| chain(&error));
        adopted.map(|()| Taken { later: later(&before, &policy), policy: Box::new(policy) })
    });
    taken.inspect_err(|why| attachment.keep_policy(why))
}

/// What of a policy has no effect on a VM that is attached.
fn later(before: &Policy, policy: &Policy) -> Vec<String> {
    let (before, policy) = (&before.vm, &policy.vm);
    let mut later = Vec::new();
    if before.channel.value != policy.channel.value {
        later.push("channel".to_owned());
    }
    let reonlines = |knobs: &std::collections::BTreeSet<Knob>| knobs.contains(&Knob::Reonline);
    if reonlines(&policy.wanted_knobs()) && !reonlines(&before.wanted_knobs()) {
        later.push("reonline".to_owned());
    }
    if policy.isolation.value == Level::None && before.isolation.value != Level::None {
        later.push("isolation = \"none\", as far as the VM's threads stay pinned".to_owned());
    }
    later
}

/// What a supervisor answers to a request to read its policy again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answered {
    /// It has; with the result.
    Done(Reloaded),
    /// It has ended meanwhile.
    Ended,
    /// It has not answered within the limit.
    Late,
}

/// Asks a supervisor that systemd has started to read its policy again, and waits for the result.
///
/// # Errors
/// The kernel's answer.
pub fn request_reload(
    root: &SysRoot,
    state: &StateDir,
    vm: &VmName,
    supervisor: ProcessKey,
) -> io::Result<Answered> {
    let times = || read_mark::<Reloaded>(state, vm);
    let before = times().map_or(0, |mark| mark.times);
    let Some(pidfd) = send(root, supervisor, Signal::HUP)? else { return Ok(Answered::Ended) };
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(mark) = times().filter(|mark| mark.times > before) {
            return Ok(Answered::Done(mark));
        }
        if ends_within(&pidfd, PAUSE)? {
            return Ok(Answered::Ended);
        }
    }
    Ok(Answered::Late)
}
