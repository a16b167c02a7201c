//! The session against peers that do as badly as they can. Time is paused: a timeout of five
//! seconds takes none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::net::UnixListener as StdListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::support::qmp_peer::{Peer, cpu, iothread, ourselves, run};
use proptest::prelude::*;
use qmpin::ids::{NodeId, VcpuIndex};
use qmpin::qmp::{
    AskMemory, Awaited, Backend, LeaseReport, Limits, QmpError, Roles, Session, lease,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use serde_json::json;
use tokio::time::Instant;

/// Connects and opens a session, and asks for the roles.
async fn roles_from(peer: &Peer) -> Result<Roles, QmpError> {
    Session::connect(peer.path(), &Limits::default()).await?.open_and_query_roles().await
}

async fn lease_from(peer: &Peer) -> Result<LeaseReport, QmpError> {
    lease(peer.path(), ourselves, &Limits::default()).await
}

fn awaits_cpus(awaited: &Awaited) -> bool {
    matches!(awaited, Awaited::Reply(name) if name == "query-cpus-fast")
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_before_the_greeting_or_to_a_wrong_peer() {
    let peer = Peer::new();
    let refuse = |_: &qmpin::peer::Peer| Err::<(), _>("it is not wanted".to_owned());
    let limits = Limits::default();
    let (result, heard) = tokio::join!(lease(peer.path(), refuse, &limits), async {
        let mut conn = peer.accept().await;
        conn.greet().await;
        conn.command().await.map(|command| command.name)
    });
    assert_error!(result, QmpError::WrongPeer { pid, .. } if u32::try_from(pid.0) == Ok(std::process::id()));
    assert_eq!(heard, None);
}

/// The memory that a peer answers with.
async fn memory_from(answer: serde_json::Value) -> Vec<Backend> {
    let peer = Peer::new();
    let limits = Limits { memory: AskMemory::Yes, ..Limits::default() };
    let report = run(lease(peer.path(), ourselves, &limits), async {
        let mut conn = peer.accept().await;
        conn.greet().await;
        for reply in [json!({}), json!([cpu(0, 10)]), json!([]), answer] {
            let command = conn.command().await.unwrap();
            conn.reply(&command, &reply).await;
        }
    });
    report.await.unwrap().roles.memory
}

#[tokio::test(start_paused = true)]
async fn memory_is_read_where_it_was_asked_for_and_nothing_depends_on_it() {
    let backend = |guest_node, bytes, on: &[u32]| Backend {
        guest_node,
        bytes,
        on: on.iter().copied().map(NodeId).collect(),
    };
    let answer = json!([
        {"id": "ram-node1", "size": 4096, "policy": "bind", "host-nodes": [1], "share": false},
        {"id": "pc.ram", "size": 8192, "policy": "default", "host-nodes": []},
        {"size": 1, "policy": "of the future", "host-nodes": [7]},
    ]);
    let wanted = [backend(Some(1), 4096, &[1]), backend(None, 8192, &[]), backend(None, 1, &[])];
    assert_eq!(memory_from(answer).await, wanted);
    let many: Vec<_> = (0..300).map(|_| json!({"size": 1})).collect();
    for of_no_use in [json!({}), json!([{"id": "ram-node0"}]), json!([{"size": -1}]), json!(many)] {
        assert_eq!(memory_from(of_no_use.clone()).await, [], "{of_no_use}");
    }
}

#[tokio::test(start_paused = true)]
async fn roles_are_sorted_and_leave_in_one_write_after_the_greeting() {
    let peer = Peer::new();
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.greet().await;
        // Nothing is answered until all three commands are here.
        let negotiation = conn.command().await.unwrap();
        let (cpus, iothreads) = (conn.command().await.unwrap(), conn.command().await.unwrap());
        assert_eq!(
            [&negotiation.name, &cpus.name, &iothreads.name],
            ["qmp_capabilities", "query-cpus-fast", "query-iothreads"]
        );
        conn.reply(&negotiation, &json!({})).await;
        conn.reply(&cpus, &json!([cpu(3, 13), cpu(0, 10), cpu(7, 17)])).await;
        conn.reply(&iothreads, &json!([iothread("b", 21), iothread("a", 20)])).await;
        conn
    })
    .await
    .unwrap();
    let vcpus: Vec<_> = report.roles.vcpus.iter().map(|vcpu| (vcpu.index.0, vcpu.tid.0)).collect();
    assert_eq!(vcpus, [(0, 10), (3, 13), (7, 17)]);
    let iothreads: Vec<_> = report.roles.iothreads.iter().map(|io| (&*io.id.0, io.tid.0)).collect();
    assert_eq!(iothreads, [("a", 20), ("b", 21)]);
}

