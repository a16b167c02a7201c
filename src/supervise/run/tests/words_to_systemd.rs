//! What a supervisor notifies systemd of: READY, signs of life, and STOPPING.

use super::*;
use crate::supervise::notify::heard::times;
use crate::supervise::worker::JOB_LIMIT;

const READY: &str = "READY=1";
const WATCHDOG: &str = "WATCHDOG=1";
const STOPPING: &str = "STOPPING=1";
/// More than a beat, by the step of the clock.
const BEAT_MAX: Duration = Duration::from_millis(1100);
const MINUTE: Duration = Duration::from_secs(60);

/// Signs of life since then.
fn beats_since(begun: Instant) -> Vec<Instant> {
    times(WATCHDOG).into_iter().filter(|when| *when > begun).collect()
}

/// Asserts that a sign of life has come each second until now.
fn assert_alive_since(begun: Instant) {
    let mut all = vec![begun];
    all.extend(beats_since(begun));
    all.push(Instant::now());
    let longest = all.windows(2).map(|pair| pair[1] - pair[0]).max().expect("two at least");
    assert!(longest <= BEAT_MAX, "{longest:?} of silence");
}

#[tokio::test(start_paused = true)]
async fn ready_comes_once_after_all_that_an_attach_is_about() {
    play(|mut stage| async move {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.no_job().await;
        stage.ends(Done::Begun(Ok(PassReport::default())));
        for job in ["isolate", "keep host", "prioritise", "pass"] {
            assert_eq!(stage.job().await, job);
            sleep(MINUTE).await;
            assert_eq!(times(READY), [], "{job} is under way");
            stage.does(job);
        }
        assert_eq!(stage.asked.recv().await, Some(Played::Upgrade));
        stage.no_job().await;
        assert_eq!(times(READY).len(), 1);
        stage.ticks.send(()).expect("heard");
        for job in ["check host", "pass"] {
            stage.expect(job).await;
        }
        stage.stopped().await;
        assert_eq!(times(READY).len(), 1, "systemd is notified once");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn vm_becomes_ready_although_others_cannot_be_excluded() {
    play(|stage| async move {
        assert_eq!(stage.job().await, "pass", "the first");
        stage.ends(Done::Begun(Ok(PassReport::default())));
        assert_eq!(stage.job().await, "isolate");
        stage.ends(Done::Isolated(Err("a full /run".to_owned())));
        for job in ["keep host", "prioritise", "pass"] {
            stage.expect(job).await;
        }
        stage.no_job().await;
        assert_eq!(times(READY).len(), 1);
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn signs_of_life_come_each_second_while_a_job_takes_minutes_and_end_when_it_hangs() {
    play(|mut stage| async move {
        stage.attached().await;
        let idle = Instant::now();
        sleep(MINUTE).await;
        assert_eq!(beats_since(idle), [], "an idle supervisor wakes for its timer alone");
        stage.ticks.send(()).expect("heard");
        assert_eq!(stage.job().await, "check host");
        let begun = Instant::now();
        sleep(JOB_LIMIT).await;
        assert_alive_since(begun);
        let hung = Instant::now() + BEAT_MAX;
        sleep(10 * MINUTE).await;
        // The timer is no sign of life of a worker that hangs.
        stage.ticks.send(()).expect("heard");
        sleep(10 * MINUTE).await;
        assert_eq!(beats_since(hung), [], "systemd is to end what hangs");
        stage.does("check host");
        assert_eq!(stage.job().await, "check host", "that of the second tick");
        let again = Instant::now();
        sleep(MINUTE).await;
        assert_alive_since(again);
        stage.does("check host");
        stage.expect("pass").await;
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn timer_of_an_idle_supervisor_is_its_sign_of_life() {
    play(|mut stage| async move {
        stage.attached().await;
        let begun = Instant::now();
        for _ in 0..3 {
            sleep(MINUTE).await;
            stage.ticks.send(()).expect("heard");
            for job in ["check host", "pass"] {
                stage.expect(job).await;
            }
        }
        assert_eq!(beats_since(begun).len(), 3);
        stage.stopped().await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn restore_that_takes_minutes_shows_life_and_sends_stopping_once() {
    play(|mut stage| async move {
        stage.attached().await;
        assert_eq!(times(STOPPING), []);
        stage.stop.send(()).expect("heard");
        stage.stop.send(()).expect("heard");
        assert_eq!(stage.job().await, "finish");
        let begun = Instant::now();
        sleep(3 * MINUTE).await;
        assert_alive_since(begun);
        stage.does("finish");
        stage.no_job().await;
        assert_eq!(times(STOPPING).len(), 1);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn end_of_qemu_is_not_the_end_of_the_service() {
    play(|mut stage| async move {
        stage.attached().await;
        stage.exit.send(()).expect("heard");
        stage.expect("finish").await;
        stage.no_job().await;
        assert_eq!(times(STOPPING), [], "it may go on with a VM that is started anew");
    })
    .await;
}
