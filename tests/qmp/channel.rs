//! The channel's order of fallbacks against peers in this process: which socket is taken, and what happens when
//! it goes. With a real QEMU: `qmp_qemu.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use crate::support::qmp_peer::{Conn, Peer, check, cpu, run};
use qmpin::qmp::{Channel, ChannelKind, ChannelPaths, Happening, Limits, QmpError, Upgrade};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::time::{Instant, timeout};

fn paths(peer: &Peer) -> ChannelPaths {
    ChannelPaths::proxmox(peer.dir(), &"100".parse().unwrap())
}

async fn first(peer: &Peer) -> Channel {
    Channel::first(paths(peer), Limits::default(), check()).await.unwrap().0
}

/// Serves the roles of a VM with one vCPU on a connection that is to be opened first.
async fn open_and_serve(conn: &mut Conn, tid: i64) {
    let (cpus, iothreads) = conn.queries().await;
    conn.reply(&cpus, &json!([cpu(0, tid)])).await;
    conn.reply(&iothreads, &json!([])).await;
}

async fn lease_served(peer: &Peer, tid: i64) {
    open_and_serve(&mut peer.accept().await, tid).await;
}

#[test]
fn our_own_socket_is_beside_the_shared_one() {
    let proxmox = ChannelPaths::proxmox("/run/qemu-server".as_ref(), &"100".parse().unwrap());
    assert_eq!(proxmox.shared.to_str(), Some("/run/qemu-server/100.qmp"));
    assert_eq!(proxmox.own.to_str(), Some("/run/qemu-server/100.qmpin"));
    let plain = ChannelPaths::plain("/tmp/vm.sock".as_ref());
    assert_eq!(plain.own.to_str(), Some("/tmp/vm.sock.qmpin"));
}

#[test]
fn kinds_have_the_names_of_the_documents() {
    let kinds = [ChannelKind::Lease, ChannelKind::Socket, ChannelKind::RuntimeMonitor];
    let names = serde_json::to_value(kinds).unwrap();
    assert_eq!(names, json!(["lease", "socket", "runtime-monitor"]));
}

#[tokio::test(start_paused = true)]
async fn a_live_session_that_dies_in_a_query_is_replaced_by_a_lease_at_once() {
    let peer = Peer::new();
    let own = UnixListener::bind(paths(&peer).own).unwrap();
    let client = async {
        let mut channel = first(&peer).await;
        assert_eq!(channel.kind(), ChannelKind::Socket);
        let roles = channel.roles().await.unwrap();
        assert_eq!((roles.vcpus[0].tid.0, channel.kind()), (22, ChannelKind::Lease));
    };
    let server = async {
        let mut conn = Conn::new(own.accept().await.unwrap().0);
        open_and_serve(&mut conn, 11).await;
        drop(conn);
        lease_served(&peer, 22).await;
    };
    run(client, server).await;
}

#[tokio::test(start_paused = true)]
async fn a_live_session_that_dies_says_so_once_and_then_there_is_silence() {
    let peer = Peer::new();
    let own = UnixListener::bind(paths(&peer).own).unwrap();
    let client = async {
        let mut channel = first(&peer).await;
        let happening = channel.next_event().await;
        assert!(matches!(happening, Happening::FellBack(QmpError::Closed { .. })), "{happening:?}");
        assert_eq!(channel.kind(), ChannelKind::Lease);
        assert!(timeout(Duration::from_secs(3600), channel.next_event()).await.is_err());
        // Our own socket is still there: back to it.
        assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
        assert_eq!(channel.kind(), ChannelKind::Socket);
    };
    let server = async {
        for _ in 0..2 {
            let mut conn = Conn::new(own.accept().await.unwrap().0);
            open_and_serve(&mut conn, 11).await;
        }
    };
    run(client, server).await;
}

#[tokio::test(start_paused = true)]
async fn an_own_socket_that_is_silent_costs_a_second_and_not_the_answer() {
    let peer = Peer::new();
    let _own = UnixListener::bind(paths(&peer).own).unwrap();
    let start = Instant::now();
    let channel = run(first(&peer), lease_served(&peer, 22)).await;
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert!(matches!(channel.own_socket_refused(), Some(QmpError::Timeout { .. })));
    assert_eq!(start.elapsed().as_secs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lie_on_our_own_socket_leads_to_a_lease() {
    let peer = Peer::new();
    let own = UnixListener::bind(paths(&peer).own).unwrap();
    let server = async {
        let mut conn = Conn::new(own.accept().await.unwrap().0);
        open_and_serve(&mut conn, -1).await;
        lease_served(&peer, 22).await;
        conn
    };
    let channel = run(first(&peer), server).await;
    assert_eq!(channel.kind(), ChannelKind::Lease);
    assert!(matches!(channel.own_socket_refused(), Some(QmpError::BadTid { tid: -1, .. })));
}

#[tokio::test(start_paused = true)]
async fn a_live_session_survives_an_answer_that_is_of_no_use() {
    let peer = Peer::new();
    let own = UnixListener::bind(paths(&peer).own).unwrap();
    let client = async {
        let mut channel = first(&peer).await;
        assert!(matches!(channel.roles().await, Err(QmpError::BadTid { .. })));
        assert_eq!(channel.kind(), ChannelKind::Socket);
        assert_eq!(channel.roles().await.unwrap().vcpus[0].tid.0, 33);
    };
    let server = async {
        let mut conn = Conn::new(own.accept().await.unwrap().0);
        open_and_serve(&mut conn, 11).await;
        conn.roles(&json!([cpu(0, 0)]), &json!([])).await;
        conn.roles(&json!([cpu(0, 33)]), &json!([])).await;
        conn
    };
    run(client, server).await;
}

#[tokio::test(start_paused = true)]
async fn plain_socket_that_no_other_client_needs_is_held() {
    let peer = Peer::new();
    let both = ChannelPaths { shared: peer.path().to_owned(), own: peer.path().to_owned() };
    let client = async {
        let (mut channel, _) = Channel::first(both, Limits::default(), check()).await.unwrap();
        assert_eq!(channel.kind(), ChannelKind::Socket);
        match channel.next_event().await {
            Happening::Event(event) => event.name,
            Happening::FellBack(error) => panic!("{error}"),
        }
    };
    let server = async {
        let mut conn = peer.accept().await;
        open_and_serve(&mut conn, 11).await;
        conn.say(&json!({"event": "STOP"})).await;
        conn
    };
    assert_eq!(run(client, server).await, "STOP");
}