#[tokio::test(start_paused = true)]
async fn replies_may_come_out_of_order() {
    let peer = Peer::new();
    let roles = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        let (cpus, iothreads) = conn.queries().await;
        conn.reply(&iothreads, &json!([])).await;
        conn.reply(&cpus, &json!([cpu(0, 10)])).await;
        conn
    })
    .await
    .unwrap();
    assert_eq!(roles.vcpus.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn silence_ends_in_a_timeout_that_says_what_was_awaited() {
    let peer = Peer::new();
    let start = Instant::now();
    assert_error!(
        run(roles_from(&peer), peer.accept()).await,
        QmpError::Timeout { awaited: Awaited::Greeting, limit, .. } if limit.as_secs() == 1
    );
    assert_eq!(start.elapsed().as_secs(), 1);

    let start = Instant::now();
    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        conn
    });
    assert_error!(result.await, QmpError::Timeout { awaited, .. } if awaits_cpus(&awaited));
    assert_eq!(start.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_lease_lets_go_after_a_second_whatever_the_peer_does() {
    let peer = Peer::new();
    let start = Instant::now();
    let (result, gone_after) = tokio::join!(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        while conn.command().await.is_some() {}
        start.elapsed()
    });
    assert_error!(result, QmpError::Timeout { limit, .. } if limit == Duration::from_secs(1));
    assert_eq!(gone_after.as_secs(), 1);
}

#[tokio::test(start_paused = true)]
async fn lease_waits_a_minute_for_the_monitor_with_one_connection() {
    let peer = Peer::new();
    let start = Instant::now();
    let connections = AtomicU32::new(0);
    let result = run(lease_from(&peer), async {
        let mut kept = Vec::new();
        loop {
            // A second connection would be a second place in QEMU's backlog.
            kept.push(peer.accept().await);
            connections.fetch_add(1, Ordering::Relaxed);
        }
        #[allow(unreachable_code)]
        kept
    });
    assert_error!(result.await, QmpError::Held { waited, .. } if waited == Duration::from_secs(60));
    assert_eq!(start.elapsed().as_secs(), 60);
    assert_eq!(connections.into_inner(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_turn_is_not_counted_as_holding() {
    let peer = Peer::new();
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        tokio::time::sleep(Duration::from_secs(50)).await; // paused time: another client's visit
        let (cpus, iothreads) = conn.queries().await;
        conn.reply(&cpus, &json!([cpu(0, 10)])).await;
        conn.reply(&iothreads, &json!([])).await;
        conn
    })
    .await
    .unwrap();
    assert_eq!(report.waited.as_secs(), 50);
    assert!(report.held < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_full_backlog_is_waited_for_and_takes_no_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.qmp");
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.unwrap();
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 1).unwrap();
    let listener = StdListener::from(socket);
    let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let _second = std::os::unix::net::UnixStream::connect(&path).unwrap();

    let limits = Limits::default();
    let start = Instant::now();
    let result = lease(&path, ourselves, &limits).await;
    assert_error!(result, QmpError::Held { waited, .. } if waited == Duration::from_secs(60));
    assert!(start.elapsed() <= Duration::from_secs(61));
    listener.set_nonblocking(true).unwrap();
    let waiting = std::iter::from_fn(|| listener.accept().ok()).count();
    assert_eq!(waiting, 2, "ours is not among them");
}

#[tokio::test(start_paused = true)]
async fn absent_listener_is_distinguished_from_a_held_socket() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits::default();
    let absent = lease(&dir.path().join("no.qmp"), ourselves, &limits).await.unwrap_err();
    assert!(absent.is_nobody_there(), "{absent}");
    let path = dir.path().join("dead.qmp");
    drop(StdListener::bind(&path).unwrap());
    let dead = lease(&path, ourselves, &limits).await.unwrap_err();
    assert!(dead.is_nobody_there(), "{dead}");
    assert!(!dead.leaves_session_usable());
}

