//! The thread that works on the attachment, so that the loop never waits for a lock, for systemd or for a big
//! read: it hears QEMU, feeds the watchdog, and shows `qmpin detach` that there is progress.
//!
//! ```text
//!   loop ── Job, one at a time ──▶ worker: the attachment
//!        ◀── Done, and how it stands ──
//! ```

use std::sync::mpsc;
use std::thread;
use std::thread::Scope;
use std::time::Duration;

use tokio::sync::mpsc as tokio_mpsc;
use tokio::time::Instant;

use super::budget::thread_time;
use super::reload::{Taken, reload};
use super::source::PolicySource;
use super::sources::next_message;
use crate::attachment::Attachment;
use crate::attachment::around::Checked;
use crate::attachment::error::{PassError, StartError};
use crate::attachment::found::Found;
use crate::attachment::reports::{Learnt, PassReport};
use crate::attachment::settings::Settings;
use crate::discover::tasks::TasksError;
use crate::error::chain;
use crate::ids::Tid;
use crate::knobs::affinity::restore::RestoreReport;
use crate::knobs::affinity::thread_cpus::ThreadCpus;
use crate::knobs::ground::Host;
use crate::plan::{Finding, Plan};
use crate::qmp::Roles;

/// How long one job may take. Its slowest step is a reload of systemd, which has 90 s; a job has two at most, and
/// waits for locks.
pub(super) const JOB_LIMIT: Duration = Duration::from_secs(240);

/// Something to do with the attachment.
#[derive(Debug)]
pub(super) enum Job {
    /// Attach the VM that was found. Always the first.
    Begin(Box<Found>),
    /// Carry out a task that was due.
    Do(Task),
    /// Take QEMU's answer.
    Learn {
        /// The threads that were listed before QEMU was asked.
        before: Vec<Tid>,
        /// What it said.
        roles: Box<Roles>,
    },
    /// Restore everything. Always the last.
    Finish,
}

/// What may become due while the VM is attached, in the order in which it is done. However often it becomes due, it is
/// done once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Task {
    /// Read the policy again, and go by it.
    Reload,
    /// Keep others off the VM's CPUs.
    Isolate,
    /// The same, where the choice between a partition and a fallback would be another one now.
    Choose,
    /// Exclude interrupts and the kernel's own work from them: the VM's own part of what the host is to be has changed.
    KeepHost,
    /// The same, where no supervisor has done so just now: interrupts and kernel threads may have been created since
    /// the last time, or another VM was started or stopped.
    CheckHost,
    /// Give vCPUs their priority, and the VM its cookie.
    Prioritise,
    /// One pass over the VM's threads.
    Pass,
}

/// What has become of a job.
#[derive(Debug)]
pub(super) enum Done {
    Begun(Result<PassReport, StartError>),
    /// `None`: QEMU has ended meanwhile, or the choice stays as it is. The error is in words.
    Isolated(Result<Option<PassReport>, String>),
    Host(Result<Checked, StartError>),
    Prioritised(Result<PassReport, PassError>),
    Passed(Result<PassReport, PassError>),
    Learnt(Result<Learnt, TasksError>),
    /// What takes effect at the next attach; or why the policy before stays in force.
    Reloaded(Result<Taken, String>),
    Finished(Result<RestoreReport, StartError>),
}

/// How the VM stands after a job.
#[derive(Debug)]
pub(super) struct Now {
    /// The plan in force.
    pub(super) plan: Plan,
    /// What there is to say about it.
    pub(super) findings: Vec<Finding>,
    /// When the choice between a partition and a fallback is to be made again.
    pub(super) choice_due: Option<Instant>,
    /// Where its threads are.
    pub(super) placed: ThreadCpus,
    /// How many changes of other programs have been mended.
    pub(super) drift_total: u64,
}

/// The end of a job.
#[derive(Debug)]
pub(super) struct Ended {
    /// What has become of it.
    pub(super) done: Done,
    /// How the VM stands; `None` where it is not attached.
    pub(super) now: Option<Box<Now>>,
    /// The CPU time that it took.
    pub(super) cost: Duration,
}

