//! A service whose VM cannot be attached now waits for a change, and does not ask QEMU meanwhile.
//!
//! ```text
//!   not attached ─▶ is it known what the VM needs? ── yes ─▶ planned again at each change ─▶ fits: attach
//!                                                  ── no ──▶ a change, or a growing interval ─▶ attach
//!   changes: a lease, a policy file, the online CPUs, what the VM's cgroup allows, SIGHUP
//! ```

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, interval, sleep_until};
use tokio_stream::StreamExt as _;

use super::notify;
use super::signals::Signals;
use super::source::PolicySource;
use super::sources::{at, next_of};
use super::state::Ending;
use crate::attachment::error::{Seen, StartError};
use crate::attachment::leasing::{earlier_lease, neighbours};
use crate::attachment::replan::this_process;
use crate::attachment::settings::Settings;
use crate::attachment::signalling::{ends_within, send};
use crate::cpuset::CpuSet;
use crate::discover;
use crate::discover::{VmLocation, is_alive, read_topology};
use crate::error::{Failure, Kind, chain};
use crate::ids::VmName;
use crate::knobs::affinity::limit::Limit;
use crate::knobs::ground::{Ground, Host};
use crate::leases::StateDir;
use crate::marks::{Waiting, note_reload, read_mark, remove_mark, write_mark};
use crate::plan::Stay;
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;
use crate::watch::{Exit, LeaseChanges};

/// Between two checks of what has no events: policy files, online CPUs, the VM's cgroup.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Several leases often change at the same moment.
const LEASES_SETTLE: Duration = Duration::from_millis(100);
/// Between two tries in vain to attach one QEMU process, at first and at most, whatever changes meanwhile.
const TRY_GAP: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// How long until the next try where nothing changes, at first and at most.
const INTERVAL: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(600)];

/// How long a process that only waits may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What is remembered from one wait to the next, for one QEMU process.
#[derive(Debug, Default)]
pub struct Patience {
    process: Option<ProcessKey>,
    /// How often it was tried to attach it.
    tries: u32,
    /// How often that was waited for without a change.
    rounds: u32,
    /// What was logged last.
    said: Option<String>,
}

/// A pause that is doubled `times` times, and up to a fifth less or more, so that several VMs do not try at the same
/// moment.
fn pause([first, longest]: [Duration; 2], times: u32) -> Duration {
    let pause = first.saturating_mul(1 << times.min(16)).min(longest);
    let chance = RandomState::new().build_hasher().finish() % 401;
    pause.mul_f64(0.8 + 0.001 * f64::from(u32::try_from(chance).unwrap_or(0)))
}

/// What has happened that may be worth another try.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Cause {
    /// The host or another VM has changed.
    Change,
    /// The policy has changed, a reload was asked for, or enough time has passed.
    Asked,
}

/// Why the VM could not be attached, and what is known of it.
struct Refusal {
    seen: Option<Box<Seen>>,
    kind: Kind,
    is_taken: bool,
    process: ProcessKey,
    reason: String,
}

impl Refusal {
    /// # Errors
    /// The failure itself, where waiting is of no use.
    fn of(host: Host<'_>, settings: &Settings, error: StartError) -> Result<Refusal, Failure> {
        let is_taken = matches!(error, StartError::AlreadyAttached { .. });
        let (seen, failure) = match error {
            StartError::NoRoom { seen, reason } => (Some(seen), Failure::from(reason)),
            error => (None, Failure::from(error)),
        };
        let may_pass = matches!(failure.kind(), Kind::No | Kind::Qmp | Kind::Partial);
        if seen.is_none() && !may_pass {
            return Err(failure);
        }
        let process = match (&seen, &settings.location) {
            (Some(seen), _) => Some(seen.process),
            (None, VmLocation::Proxmox { dir }) => {
                discover::proxmox_process(host.root, dir, &settings.vm).ok()
            }
            (None, VmLocation::Socket { .. }) => None,
        };
        let Some(process) = process else { return Err(failure) };
        let reason = chain(&failure);
        Ok(Refusal { seen, kind: failure.kind(), is_taken, process, reason })
    }
}

/// What a service waits with.
struct Wait<'a> {
    host: Host<'a>,
    settings: &'a mut Settings,
    source: PolicySource<'a>,
    boot_id: String,
    refusal: Refusal,
    limit: Limit,
    online: CpuSet,
    files: Vec<FileMark>,
}