#[tokio::test(start_paused = true)]
async fn half_a_greeting_is_no_greeting() {
    let peer = Peer::new();
    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.send(r#"{"QMP": {"version": {"qe"#).await;
        conn
    });
    assert_error!(result.await, QmpError::Timeout { awaited: Awaited::Greeting, .. });

    let result = run(roles_from(&peer), async {
        peer.accept().await.send(r#"{"QMP": {"ver"#).await;
    });
    assert_error!(result.await, QmpError::Closed { awaited: Awaited::Greeting, partial_bytes: 13 });

    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.send("QEMU 7.2.22 monitor - type 'help' for more information\r\n").await;
        conn
    });
    assert_error!(result.await, QmpError::NotAGreeting { excerpt, .. } if excerpt.starts_with("QEMU"));
}

#[tokio::test(start_paused = true)]
async fn an_endless_line_is_cut_at_the_limit() {
    let peer = Peer::new();
    let (result, sent) = tokio::join!(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        let bytes = vec![b'['; 64 << 10];
        let mut sent = 0;
        while conn.send(&bytes).await {
            sent += 64 << 10;
        }
        sent
    });
    assert_error!(result, QmpError::LineTooLong { limit_bytes, .. } if limit_bytes == 1 << 20);
    assert!(sent < 4 << 20, "{sent} bytes were taken");
}

#[tokio::test(start_paused = true)]
async fn a_reply_of_a_hundred_megabytes_is_refused_at_its_first() {
    let peer = Peer::new();
    let (result, sent) = tokio::join!(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        let (cpus, _) = conn.queries().await;
        conn.send(format!(r#"{{"id": {}, "return": ["#, cpus.id)).await;
        let row = format!("{},", cpu(1, 1)).repeat(1000);
        let mut sent = 0;
        while sent < 100 << 20 && conn.send(&row).await {
            sent += row.len();
        }
        conn.send("null]}\n").await;
        sent
    });
    assert_error!(result, QmpError::LineTooLong { .. });
    assert!(sent < 4 << 20, "{sent} bytes were taken");
}

#[tokio::test(start_paused = true)]
async fn a_hundred_megabytes_of_strays_pass_by() {
    let peer = Peer::new();
    let stray = format!("{{\"return\": \"{}\", \"id\": \"x\"}}\n", "x".repeat(1_000_000));
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        let (cpus, iothreads) = conn.queries().await;
        for _ in 0..100 {
            conn.send(&stray).await;
        }
        conn.reply(&cpus, &json!([cpu(0, 10)])).await;
        conn.reply(&iothreads, &json!([])).await;
        conn
    })
    .await
    .unwrap();
    assert_eq!(report.tolerated.stray_replies, 100);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_events_cannot_starve_a_reply_for_ever() {
    let peer = Peer::new();
    let flood = "{\"event\": \"NOBODY_KNOWS_ME\", \"timestamp\": {}}\n".repeat(100);
    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        while conn.send(&flood).await {}
    });
    assert_error!(result.await, QmpError::Flood { awaited, lines: 4096 } if awaits_cpus(&awaited));

    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        while conn.send(&flood).await {}
    });
    assert_error!(result.await, QmpError::Flood { awaited: Awaited::Greeting, .. });
}

#[tokio::test(start_paused = true)]
async fn unknown_events_before_a_reply_are_kept_counted_and_put_together() {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    let conn = async {
        let mut conn = peer.accept().await;
        conn.say(&json!({"event": "EARLY", "timestamp": {"seconds": -1, "microseconds": -1}}))
            .await;
        let (cpus, iothreads) = conn.queries().await;
        for number in 0..2000 {
            let timestamp = json!({"seconds": 5, "microseconds": number});
            conn.say(&json!({"event": "NEW_IN_QEMU_99", "timestamp": timestamp, "data": {}})).await;
        }
        conn.reply(&cpus, &json!([cpu(0, 10)])).await;
        conn.reply(&iothreads, &json!([])).await;
        conn
    };
    run(session.open_and_query_roles(), conn).await.unwrap();
    let tolerated = session.tolerated();
    assert_eq!(tolerated.unknown_events, 2001);
    assert_eq!(tolerated.coalesced_events, 1999);
    assert_eq!(tolerated.events_before_greeting, 1);
    assert_eq!(tolerated.bad_timestamps, 1);
    assert_eq!(session.next_event().await.unwrap().name, "EARLY");
    let event = session.next_event().await.unwrap();
    assert_eq!((event.name.as_str(), event.timestamp_us), ("NEW_IN_QEMU_99", Some(5_001_999)));
}

