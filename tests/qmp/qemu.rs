//! The session, leases and the channel against a real QEMU: the machine's, and a newer one from
//! `QMPIN_QEMU_ROOT`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use crate::support::qemu::{Client, Qemu, QemuOptions, newer_qemu_root, wait_until};
use crate::support::{accels, connect_at_once, skipped};
use qmpin::ids::{NodeId, Pid};
use qmpin::peer::Peer;
use qmpin::qmp::{
    AskMemory, Backend, Channel, ChannelKind, Happening, LeaseReport, Limits, MONITOR_CHARDEV_ID,
    MONITOR_OBJECT_ID, PeerCheck, QmpError, Roles, Session, Upgrade, lease,
};
use serde_json::json;

/// The bound on anything real here; a hang ends a test.
const PATIENCE: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    Limits { wait_turn_max: PATIENCE, ..Limits::default() }
}

fn only(pid: Pid) -> impl Fn(&Peer) -> Result<(), String> + Clone {
    move |peer| if peer.pid() == pid { Ok(()) } else { Err(format!("not {pid}")) }
}

fn check(qemu: &Qemu) -> PeerCheck {
    let only = only(qemu.pid());
    Box::new(move |peer| only(peer).map_err(Into::into))
}

async fn channel(qemu: &Qemu) -> (Channel, Roles) {
    Channel::first(qemu.paths(), limits(), check(qemu)).await.unwrap()
}

async fn roles(qemu: &Qemu) -> Roles {
    lease(&qemu.paths().shared, only(qemu.pid()), &limits()).await.unwrap().roles
}

fn indices(roles: &Roles) -> Vec<u32> {
    roles.vcpus.iter().map(|vcpu| vcpu.index.0).collect()
}

async fn next_event(channel: &mut Channel) -> String {
    match tokio::time::timeout(PATIENCE, channel.next_event()).await {
        Ok(Happening::Event(event)) => event.name,
        other => panic!("no event: {other:?}"),
    }
}

/// Hears until all of these have come; floods of the same are put together on the way.
async fn await_events(channel: &mut Channel, names: &[&str]) {
    let mut missing = names.to_vec();
    while !missing.is_empty() {
        let name = next_event(channel).await;
        missing.retain(|wanted| *wanted != name);
    }
}

/// The newer QEMU's tree, or says that the test is skipped.
macro_rules! newer_qemu_or_skip {
    ($test:expr) => {
        match newer_qemu_root() {
            Some(root) => root,
            None => return skipped($test, "QMPIN_QEMU_ROOT is not set"),
        }
    };
}

#[tokio::test]
async fn memory_is_reported_by_a_real_vm() {
    let memory = |qemu: Qemu| async move {
        let limits = Limits { memory: AskMemory::Yes, ..limits() };
        lease(&qemu.paths().shared, only(qemu.pid()), &limits).await.unwrap().roles.memory
    };
    let plain = memory(Qemu::start(&QemuOptions::default())).await;
    assert_eq!(plain.iter().map(|backend| backend.bytes).sum::<u64>(), 64 << 20, "{plain:?}");
    assert!(plain.iter().all(|backend| backend.on.is_empty()), "{plain:?}");
    let extra = [
        "-object",
        "memory-backend-ram,id=ram-node0,size=64M,host-nodes=0,policy=bind",
        "-numa",
        "node,nodeid=0,cpus=0,memdev=ram-node0",
    ];
    let extra = extra.map(str::to_owned).to_vec();
    let bound = memory(Qemu::start(&QemuOptions { extra, ..QemuOptions::default() })).await;
    let wanted = Backend { guest_node: Some(0), bytes: 64 << 20, on: vec![NodeId(0)] };
    assert_eq!(bound, [wanted]);
}