/// See [`Supervisor::wait`](super::supervisor::Supervisor::wait).
pub(super) async fn wait(
    host: Host<'_>,
    settings: &mut Settings,
    source: PolicySource<'_>,
    signals: &mut Signals,
    error: StartError,
    patience: &mut Patience,
) -> Result<Option<Ending>, Failure> {
    let refusal = Refusal::of(host, settings, error)?;
    let process = refusal.process;
    if patience.process != Some(process) {
        *patience = Patience { process: Some(process), ..Patience::default() };
    }
    patience.tries = patience.tries.saturating_add(1);
    let exit = match Exit::of(host.root, process) {
        Err(_) if !is_alive(host.root, process) => return Ok(Some(Ending::QemuEnded)),
        exit => exit.map_err(|source| StartError::Watch { what: "the QEMU process", source })?,
    };
    let boot_id = discover::boot_id(host.root).map_err(StartError::BootId)?;
    let mut wait = Wait {
        host,
        source,
        boot_id,
        refusal,
        limit: Limit::default(),
        online: CpuSet::EMPTY,
        files: marks_of(source.files),
        settings,
    };
    wait.notice_host();
    let ended = wait.until_changed(&exit, signals, patience).await;
    let Settings { state, vm, .. } = &*wait.settings;
    if let Err(error) = remove_mark::<Waiting>(state, vm) {
        tracing::debug!("VM {vm}: the mark of its wait stays: {error}");
    }
    if ended == Some(Ending::Asked) {
        notify::stopping();
    }
    Ok(ended)
}

impl Wait<'_> {
    /// Returns why waiting is over for good; `None`: it is worth trying again.
    async fn until_changed(
        &mut self,
        exit: &Exit,
        signals: &mut Signals,
        patience: &mut Patience,
    ) -> Option<Ending> {
        let state = &self.settings.state;
        let mut leases = LeaseChanges::of(state, None)
            .inspect_err(|error| tracing::warn!("changes of other VMs are seen later: {error}"))
            .ok();
        // Not sooner, whatever changes.
        let earliest = Instant::now() + pause(TRY_GAP, patience.tries.saturating_sub(1));
        let next = |patience: &Patience| {
            let times = patience.tries.saturating_add(patience.rounds).saturating_sub(1);
            Instant::now() + pause(INTERVAL, times)
        };
        let mut due = next(patience);
        let mut looks = interval(notify::within_watchdog(LOOK_INTERVAL));
        let mut leases_at: Option<Instant> = None;
        let mut cause: Option<Cause> = None;
        self.say(patience);
        notify::ready(&self.status());
        loop {
            tokio::select! {
                biased;
                ended = exit.wait() => {
                    if let Err(error) = ended {
                        tracing::warn!("the end of QEMU can no longer be watched: {error}");
                    }
                    return Some(Ending::QemuEnded);
                }
                _ = signals.stop.next() => return Some(Ending::Asked),
                _ = signals.reload.next() => {
                    let refused = self.read_policy().err();
                    let (state, vm) = (&self.settings.state, &self.settings.vm);
                    let process = self.refusal.process;
                    note_reload(state, vm, &self.boot_id, process, refused, Vec::new());
                    cause = Some(Cause::Asked);
                }
                changed = next_of(&mut leases, LeaseChanges::next) => {
                    if let Err(error) = changed {
                        tracing::warn!("changes of other VMs are seen later: {error}");
                        leases = None;
                    }
                    leases_at.get_or_insert(Instant::now() + LEASES_SETTLE);
                    continue;
                }
                () = at(leases_at) => {
                    leases_at = None;
                    cause = cause.max(Some(Cause::Change));
                }
                () = sleep_until(due) => {
                    patience.rounds = patience.rounds.saturating_add(1);
                    due = next(patience);
                    cause = Some(Cause::Asked);
                }
                _ = looks.tick() => {
                    if self.notice_files() {
                        cause = Some(Cause::Asked);
                    }
                    // Without events of leases each pass is for them, too.
                    if self.notice_host() || leases.is_none() || self.refusal.is_taken {
                        cause = cause.max(Some(Cause::Change));
                    }
                    notify::alive(&self.status());
                }
            }
            if let Some(found) = cause
                && Instant::now() >= earliest
            {
                cause = None;
                if self.fits(found) {
                    return None;
                }
                self.say(patience);
            }
        }
    }

    /// Whether it is worth trying again. Where it is known what the VM needs it is planned, and QEMU is not asked; nor
    /// is it where another process has the VM.
    fn fits(&mut self, cause: Cause) -> bool {
        let Some(seen) = &self.refusal.seen else {
            return if self.refusal.is_taken {
                !self.is_held()
            } else {
                cause == Cause::Asked || self.refusal.kind == Kind::No
            };
        };
        // A vCPU was unplugged: the VM needs less now, and only QEMU says what.
        let task = |tid| format!("proc/{}/task/{tid}", seen.process.pid);
        let has = |tid| self.host.root.path(&task(tid)).is_ok_and(|path| path.exists());
        if !seen.vcpus.iter().all(|tid| has(*tid)) {
            return true;
        }
        let Settings { state, vm, .. } = &*self.settings;
        let (host, boot_id, process) = (self.host, &*self.boot_id, self.refusal.process);
        let ground = Ground { host, state, vm, boot_id, process };
        // What cannot be read now is for the next pass.
        let Ok(topology) = read_topology(self.host.root) else { return false };
        let beside = neighbours(ground);
        let held = earlier_lease(ground)
            .map(|lease| lease.vcpus.into_iter().collect())
            .unwrap_or_default();
        self.limit.read_promises(ground);
        let around = self.limit.surroundings();
        match self.settings.plan(&topology, &seen.guest, &beside, around, &held, Stay::Always) {
            Ok(_) => true,
            Err(error) => {
                self.refusal.reason = chain(&Failure::from(error));
                false
            }
        }
    }

    /// Whether another process follows the VM.
    fn is_held(&self) -> bool {
        let Settings { state, vm, .. } = &*self.settings;
        let leased = state.lease(vm).ok().flatten().and_then(|lease| lease.supervisor);
        let holders = state.supervisor(vm).into_iter().chain(leased);
        holders.into_iter().any(|holder| is_alive(self.host.root, holder))
    }

    /// Reads the policy again. One that cannot be used leaves the one before.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    fn read_policy(&mut self) -> Result<(), String> {
        self.files = marks_of(self.source.files);
        let vm = &self.settings.vm;
        self.settings.policy = self.source.read_again().inspect_err(|why| {
            tracing::warn!("VM {vm}: the policy before stays in force: {why}");
        })?;
        Ok(())
    }

    fn notice_files(&mut self) -> bool {
        marks_of(self.source.files) != self.files && self.read_policy().is_ok()
    }

    /// Notices other online CPUs, and other CPUs that the VM's cgroup allows.
    fn notice_host(&mut self) -> bool {
        let Ok(online) = discover::online_cpus(self.host.root) else { return false };
        let Settings { state, vm, .. } = &*self.settings;
        let (host, boot_id, process) = (self.host, &*self.boot_id, self.refusal.process);
        let ground = Ground { host, state, vm, boot_id, process };
        let is_limited = self.limit.has_changed(ground, &online);
        is_limited | (std::mem::replace(&mut self.online, online) != online)
    }

    fn status(&self) -> String {
        format!("waiting: {}", self.refusal.reason)
    }

    /// Says once why the VM is not attached, and what is waited for.
    fn say(&self, patience: &mut Patience) {
        let Settings { state, vm, .. } = &*self.settings;
        let reason = &self.refusal.reason;
        if patience.said.as_ref() == Some(reason) {
            return;
        }
        tracing::warn!(
            "VM {vm}: not attached: {reason}; waits for a change of other VMs, of its policy or of the online CPUs"
        );
        patience.said = Some(reason.clone());
        let Some(supervisor) = this_process(self.host.root) else { return };
        let mark = Waiting::now(vm, &self.boot_id, self.refusal.process, supervisor, reason);
        if let Err(error) = write_mark(state, &mark) {
            tracing::debug!("`qmpin status` does not know that VM {vm} waits: {error}");
        }
    }
}