#[tokio::test(start_paused = true)]
async fn close_in_mid_reply_says_where() {
    let peer = Peer::new();
    let result = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        conn.send(r#"{"return": ["#).await;
    });
    let error = result.await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "QEMU closed the connection while the reply to query-cpus-fast was awaited, \
         12 bytes into a line"
    );
}

#[tokio::test(start_paused = true)]
async fn strays_and_errors_without_an_id_are_dropped_and_counted() {
    let peer = Peer::new();
    let error = json!({"class": "GenericError", "desc": "not for you"});
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.say(&json!({"return": {"stray": "before the greeting"}, "id": "qmpin-1-1"})).await;
        let (cpus, iothreads) = conn.queries().await;
        conn.say(&json!({"return": [cpu(66, 66)]})).await;
        conn.say(&json!({"return": [cpu(66, 66)], "id": 7})).await;
        conn.say(&json!({"error": error})).await;
        conn.say(&json!({"error": error, "id": "another-client"})).await;
        conn.say(&json!({"new-in-qemu-99": true})).await;
        conn.send("\r\n").await;
        conn.reply(&cpus, &json!([cpu(0, 10)])).await;
        // The same id once more is a stray, too.
        conn.reply(&cpus, &json!([cpu(66, 66)])).await;
        conn.reply(&iothreads, &json!([])).await;
        conn
    })
    .await
    .unwrap();
    assert_eq!(report.roles.vcpus[0].index, VcpuIndex(0));
    assert_eq!(report.tolerated.stray_replies, 6);
    assert_eq!(report.tolerated.unknown_lines, 2);
}

#[tokio::test(start_paused = true)]
async fn replies_that_all_lack_their_id_end_in_a_timeout_that_tells() {
    let peer = Peer::new();
    let result = run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        conn.say(&json!({"return": [cpu(0, 10)]})).await;
        conn.say(&json!({"return": []})).await;
        conn
    });
    let error = result.await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "timeout: the reply to query-cpus-fast did not come within 5000 ms \
         (2 replies without an id of ours were dropped)"
    );
}

#[tokio::test(start_paused = true)]
async fn session_that_was_negotiated_already_is_used() {
    let peer = Peer::new();
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.greet().await;
        let negotiation = conn.command().await.unwrap();
        let error = json!({"class": "CommandNotFound", "desc": "already complete"});
        conn.say(&json!({"error": error, "id": negotiation.id})).await;
        conn.roles(&json!([cpu(0, 10)]), &json!([])).await;
        conn
    })
    .await
    .unwrap();
    assert_eq!(report.tolerated.already_negotiated, 1);
}

#[tokio::test(start_paused = true)]
async fn qemu_saying_no_leaves_the_session_open_and_a_timeout_ends_it() {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    let client = async {
        session.open().await.unwrap();
        let refused = session.execute_raw("device_del", Some(&json!({"id": "x"}))).await;
        assert_error!(refused, QmpError::Refused { class, desc, .. }
            if class == "DeviceNotFound" && desc == "no\\u{1b} x");
        assert_eq!(
            session.execute_raw("query-status", None).await.unwrap(),
            json!({"running": true})
        );
        assert_error!(session.execute_raw("stop", None).await, QmpError::Timeout { .. });
        assert!(session.has_ended());
        let ended = session.query_roles().await.unwrap_err();
        assert!(ended.to_string().contains("the reply to stop did not come"), "{ended}");
        assert_error!(session.next_event().await, QmpError::Ended { .. });
    };
    let server = async {
        let mut conn = peer.accept_and_open().await;
        let command = conn.command().await.unwrap();
        assert_eq!(command.arguments, json!({"id": "x"}));
        let error = json!({"class": "DeviceNotFound", "desc": "no\u{1b} x"});
        conn.say(&json!({"error": error, "id": command.id})).await;
        let command = conn.command().await.unwrap();
        conn.reply(&command, &json!({"running": true})).await;
        conn.command().await.unwrap();
        conn
    };
    run(client, server).await;
}

