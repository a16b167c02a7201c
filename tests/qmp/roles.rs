//! What is believed of the replies to the two queries, and what is not. Time is paused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::qmp_peer::{Peer, cpu, iothread, run};
use qmpin::ids::{Tid, VcpuIndex};
use qmpin::qmp::{Limits, QmpError, Roles, Session};
use serde_json::{Value, json};

/// Connects and opens a session, and asks for the roles.
async fn roles_from(peer: &Peer) -> Result<Roles, QmpError> {
    Session::connect(peer.path(), &Limits::default()).await?.open_and_query_roles().await
}

/// The roles that come of these two replies.
async fn roles_of(cpus: Value, iothreads: Value) -> Result<Roles, QmpError> {
    let peer = Peer::new();
    run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        let (first, second) = conn.queries().await;
        conn.reply(&first, &cpus).await;
        conn.reply(&second, &iothreads).await;
        conn
    })
    .await
}

/// What comes of raw bytes in place of the reply to the first query.
async fn roles_of_bytes(bytes: impl AsRef<[u8]>) -> Result<Roles, QmpError> {
    let peer = Peer::new();
    run(roles_from(&peer), async {
        let mut conn = peer.accept().await;
        conn.queries().await;
        conn.send(bytes).await;
        conn
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn more_vcpus_or_iothreads_than_the_limit_are_refused() {
    let many = |count: i64| (0..count).map(|n| cpu(n, n + 1)).collect::<Value>();
    assert_eq!(roles_of(many(4096), json!([])).await.unwrap().vcpus.len(), 4096);
    assert_error!(
        roles_of(many(4097), json!([])).await,
        QmpError::TooManyVcpus { count: 4097, limit: 4096 }
    );
    let many = |count: i64| (1..=count).map(|n| iothread(&format!("io{n}"), n)).collect::<Value>();
    assert_eq!(roles_of(json!([]), many(1024)).await.unwrap().iothreads.len(), 1024);
    assert_error!(
        roles_of(json!([]), many(1025)).await,
        QmpError::TooManyIothreads { count: 1025, .. }
    );
}

#[tokio::test(start_paused = true)]
async fn twins_are_refused() {
    let none = json!([]);
    assert_error!(
        roles_of(json!([cpu(1, 5), cpu(0, 4), cpu(1, 6)]), none.clone()).await,
        QmpError::DuplicateVcpu { index: VcpuIndex(1) }
    );
    assert_error!(
        roles_of(json!([cpu(0, 5), cpu(1, 5)]), none.clone()).await,
        QmpError::DuplicateTid { tid: Tid(5) }
    );
    assert_error!(
        roles_of(json!([cpu(0, 5)]), json!([iothread("a", 5)])).await,
        QmpError::DuplicateTid { tid: Tid(5) }
    );
    assert_error!(
        roles_of(none, json!([iothread("a", 5), iothread("a", 6)])).await,
        QmpError::DuplicateIothread { .. }
    );
}

#[tokio::test(start_paused = true)]
async fn numbers_that_cannot_be_are_refused() {
    for tid in [0, -1, i64::MIN, i64::from(i32::MAX) + 1] {
        assert_error!(roles_of(json!([cpu(0, tid)]), json!([])).await, QmpError::BadTid { .. });
        assert_error!(
            roles_of(json!([]), json!([iothread("a", tid)])).await,
            QmpError::BadTid { .. }
        );
    }
    for index in [-1, 4096, i64::MAX] {
        assert_error!(
            roles_of(json!([cpu(index, 1)]), json!([])).await,
            QmpError::BadVcpuNumber { .. }
        );
    }
    let mut odd = cpu(0, 1);
    odd["props"]["core-id"] = json!(-3);
    assert_error!(
        roles_of(json!([odd]), json!([])).await,
        QmpError::BadVcpuNumber { member: "core-id", value: -3 }
    );
    for id in ["", "a b", "a\n", "\u{1b}[2J", "../x", &"x".repeat(257)] {
        let result = roles_of(json!([]), json!([iothread(id, 1)])).await;
        assert_error!(result, QmpError::BadIothreadId { .. });
    }
}

#[tokio::test(start_paused = true)]
async fn reply_of_another_shape_is_distinguished_from_bad_json() {
    for odd in
        [json!({}), json!(7), json!([7]), json!([{}]), json!(null), json!([{"cpu-index": "0"}])]
    {
        let result = roles_of(odd, json!([])).await;
        assert_error!(result, QmpError::BadReply { command, .. } if command == "query-cpus-fast");
    }
    for bad in
        ["}\n", "[]\n", "{\"return\": [}\n", "\u{feff}{}\n", "{\"return\": 1, \"return\": 2}\n"]
    {
        assert_error!(roles_of_bytes(bad).await, QmpError::BadJson { .. });
    }
    assert_error!(roles_of_bytes(b"\xff\xfe\n").await, QmpError::BadJson { .. });
}

#[tokio::test(start_paused = true)]
async fn members_and_targets_of_the_future_are_tolerated() {
    let mut row = cpu(0, 10);
    row["target"] = json!("quantum64");
    row["new-member"] = json!({"deep": [1, 2]});
    row["props"]["galaxy-id"] = json!(1);
    let mut io = iothread("a", 11);
    io["poll-weight"] = json!(3);
    let roles = roles_of(json!([row]), json!([io])).await.unwrap();
    assert_eq!((roles.vcpus.len(), roles.iothreads.len()), (1, 1));
}