/// Ends the process that waits to attach a VM, where there is one.
///
/// # Errors
/// The kernel's answer.
pub fn end_waiting(root: &SysRoot, state: &StateDir, vm: &VmName) -> io::Result<()> {
    let Some(waiting) = read_mark::<Waiting>(state, vm) else { return Ok(()) };
    if discover::boot_id(root).is_ok_and(|boot_id| boot_id == waiting.boot_id)
        && let Some(pidfd) = send(root, waiting.supervisor, Signal::TERM)?
        && !ends_within(&pidfd, END_LIMIT)?
    {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}

/// What distinguishes one content of a file from another; `None`: there is no file.
type FileMark = Option<(i64, i64, u64, u64)>;

fn marks_of(files: &[PathBuf]) -> Vec<FileMark> {
    use std::os::unix::fs::MetadataExt as _;
    let mark = |path: &PathBuf| -> io::Result<_> {
        let found = std::fs::metadata(path)?;
        Ok((found.mtime(), found.mtime_nsec(), found.ino(), found.len()))
    };
    files.iter().map(|path| mark(path).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_grows_to_a_limit_and_is_never_the_same_for_long() {
        let mut last = Duration::ZERO;
        for times in 0..40 {
            let next = pause(INTERVAL, times);
            assert!(next <= INTERVAL[1].mul_f64(1.21), "{times}: {next:?}");
            assert!(next >= INTERVAL[0].mul_f64(0.79), "{times}: {next:?}");
            // A fifth less of the double is more than a fifth more.
            assert!(times > 3 || next > last, "{times}: {last:?} and {next:?}");
            last = next;
        }
        assert!(last >= INTERVAL[1].mul_f64(0.79), "{last:?}");
        let several: Vec<Duration> = (0..20).map(|_| pause(INTERVAL, 3)).collect();
        assert!(several.iter().any(|pause| *pause != several[0]), "{several:?}");
    }
}
