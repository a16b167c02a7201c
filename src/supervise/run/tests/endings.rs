//! Ends and changes at inconvenient moments: each leads to what it must exactly once, and to nothing else.

use super::*;
use crate::supervise::reload::Taken;

/// All that could lead to a job.
fn everything_happens(stage: &Stage) {
    let Stage { exit, new_threads, leases, ticks, stop, reload, .. } = stage;
    for source in [exit, new_threads, leases, ticks, stop, reload] {
        // Where the loop has ended already, it does not hear it.
        let _ = source.send(());
    }
}

#[tokio::test(start_paused = true)]
async fn end_of_qemu_while_nothing_is_done_leads_to_one_restore() {
    let ended = play(|mut stage| async move {
        stage.attached().await;
        everything_happens(&stage);
        assert_eq!(stage.job().await, "finish");
        everything_happens(&stage);
        stage.no_job().await;
        stage.does("finish");
        everything_happens(&stage);
        stage.no_job().await;
    });
    assert_eq!(ended.await.why, Ending::QemuEnded);
}

#[tokio::test(start_paused = true)]
async fn end_of_qemu_during_the_attach_leads_to_its_restore_alone() {
    let ended = play(|stage| async move {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.exit.send(()).expect("heard");
        stage.no_job().await;
        stage.ends(Done::Begun(Ok(PassReport::default())));
        stage.expect("finish").await;
        stage.no_job().await;
    });
    assert_eq!(ended.await.why, Ending::QemuEnded);
}

#[tokio::test(start_paused = true)]
async fn attach_that_fails_is_the_end_and_nothing_is_restored_twice() {
    let (Loop { runner, mut watch, mut signals }, stage) = stage();
    let looped = runner.run(Job::Do(Task::Pass), &mut watch, &mut signals);
    let test = async {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.stop.send(()).expect("heard");
        stage.no_job().await;
        let vm = "100".parse().expect("a name");
        stage.ends(Done::Begun(Err(StartError::AlreadyAttached { vm, pid: None })));
        stage.no_job().await;
    };
    let (ended, ()) = Box::pin(timeout(PATIENCE, async { tokio::join!(looped, test) }))
        .await
        .expect("it has ended");
    assert!(matches!(ended, Err(StartError::AlreadyAttached { .. })), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn answer_of_qemu_is_dropped_once_it_is_to_end() {
    let ended = play(|mut stage| async move {
        stage.attached().await;
        stage.event("DEVICE_DELETED");
        assert_eq!(stage.job().await, "pass");
        assert_eq!(stage.asked.recv().await, Some(Played::Ask));
        let answer = Said::Asked(Ok((Vec::new(), Roles::default())));
        stage.said.send(answer).expect("heard");
        stage.no_job().await;
        stage.stop.send(()).expect("heard");
        stage.no_job().await;
        stage.does("pass");
        stage.expect("finish").await;
    });
    assert_eq!(ended.await.why, Ending::Asked);
}

#[tokio::test(start_paused = true)]
async fn policy_that_was_read_during_a_pass_is_applied_from_the_beginning() {
    play(|mut stage| async move {
        stage.attached().await;
        stage.new_threads.send(()).expect("heard");
        assert_eq!(stage.job().await, "pass");
        stage.reload.send(()).expect("heard");
        stage.reload.send(()).expect("heard");
        stage.no_job().await;
        stage.does("pass");
        assert_eq!(stage.job().await, "reload", "once for both");
        let taken = Taken { policy: Box::default(), later: Vec::new() };
        stage.ends(Done::Reloaded(Ok(taken)));
        for job in ["isolate", "keep host", "prioritise", "pass"] {
            stage.expect(job).await;
        }
        stage.no_job().await;
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn flood_of_leases_leads_to_a_check_of_the_host_each_second() {
    play(|mut stage| async move {
        stage.attached().await;
        let (leases, begun) = (stage.leases.clone(), Instant::now());
        let flood = async {
            while begun.elapsed() < Duration::from_secs(5) {
                leases.send(()).expect("heard");
                sleep(Duration::from_millis(5)).await;
            }
        };
        let hears = async {
            let mut checks = Vec::new();
            let mut passes = 0;
            while let Ok(job) = timeout(2 * Duration::from_secs(1), stage.job()).await {
                match job {
                    "check host" => checks.push(Instant::now()),
                    "pass" => passes += 1,
                    other => panic!("{other}"),
                }
                stage.does(job);
            }
            (checks, passes)
        };
        let ((), (checks, passes)) = tokio::join!(flood, hears);
        assert!((5..=7).contains(&checks.len()), "{checks:?}");
        assert!(checks[0] - begun < Duration::from_millis(50), "the first is at once");
        assert!(passes >= checks.len(), "{passes}");
        for pair in checks.windows(2) {
            let gap = pair[1] - pair[0] + Duration::from_millis(50);
            assert!(gap >= Duration::from_secs(1), "{gap:?}");
        }
        stage.stopped().await;
    })
    .await;
}
