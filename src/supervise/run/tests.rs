//! The loop without real processes: a test plays QEMU, the kernel's sources, the signals and the worker, and time
//! passes only when nothing else is left to do.

mod endings;
mod words_to_systemd;

use std::fs::{self, File};
use std::future::Future;
use std::sync::{Arc, mpsc};
use std::time::SystemTime;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::*;
use crate::attachment::around::Checked;
use crate::attachment::reports::{Learnt, Noticed, PassReport};
use crate::attachment::settings::Follow;
use crate::discover::VmLocation;
use crate::knobs::affinity::restore::RestoreReport;
use crate::leases::{StateDir, SupervisorLock};
use crate::policy::Policy;
use crate::qmp::{Happening, Limits, QmpEvent, Roles};
use crate::supervise::line::{Played, Said};
use crate::supervise::sources::{Played as PlayedSource, Source};
use crate::supervise::worker::Ended as JobEnded;
use crate::threads::ProcessKey;

/// Virtual time: what has not happened by then does not happen.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How long nothing may happen.
const QUIET: Duration = Duration::from_millis(400);

/// All that a test plays.
struct Stage {
    dir: tempfile::TempDir,
    _lock: SupervisorLock,
    exit: UnboundedSender<()>,
    new_threads: UnboundedSender<()>,
    leases: UnboundedSender<()>,
    ticks: UnboundedSender<()>,
    stop: UnboundedSender<()>,
    reload: UnboundedSender<()>,
    said: UnboundedSender<Said>,
    asked: UnboundedReceiver<Played>,
    jobs: mpsc::Receiver<Job>,
    done: UnboundedSender<JobEnded>,
}

struct Loop {
    runner: Runner<'static>,
    watch: Watch,
    signals: Signals,
}

fn stage() -> (Loop, Stage) {
    notify::heard::forget();
    let dir = tempfile::tempdir().expect("a folder");
    let state = StateDir::at(dir.path());
    let vm = "100".parse().expect("a name");
    let lock = state.lock_supervisor(&vm).expect("locked").expect("it is free");
    let (exit, exits) = unbounded_channel();
    let (new_threads, new_thread) = unbounded_channel();
    let (leases, lease) = unbounded_channel();
    let (ticks, tick) = unbounded_channel();
    let (stop, stops) = unbounded_channel();
    let (reload, reloads) = unbounded_channel();
    let (said, says) = unbounded_channel();
    let (ask, asked) = unbounded_channel();
    let (worker, jobs, done) = Worker::played();
    let settings = Settings {
        vm,
        location: VmLocation::Socket { path: dir.path().join("qmp") },
        state,
        policy: Policy::default(),
        limits: Limits::default(),
        follow: Follow::Stay,
        enabled: Vec::new(),
    };
    let process = ProcessKey { pid: crate::ids::Pid(1), start: crate::ids::StartTicks(1) };
    let line = Line::played(says, ask);
    let root = Box::leak(Box::new(SysRoot::live()));
    let runner = Runner::new(root, settings, process, line, lock.heart(), worker);
    let watch = Watch {
        exit: Source::Played(exits),
        new_threads: Some(Source::Played(new_thread)),
        leases: Some(Source::Played(lease)),
        slow_timer: Source::Played(tick),
    };
    let stream = |source: PlayedSource| Box::pin(UnboundedReceiverStream::new(source));
    let signals = Signals { stop: stream(stops), reload: stream(reloads) };
    let stage = Stage {
        dir,
        _lock: lock,
        exit,
        new_threads,
        leases,
        ticks,
        stop,
        reload,
        said,
        asked,
        jobs,
        done,
    };
    (Loop { runner, watch, signals }, stage)
}

/// Runs the loop beside a test, which has to end it.
async fn play<F: Future<Output = ()>>(test: impl FnOnce(Stage) -> F) -> Ended {
    let (Loop { runner, mut watch, mut signals }, stage) = stage();
    // The first job's content is the worker's to know, and here that is the test.
    let looped = runner.run(Job::Do(Task::Pass), &mut watch, &mut signals);
    let (ended, ()) = Box::pin(timeout(PATIENCE, async { tokio::join!(looped, test(stage)) }))
        .await
        .expect("it has ended");
    ended.expect("no error")
}

fn name(job: &Job) -> &'static str {
    match job {
        Job::Begin(_) => "begin",
        Job::Do(Task::Reload) => "reload",
        Job::Do(Task::Isolate) => "isolate",
        Job::Do(Task::Choose) => "choose",
        Job::Do(Task::KeepHost) => "keep host",
        Job::Do(Task::CheckHost) => "check host",
        Job::Do(Task::Prioritise) => "prioritise",
        Job::Do(Task::Pass) => "pass",
        Job::Learn { .. } => "learn",
        Job::Finish => "finish",
    }
}