/// The worker, as the loop sees it. The thread ends when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: mpsc::Sender<Job>,
    done: tokio_mpsc::UnboundedReceiver<Ended>,
    busy_since: Option<Instant>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`StartError::Watch`] where there can be none.
    pub(super) fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        host: Host<'env>,
        settings: Settings,
        source: PolicySource<'env>,
    ) -> Result<Worker, StartError> {
        let (jobs, todo) = mpsc::channel();
        let (report, done) = tokio_mpsc::unbounded_channel();
        thread::Builder::new()
            .name("qmpin-worker".to_owned())
            .spawn_scoped(scope, move || {
                work(host, &settings, source, &todo, &report);
            })
            .map_err(|source| StartError::Watch {
                what: "the VM: no thread can be started",
                source,
            })?;
        Ok(Worker { jobs, done, busy_since: None })
    }

    /// One whose work a test does: it takes the jobs, and says what has become of them.
    #[cfg(test)]
    pub(super) fn played() -> (Worker, mpsc::Receiver<Job>, tokio_mpsc::UnboundedSender<Ended>) {
        let (jobs, todo) = mpsc::channel();
        let (report, done) = tokio_mpsc::unbounded_channel();
        (Worker { jobs, done, busy_since: None }, todo, report)
    }

    /// Gives it something to do; only where it [is idle](Worker::is_idle).
    pub(super) fn give(&mut self, job: Job) {
        self.busy_since = Some(Instant::now());
        // It ends only after this has been dropped, or with the process.
        let _ = self.jobs.send(job);
    }

    /// Whether it has nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.busy_since.is_none()
    }

    /// Whether it works on a job for longer than any job can take.
    pub(super) fn is_stuck(&self) -> bool {
        self.busy_since.is_some_and(|since| since.elapsed() > JOB_LIMIT)
    }

    /// Waits for the end of the job. Cancel safe.
    pub(super) async fn done(&mut self) -> Ended {
        // Its thread ends only with the process.
        let ended = next_message(&mut self.done).await;
        self.busy_since = None;
        ended
    }
}

fn work(
    host: Host<'_>,
    settings: &Settings,
    source: PolicySource<'_>,
    todo: &mpsc::Receiver<Job>,
    report: &tokio_mpsc::UnboundedSender<Ended>,
) {
    let mut attached: Option<Attachment<'_>> = None;
    while let Ok(job) = todo.recv() {
        let before = thread_time();
        let done = match (job, &mut attached) {
            (Job::Begin(found), _) => Done::Begun(
                Attachment::begin(host, settings.clone(), *found).map(|(begun, report)| {
                    attached = Some(begun);
                    report
                }),
            ),
            (Job::Finish, _) => match attached.take() {
                Some(attachment) => Done::Finished(attachment.finish()),
                None => continue,
            },
            (Job::Learn { before, roles }, Some(attachment)) => {
                Done::Learnt(attachment.learn(&before, *roles))
            }
            (Job::Do(task), Some(attachment)) => carry_out(attachment, task, source),
            (_, None) => continue,
        };
        let now = attached.as_ref().map(|attachment| {
            Box::new(Now {
                plan: attachment.plan().clone(),
                findings: attachment.findings(),
                choice_due: attachment.choice_due().map(Instant::from_std),
                placed: attachment.placed(),
                drift_total: attachment.drift_total(),
            })
        });
        let cost = thread_time().saturating_sub(before);
        if report.send(Ended { done, now, cost }).is_err() {
            return;
        }
    }
}

fn carry_out(attachment: &mut Attachment<'_>, task: Task, source: PolicySource<'_>) -> Done {
    match task {
        Task::Reload => Done::Reloaded(reload(attachment, source)),
        Task::Choose if !attachment.would_choose_anew() => Done::Isolated(Ok(None)),
        Task::Isolate | Task::Choose => {
            // The kernel does not restore what it changes as a partition is built.
            let remembered = attachment.remember_host().map_err(|error| chain(&error));
            Done::Isolated(remembered.and_then(|()| match attachment.isolate() {
                Ok(report) => Ok(Some(report)),
                Err(error) if error.means_gone() => Ok(None),
                Err(error) => Err(chain(&error)),
            }))
        }
        Task::KeepHost => Done::Host(attachment.keep_host().map(Box::new).map(Checked::Done)),
        Task::CheckHost => Done::Host(attachment.check_host()),
        Task::Prioritise => Done::Prioritised(attachment.prioritise()),
        Task::Pass => Done::Passed(attachment.pass()),
    }
}