#[tokio::test]
async fn roles_are_the_threads_of_a_real_vm() {
    let mut roots = vec![None];
    match newer_qemu_root() {
        Some(root) => roots.push(Some(root)),
        None => skipped(
            "roles_are_the_threads_of_a_real_vm",
            "half of it, for QMPIN_QEMU_ROOT is not set",
        ),
    }
    for root in roots {
        for accel in accels("roles_are_the_threads_of_a_real_vm") {
            for vcpus in [1, 4, 16, 64] {
                let options = QemuOptions {
                    accel,
                    vcpus,
                    iothreads: 3,
                    root: root.clone(),
                    ..QemuOptions::default()
                };
                let qemu = Qemu::start(&options);
                let roles = roles(&qemu).await;
                assert_eq!(indices(&roles), (0..vcpus).collect::<Vec<u32>>());
                let threads = qemu.threads();
                for vcpu in &roles.vcpus {
                    let name = &threads[&vcpu.tid];
                    assert!(name.starts_with(&format!("CPU {}/", vcpu.index)), "{name}");
                }
                let ids: Vec<&str> = roles.iothreads.iter().map(|io| io.id.0.as_str()).collect();
                let wanted =
                    ["iothread-virtioscsi0", "iothread-virtioscsi1", "iothread-virtioscsi2"];
                assert_eq!(ids, wanted);
                for iothread in &roles.iothreads {
                    // Ids of more than twelve bytes do not fit a thread's name, so it has none.
                    assert_eq!(threads[&iothread.tid], threads[&qemu.pid().main_thread()]);
                    assert_ne!(iothread.tid, qemu.pid().main_thread());
                }
            }
        }
    }
}

#[tokio::test]
async fn roles_stay_sorted_after_a_hotplug() {
    for accel in accels("roles_stay_sorted_after_a_hotplug") {
        let options = QemuOptions { accel, vcpus: 2, vcpus_max: 6, ..QemuOptions::default() };
        let qemu = Qemu::start(&options);
        for index in [5, 2, 4] {
            qemu.client().plug_vcpu(index);
        }
        let raw = qemu.client().must("query-cpus-fast", &json!({}));
        let order: Vec<i64> =
            raw.as_array().unwrap().iter().map(|row| row["cpu-index"].as_i64().unwrap()).collect();
        assert_eq!(order, [0, 1, 5, 2, 4]);
        assert_eq!(indices(&roles(&qemu).await), [0, 1, 2, 4, 5]);
    }
}

#[tokio::test]
async fn iothreads_are_seen_to_come_and_go() {
    let qemu = Qemu::start(&QemuOptions { iothreads: 1, ..QemuOptions::default() });
    qemu.client().must("object-add", &json!({"qom-type": "iothread", "id": "iothread-virtio7"}));
    assert_eq!(roles(&qemu).await.iothreads.len(), 2);
    qemu.client().must("object-del", &json!({"id": "iothread-virtioscsi0"}));
    let roles = roles(&qemu).await;
    assert_eq!(roles.iothreads[0].id.0, "iothread-virtio7");
    assert_eq!(roles.iothreads.len(), 1);
}

#[tokio::test]
async fn a_socket_of_our_own_is_used_and_the_shared_one_never_visited() {
    let qemu = Qemu::start(&QemuOptions { vcpus: 2, own_socket: true, ..QemuOptions::default() });
    // A process that visits the shared socket now waits for ever.
    let mut holder = qemu.client();
    let (mut channel, roles) = channel(&qemu).await;
    assert_eq!(channel.kind(), ChannelKind::Socket);
    assert_eq!(indices(&roles), [0, 1]);
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::NotNeeded));
    holder.must("cont", &json!({}));
    await_events(&mut channel, &["RESUME"]).await;
    holder.must("stop", &json!({}));
    await_events(&mut channel, &["STOP"]).await;
    holder.must("system_reset", &json!({}));
    await_events(&mut channel, &["RESET"]).await;
    assert_eq!(channel.roles().await.unwrap(), roles, "the threads stay through a reset");
    assert_eq!(channel.tolerated().unknown_events, 0);
}