#[tokio::test(start_paused = true)]
async fn commands_in_the_wrong_order_are_refused_here() {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    assert_error!(session.query_roles().await, QmpError::WrongState { .. });
    let client = async {
        session.open().await.unwrap();
        assert_error!(session.open().await, QmpError::WrongState { .. });
        assert!(!session.has_ended());
    };
    run(client, peer.accept_and_open()).await;
}

#[tokio::test(start_paused = true)]
async fn waiting_for_events_may_be_broken_off_anywhere() {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    let client = async {
        session.open().await.unwrap();
        let mut names = Vec::new();
        while names.len() < 50 {
            let patience = Duration::from_micros(300);
            if let Ok(event) = tokio::time::timeout(patience, session.next_event()).await {
                names.push(event.unwrap().data["number"].as_u64().unwrap());
            }
        }
        names
    };
    let server = async {
        let mut conn = peer.accept_and_open().await;
        for number in 0..50 {
            let event = json!({"event": "RESET", "data": {"number": number}}).to_string() + "\r\n";
            let (head, tail) = event.split_at(event.len() / 2);
            conn.send(head).await;
            tokio::time::sleep(Duration::from_millis(1)).await; // paused time
            conn.send(tail).await;
        }
        conn
    };
    assert_eq!(run(client, server).await, (0..50).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_command_s_reply_is_a_stray_for_the_next() {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    let client = async {
        session.open().await.unwrap();
        let patience = Duration::from_millis(10);
        let dropped = tokio::time::timeout(patience, session.execute_raw("slow", None)).await;
        assert!(dropped.is_err());
        assert_eq!(session.execute_raw("quick", None).await.unwrap(), json!("quick"));
        assert_eq!(session.tolerated().stray_replies, 1);
    };
    let server = async {
        let mut conn = peer.accept_and_open().await;
        let slow = conn.command().await.unwrap();
        let quick = conn.command().await.unwrap();
        conn.reply(&slow, &json!("slow")).await;
        conn.reply(&quick, &json!("quick")).await;
        conn
    };
    run(client, server).await;
}

#[tokio::test(start_paused = true)]
async fn deep_nesting_and_bad_utf_8_end_in_an_error() {
    let peer = Peer::new();
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let nasty = [
        deep.into_bytes(),
        b"[{\"qom-path\": \"\xff\", \"cpu-index\": 0, \"thread-id\": 1}]".into(),
    ];
    for content in nasty {
        let result = run(roles_from(&peer), async {
            let mut conn = peer.accept().await;
            let (cpus, iothreads) = conn.queries().await;
            let head = format!("{{\"id\": {}, \"return\": ", cpus.id).into_bytes();
            conn.send([&head, &content, b"}\n".as_slice()].concat()).await;
            conn.reply(&iothreads, &json!([])).await;
            conn
        });
        assert_error!(result.await, QmpError::BadReply { .. });
    }
    // In an event there is nothing to lose but its data.
    let event = [
        b"{\"event\": \"RESET\", \"data\": ".as_slice(),
        &b"[".repeat(2000),
        &b"]".repeat(2000),
        b"}\n",
    ];
    let report = run(lease_from(&peer), async {
        let mut conn = peer.accept().await;
        let (cpus, iothreads) = conn.queries().await;
        conn.send(event.concat()).await;
        conn.reply(&cpus, &json!([])).await;
        conn.reply(&iothreads, &json!([])).await;
        conn
    });
    assert_eq!(report.await.unwrap().tolerated.stripped_events, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_the_peer_says_the_session_ends_in_time_and_never_panics(
        chunks in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            Just(b"{\"QMP\": {}}\r\n".to_vec()),
            Just(b"{\"event\": \"RESET\"}\r\n".to_vec()),
            Just(b"{\"return\": []}\r\n".to_vec()),
            Just(b"{\"error\": {}, \"id\": null}\r\n".to_vec()),
            Just(b"\n".to_vec()),
        ], 0..12),
        close in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let peer = Peer::new();
            let start = Instant::now();
            let result = run(roles_from(&peer), async {
                let mut conn = peer.accept().await;
                for chunk in &chunks {
                    conn.send(chunk).await;
                }
                (!close).then_some(conn)
            });
            assert!(result.await.is_err());
            assert!(start.elapsed() <= Duration::from_secs(6));
        });
    }
}