fn something_unnamed() -> PassReport {
    let noticed = Noticed { unnamed: true, ..Noticed::default() };
    PassReport { noticed, ..PassReport::default() }
}

impl Stage {
    /// The next job that the loop gives.
    async fn job(&self) -> &'static str {
        loop {
            if let Ok(job) = self.jobs.try_recv() {
                return name(&job);
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// No job for a while.
    async fn no_job(&self) {
        let job = timeout(QUIET, self.job()).await;
        assert!(job.is_err(), "{job:?}");
    }

    fn ends(&self, done: Done) {
        let ended = JobEnded { done, now: None, cost: Duration::ZERO };
        self.done.send(ended).expect("the loop hears it");
    }

    /// Does what a job is about, with nothing to report.
    fn does(&self, job: &str) {
        self.ends(match job {
            "isolate" => Done::Isolated(Ok(None)),
            "keep host" => Done::Host(Ok(Checked::Done(Box::default()))),
            "check host" => Done::Host(Ok(Checked::Kept)),
            "prioritise" => Done::Prioritised(Ok(PassReport::default())),
            "pass" => Done::Passed(Ok(PassReport::default())),
            "learn" => Done::Learnt(Ok(Learnt::default())),
            "finish" => Done::Finished(Ok(RestoreReport::default())),
            job => panic!("{job}"),
        });
    }

    /// Takes the next job, which must be this one, and does it.
    async fn expect(&self, job: &str) {
        assert_eq!(self.job().await, job);
        self.does(job);
    }

    /// Attaches, and does all that follows.
    async fn attached(&mut self) {
        assert_eq!(self.job().await, "pass", "the first");
        self.ends(Done::Begun(Ok(PassReport::default())));
        for job in ["isolate", "keep host", "prioritise", "pass"] {
            self.expect(job).await;
        }
        assert_eq!(self.asked.recv().await, Some(Played::Upgrade));
        self.no_job().await;
    }

    async fn stopped(&self) {
        self.stop.send(()).expect("heard");
        self.expect("finish").await;
    }

    fn event(&self, name: &str) {
        let event = QmpEvent { name: name.to_owned(), data: ().into(), timestamp_us: None };
        self.said.send(Said::Happening(Happening::Event(event))).expect("heard");
    }
}

#[tokio::test(start_paused = true)]
async fn all_is_done_once_and_a_quiet_vm_causes_no_work() {
    let ended = play(|mut stage| async move {
        stage.attached().await;
        stage.no_job().await;
        stage.stopped().await;
    });
    assert_eq!(ended.await.why, Ending::Asked);
}

#[tokio::test(start_paused = true)]
async fn stop_during_the_attach_is_heard_and_nothing_else_is_begun() {
    let ended = play(|stage| async move {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.stop.send(()).expect("heard");
        stage.no_job().await;
        stage.ends(Done::Begun(Ok(PassReport::default())));
        stage.expect("finish").await;
    });
    assert_eq!(ended.await.why, Ending::Asked);
}

#[tokio::test(start_paused = true)]
async fn end_of_qemu_during_a_job_leads_to_one_restore_and_nothing_else() {
    let ended = play(|mut stage| async move {
        stage.attached().await;
        stage.new_threads.send(()).expect("heard");
        assert_eq!(stage.job().await, "pass");
        stage.exit.send(()).expect("heard");
        stage.stop.send(()).expect("heard");
        for source in [&stage.ticks, &stage.leases, &stage.reload] {
            source.send(()).expect("heard");
        }
        stage.no_job().await;
        stage.does("pass");
        stage.expect("finish").await;
    });
    assert_eq!(ended.await.why, Ending::QemuEnded);
}

#[tokio::test(start_paused = true)]
async fn flood_of_new_threads_costs_a_pass_each_twenty_milliseconds_and_starves_no_other_source() {
    play(|mut stage| async move {
        stage.attached().await;
        let (new_threads, begun) = (stage.new_threads.clone(), Instant::now());
        let flood = async {
            while begun.elapsed() < Duration::from_secs(1) {
                new_threads.send(()).expect("heard");
                sleep(Duration::from_micros(500)).await;
            }
        };
        let hears = async {
            let mut passes = Vec::new();
            let mut checked = None;
            while begun.elapsed() < Duration::from_secs(1) {
                if checked.is_none() && passes.len() == 1 {
                    checked = Some((Instant::now(), None));
                    stage.leases.send(()).expect("heard");
                }
                let Ok(job) = timeout(QUIET, stage.job()).await else { break };
                match (job, &mut checked) {
                    ("pass", _) => passes.push(Instant::now()),
                    ("check host", Some((_, heard))) => *heard = Some(Instant::now()),
                    other => panic!("{other:?}"),
                }
                stage.does(job);
            }
            (passes, checked)
        };
        let ((), (passes, checked)) = tokio::join!(flood, hears);
        // How many depends on the budget, which a slow machine uses up sooner.
        assert!((2..=60).contains(&passes.len()), "{}", passes.len());
        for pair in passes.windows(2) {
            // Less the step of the clock with which the test reads it.
            let gap = pair[1] - pair[0] + Duration::from_millis(1);
            assert!(gap >= LOOK_GAP, "{gap:?}");
        }
        let (sent, heard) = checked.expect("a lease has changed");
        let heard = heard.expect("it was heard of meanwhile");
        assert!(heard - sent < Duration::from_millis(50), "{:?}", heard - sent);
        while let Ok(job) = timeout(QUIET, stage.job()).await {
            stage.does(job);
        }
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn timer_checks_host_and_vm_and_tries_again_to_isolate_what_could_not_be() {
    play(|mut stage| async move {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.ends(Done::Begun(Ok(PassReport::default())));
        assert_eq!(stage.job().await, "isolate");
        stage.ends(Done::Isolated(Err("a full /run".to_owned())));
        for job in ["keep host", "prioritise", "pass"] {
            stage.expect(job).await;
        }
        assert_eq!(stage.asked.recv().await, Some(Played::Upgrade));
        stage.no_job().await;
        stage.ticks.send(()).expect("heard");
        for job in ["isolate", "check host", "pass"] {
            stage.expect(job).await;
        }
        stage.ticks.send(()).expect("heard");
        for job in ["check host", "pass"] {
            stage.expect(job).await;
        }
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn host_that_another_process_is_busy_with_is_checked_a_second_later() {
    play(|mut stage| async move {
        stage.attached().await;
        stage.leases.send(()).expect("heard");
        let begun = Instant::now();
        assert_eq!(stage.job().await, "check host");
        stage.ends(Done::Host(Ok(Checked::Busy)));
        stage.expect("pass").await;
        stage.expect("check host").await;
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(2), "{waited:?}");
        stage.expect("pass").await;
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn reload_comes_after_the_job_that_is_under_way_and_before_the_others() {
    play(|mut stage| async move {
        stage.attached().await;
        stage.ticks.send(()).expect("heard");
        assert_eq!(stage.job().await, "check host");
        stage.reload.send(()).expect("heard");
        stage.no_job().await;
        stage.does("check host");
        assert_eq!(stage.job().await, "reload");
        stage.ends(Done::Reloaded(Err("a bad line".to_owned())));
        stage.expect("pass").await;
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn qemu_is_asked_where_a_thread_has_no_name_and_ever_less_often_in_vain() {
    play(|mut stage| async move {
        stage.attached().await;
        stage.event("RESET");
        let mut asked = Vec::new();
        for _ in 0..5 {
            assert_eq!(stage.job().await, "pass");
            stage.ends(Done::Passed(Ok(something_unnamed())));
            assert_eq!(stage.asked.recv().await, Some(Played::Ask));
            asked.push(Instant::now());
            let answer = Said::Asked(Ok((Vec::new(), Roles::default())));
            stage.said.send(answer).expect("heard");
            stage.expect("learn").await;
        }
        let gaps: Vec<Duration> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps[0] >= Duration::from_millis(40), "{gaps:?}");
        assert!(gaps.windows(2).all(|pair| pair[1] > pair[0]), "{gaps:?}");
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn life_is_shown_while_a_job_takes_long_and_no_more_once_it_takes_too_long() {
    play(|mut stage| async move {
        stage.attached().await;
        let lock = Arc::new(stage.dir.path().join("100.lock"));
        let still =
            || File::open(&*lock).and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH));
        let beats = || {
            fs::metadata(&*lock).and_then(|file| file.modified()).expect("there")
                != SystemTime::UNIX_EPOCH
        };
        stage.ticks.send(()).expect("heard");
        assert_eq!(stage.job().await, "check host");
        for _ in 0..3 {
            still().expect("set");
            sleep(Duration::from_secs(60)).await;
            assert!(beats(), "a job may take minutes");
        }
        sleep(Duration::from_secs(120)).await;
        still().expect("set");
        sleep(Duration::from_secs(60)).await;
        assert!(!beats(), "systemd is to end what hangs");
        stage.does("check host");
        stage.expect("pass").await;
        stage.stopped().await;
    })
    .await;
}