#[tokio::test]
async fn while_another_client_holds_the_socket_we_wait_in_one_place() {
    let qemu = Qemu::start(&QemuOptions { vcpus: 2, ..QemuOptions::default() });
    let path = qemu.paths().shared;
    let holder = qemu.client();
    let waiting = tokio::spawn({
        let (path, only) = (path.clone(), only(qemu.pid()));
        async move { lease(&path, only, &limits()).await }
    });
    tokio::task::yield_now().await; // its connect is made at its first poll
    // Two fit in the backlog. One place is left for Proxmox, and after that none.
    let proxmox = connect_at_once(&path).expect("a place is left");
    let full = connect_at_once(&path).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
    assert!(!waiting.is_finished());
    drop(holder);
    let report = waiting.await.unwrap().unwrap();
    assert_eq!(indices(&report.roles), [0, 1]);
    assert!(report.held < Limits::default().hold_max);
    drop(proxmox);
    qemu.client().must("query-status", &json!({}));
}

#[tokio::test]
async fn a_full_backlog_is_waited_for_and_the_turn_comes() {
    let qemu = Qemu::start(&QemuOptions::default());
    let path = qemu.paths().shared;
    let holder = qemu.client();
    let (first, second) = (connect_at_once(&path).unwrap(), connect_at_once(&path).unwrap());
    let waiting = tokio::spawn({
        let (path, only) = (path.clone(), only(qemu.pid()));
        async move { lease(&path, only, &limits()).await }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    drop((holder, first, second));
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_wrong_peer_hears_nothing_of_us() {
    let qemu = Qemu::start(&QemuOptions { own_socket: true, ..QemuOptions::default() });
    let error = lease(&qemu.paths().shared, only(Pid(1)), &limits()).await.unwrap_err();
    assert!(matches!(error, QmpError::WrongPeer { pid, .. } if pid == qemu.pid()), "{error}");
    let refuses_all: PeerCheck = Box::new(|_| Err("no peer is accepted".into()));
    let error = Channel::first(qemu.paths(), limits(), refuses_all).await.unwrap_err();
    assert!(matches!(error, QmpError::WrongPeer { .. }), "{error}");
}

#[tokio::test]
async fn the_end_of_qemu_is_heard_on_a_live_channel() {
    let qemu = Qemu::start(&QemuOptions { own_socket: true, ..QemuOptions::default() });
    let (mut channel, _) = channel(&qemu).await;
    qemu.kill();
    let happening = tokio::time::timeout(PATIENCE, channel.next_event()).await.unwrap();
    assert!(matches!(happening, Happening::FellBack(QmpError::Closed { .. })), "{happening:?}");
    assert_eq!(channel.kind(), ChannelKind::Lease);
    channel.roles().await.unwrap_err();
}

#[tokio::test]
async fn a_qemu_that_cannot_make_monitors_is_left_as_it_was() {
    let qemu = Qemu::start(&QemuOptions { vcpus: 2, ..QemuOptions::default() });
    let before = qemu.libraries();
    let (mut channel, _) = channel(&qemu).await;
    if !matches!(channel.upgrade().await.unwrap(), Upgrade::Unsupported) {
        return skipped("a_qemu_that_cannot_make_monitors_is_left_as_it_was", "this QEMU can");
    }
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert_eq!(qemu.libraries(), before, "the probe loads no modules");
    assert!(!qemu.paths().own.exists());
    assert_eq!(chardevs(&mut qemu.client()), ["qmp"]);
    assert_eq!(indices(&channel.roles().await.unwrap()), [0, 1]);
}

fn chardevs(client: &mut Client) -> Vec<String> {
    let rows = client.must("query-chardev", &json!({}));
    rows.as_array().unwrap().iter().map(|row| row["label"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_monitor_made_at_run_time_lives_and_goes_with_us() {
    let root = newer_qemu_or_skip!("a_monitor_made_at_run_time_lives_and_goes_with_us");
    let qemu = Qemu::start(&QemuOptions { vcpus: 2, root: Some(root), ..QemuOptions::default() });
    let before = qemu.libraries();
    let (mut channel, roles) = channel(&qemu).await;
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
    assert_eq!(channel.kind(), ChannelKind::RuntimeMonitor);
    assert_eq!(qemu.libraries(), before, "nothing of QEMU's disk files is loaded");
    assert!(!qemu.paths().own.exists(), "no file is left, even by a QEMU that is killed");

    let mut proxmox = qemu.client();
    proxmox.must("cont", &json!({}));
    await_events(&mut channel, &["RESUME"]).await;
    proxmox.must("system_reset", &json!({}));
    proxmox.must("stop", &json!({}));
    await_events(&mut channel, &["RESET", "STOP"]).await;
    assert_eq!(channel.roles().await.unwrap(), roles);

    drop(channel);
    wait_until("its chardev is gone", || chardevs(&mut proxmox) == ["qmp"]);
    let answer = proxmox.ask("object-del", &json!({"id": MONITOR_OBJECT_ID}));
    assert!(answer["error"]["desc"].as_str().unwrap().contains("not found"), "{answer}");
}

#[tokio::test]
async fn a_monitor_taken_away_leaves_leases_and_can_be_made_again() {
    let root = newer_qemu_or_skip!("a_monitor_taken_away_leaves_leases_and_can_be_made_again");
    let qemu = Qemu::start(&QemuOptions { root: Some(root), ..QemuOptions::default() });
    let (mut channel, roles) = channel(&qemu).await;
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
    let mut other = qemu.client();
    other.ask("object-del", &json!({"id": MONITOR_OBJECT_ID}));
    other.ask("chardev-remove", &json!({"id": MONITOR_CHARDEV_ID}));
    drop(other);
    let happening = tokio::time::timeout(PATIENCE, channel.next_event()).await.unwrap();
    assert!(matches!(happening, Happening::FellBack(_)), "{happening:?}");
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert_eq!(channel.roles().await.unwrap(), roles);
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
    assert_eq!(channel.roles().await.unwrap(), roles);
}

#[tokio::test]
async fn what_a_killed_qmpin_left_half_made_is_swept() {
    let root = newer_qemu_or_skip!("what_a_killed_qmpin_left_half_made_is_swept");
    let qemu = Qemu::start(&QemuOptions { root: Some(root), ..QemuOptions::default() });
    let path = qemu.paths().own.display().to_string();
    let data =
        json!({"addr": {"type": "unix", "data": {"path": path}}, "server": true, "wait": false});
    let backend = json!({"type": "socket", "data": data});
    let chardev = json!({"id": MONITOR_CHARDEV_ID, "backend": backend});
    qemu.client().must("chardev-add", &chardev);

    // A listener that never greets.
    let (mut channel, _) = channel(&qemu).await;
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert!(matches!(channel.own_socket_refused(), Some(QmpError::Timeout { .. })));
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
    assert_eq!(channel.kind(), ChannelKind::RuntimeMonitor);
    drop(channel);
    wait_until("its chardev is gone", || chardevs(&mut qemu.client()) == ["qmp"]);

    // A whole monitor that no client used: it is simply used, and goes with us.
    let mut client = qemu.client();
    client.must("chardev-add", &chardev);
    client.must(
        "object-add",
        &json!({"qom-type": "monitor-qmp", "id": MONITOR_OBJECT_ID,
            "chardev": MONITOR_CHARDEV_ID, "close-action": "delete"}),
    );
    drop(client);
    let (channel, _) = self::channel(&qemu).await;
    assert_eq!(channel.kind(), ChannelKind::Socket);
    drop(channel);
    wait_until("the monitor is gone", || !qemu.paths().own.exists());
}

#[tokio::test]
async fn what_is_at_our_own_path_and_not_ours_is_not_touched() {
    let root = newer_qemu_or_skip!("what_is_at_our_own_path_and_not_ours_is_not_touched");
    let qemu = Qemu::start(&QemuOptions { root: Some(root), ..QemuOptions::default() });
    let own = qemu.paths().own;
    std::fs::write(&own, "a file").unwrap();
    let (mut channel, _) = channel(&qemu).await;
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::OwnPathTaken));
    assert_eq!(std::fs::read_to_string(&own).unwrap(), "a file");

    std::fs::remove_file(&own).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&own).unwrap();
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::OwnPathTaken));
    assert!(matches!(channel.own_socket_refused(), Some(QmpError::WrongPeer { .. })));
    drop(listener);
    // The socket's file is still there, and no process serves it.
    assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
}

#[tokio::test]
async fn a_monitor_that_cannot_be_reached_is_taken_away_again() {
    let root = newer_qemu_or_skip!("a_monitor_that_cannot_be_reached_is_taken_away_again");
    let qemu = Qemu::start(&QemuOptions { root: Some(root), ..QemuOptions::default() });
    let (mut paths, only) = (qemu.paths(), only(qemu.pid()));

    // QEMU cannot bind there.
    paths.own = qemu.dir().join("no-such-folder/100.qmpin");
    let (mut channel, _) = Channel::first(paths.clone(), limits(), check(&qemu)).await.unwrap();
    let error = channel.upgrade().await.unwrap_err();
    assert!(matches!(error, QmpError::Refused { .. }), "{error}");
    assert_eq!(chardevs(&mut qemu.client()), ["qmp"]);

    // QEMU can, and we may not talk to whom we find there: the check changes its mind.
    paths.own = qemu.paths().own;
    let asked = std::cell::Cell::new(0);
    let fickle: PeerCheck = Box::new(move |peer| {
        asked.set(asked.get() + 1);
        if asked.get() == 3 { Err("no more".into()) } else { only(peer).map_err(Into::into) }
    });
    let (mut channel, _) = Channel::first(paths.clone(), limits(), fickle).await.unwrap();
    let error = channel.upgrade().await.unwrap_err();
    assert!(matches!(error, QmpError::WrongPeer { .. }), "{error}");
    assert_eq!(chardevs(&mut qemu.client()), ["qmp"]);
    assert!(!paths.own.exists());
    assert_eq!(channel.kind(), ChannelKind::Lease);
    channel.roles().await.unwrap();
}

#[tokio::test]
async fn the_qapi_crate_s_commands_are_executed() {
    let qemu = Qemu::start(&QemuOptions { own_socket: true, vcpus: 3, ..QemuOptions::default() });
    let mut session = Session::connect(&qemu.paths().own, &limits()).await.unwrap();
    assert_eq!(session.peer().pid(), qemu.pid());
    let greeting = session.open().await.unwrap();
    assert!(greeting.version.is_some_and(|version| version >= (6, 0, 0)), "{greeting:?}");
    let cpus = session.execute(&qapi::qmp::query_hotpluggable_cpus {}).await.unwrap();
    assert_eq!(cpus.len(), 3);
    let missing = session.execute(&qapi::qmp::object_del { id: "none".into() }).await.unwrap_err();
    assert!(matches!(missing, QmpError::Refused { .. }), "{missing}");
    assert_eq!(indices(&session.query_roles().await.unwrap()), [0, 1, 2]);
}

#[test]
fn leases_and_another_client_get_along() {
    let qemu = Qemu::start(&QemuOptions { vcpus: 4, iothreads: 1, ..QemuOptions::default() });
    let path = qemu.paths().shared;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let poller = scope.spawn(|| {
            let mut visits = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let mut client = Client::connect(&path);
                client.must("query-status", &json!({}));
                visits += 1;
            }
            visits
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let leases: Vec<Result<LeaseReport, QmpError>> = runtime.block_on(async {
            let mut leases = Vec::new();
            for _ in 0..200 {
                leases.push(lease(&path, only(qemu.pid()), &limits()).await);
            }
            leases
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(poller.join().unwrap() > 0);
        for report in leases {
            assert_eq!(report.unwrap().roles.vcpus.len(), 4);
        }
    });
}
