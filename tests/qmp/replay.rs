//! The transcripts of `proto-notes/`, played to the session. They come from a real QEMU, so what
//! holds here holds there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::qmp_peer::{Conn, Peer, check, ourselves, run};
use crate::support::transcript::{self, Line, Transcript};
use qmpin::ids::{Tid, VcpuIndex};
use qmpin::qmp::{
    Channel, ChannelKind, ChannelPaths, EVENTS_KNOWN, GuestPosition, Happening, Limits, QmpError,
    QmpEvent, Roles, Session, Tolerated, Upgrade, lease,
};
use serde_json::Value;
use tokio::net::UnixListener;

/// What a session made of a transcript.
#[derive(Debug, Default)]
struct Outcome {
    roles: Vec<Result<Roles, QmpError>>,
    events: Vec<QmpEvent>,
    refusals: Vec<(String, String)>,
    tolerated: Tolerated,
}

/// Says what the transcript's client says, through a session.
async fn drive(session: &mut Session, transcript: &Transcript) -> Outcome {
    let mut outcome = Outcome::default();
    let mut rest = transcript.lines.as_slice();
    let mut events_due = 0;
    let mut opened = false;
    while !rest.is_empty() {
        let is_client = |line: &Line| matches!(line, Line::Client(_));
        let head = rest.iter().take_while(|line| is_client(line)).count();
        let tail = rest[head..].iter().take_while(|line| !is_client(line)).count();
        let block: Vec<&Value> = rest[..head]
            .iter()
            .filter_map(|line| match line {
                Line::Client(command) => command.as_ref(),
                Line::Server(_) => None,
            })
            .collect();
        let heard = &rest[head..head + tail];
        events_due += heard
            .iter()
            .filter(|line| matches!(line, Line::Server(message) if message.get("event").is_some()))
            .count() as u64;
        rest = &rest[head + tail..];

        let names: Vec<&str> = block.iter().map(|c| c["execute"].as_str().unwrap()).collect();
        match *names {
            [] => {}
            ["qmp_capabilities"] if !opened => {
                session.open().await.unwrap();
                opened = true;
            }
            ["qmp_capabilities", "query-cpus-fast", "query-iothreads"] => {
                outcome.roles.push(session.open_and_query_roles().await);
                opened = true;
            }
            ["query-cpus-fast", "query-iothreads"] => {
                outcome.roles.push(session.query_roles().await);
            }
            [name] => {
                let result = session.execute_raw(name.to_owned(), block[0].get("arguments")).await;
                match result {
                    Ok(_) => {}
                    Err(QmpError::Refused { class, desc, .. }) => {
                        outcome.refusals.push((class, desc));
                    }
                    Err(error) => panic!("{}: {error}", transcript.name),
                }
            }
            _ => panic!("{}: not driven here: {names:?}", transcript.name),
        }
        while opened
            && (outcome.events.len() as u64) + session.tolerated().coalesced_events < events_due
        {
            outcome.events.push(session.next_event().await.unwrap());
        }
    }
    outcome.tolerated = session.tolerated();
    outcome
}

/// Plays a transcript to a session.
async fn replay(transcript: &Transcript) -> Outcome {
    let peer = Peer::new();
    let mut session = Session::connect(peer.path(), &Limits::default()).await.unwrap();
    run(drive(&mut session, transcript), play(&peer, transcript)).await
}

async fn replay_named(name: &str) -> Outcome {
    replay(&transcript::named(name)).await
}

async fn play(peer: &Peer, transcript: &Transcript) -> Conn {
    let mut conn = peer.accept().await;
    transcript.play(&mut conn, peer.dir(), |_| ()).await;
    conn
}

/// The transcripts that a single session of ours can drive.
fn drivable() -> Vec<Transcript> {
    let not_ours = ["own-monitor-refused-", "runtime-monitor-visit-", "errors-"];
    let mut all = transcript::all();
    all.retain(|transcript| !not_ours.iter().any(|prefix| transcript.name.starts_with(prefix)));
    assert!(all.len() >= 20);
    all
}

#[tokio::test(start_paused = true)]
async fn every_transcript_passes_with_nothing_odd() {
    for transcript in drivable() {
        let outcome = replay(&transcript).await;
        let calm = Tolerated {
            coalesced_events: outcome.tolerated.coalesced_events,
            ..Tolerated::default()
        };
        assert_eq!(outcome.tolerated, calm, "{}", transcript.name);
        let heard: Vec<&str> = outcome.events.iter().map(|event| event.name.as_str()).collect();
        let sent = transcript.events();
        assert_eq!(heard.len() as u64 + calm.coalesced_events, sent.len() as u64);
        for name in sent {
            assert!(heard.contains(&name), "{}: {name} was lost", transcript.name);
        }
        assert!(outcome.events.iter().all(|event| event.timestamp_us.is_some()));
    }
}

#[tokio::test(start_paused = true)]
async fn roles_are_those_of_the_replies_sorted() {
    for transcript in drivable() {
        if transcript.name.starts_with("single-thread-") {
            continue;
        }
        let outcome = replay(&transcript).await;
        let cpus = transcript.returns("query-cpus-fast");
        let iothreads = transcript.returns("query-iothreads");
        assert_eq!(outcome.roles.len(), cpus.len());
        for (roles, (cpus, iothreads)) in outcome.roles.iter().zip(cpus.iter().zip(iothreads)) {
            let roles = roles.as_ref().unwrap();
            let mut wanted: Vec<(u64, i64)> = rows(cpus)
                .map(|row| (row["cpu-index"].as_u64().unwrap(), row["thread-id"].as_i64().unwrap()))
                .collect();
            wanted.sort_unstable();
            let got: Vec<(u64, i64)> =
                roles.vcpus.iter().map(|v| (v.index.0.into(), v.tid.0.into())).collect();
            assert_eq!(got, wanted, "{}", transcript.name);
            let mut wanted: Vec<(&str, i64)> = rows(iothreads)
                .map(|row| (row["id"].as_str().unwrap(), row["thread-id"].as_i64().unwrap()))
                .collect();
            wanted.sort_unstable();
            let got: Vec<(&str, i64)> =
                roles.iothreads.iter().map(|io| (&*io.id.0, io.tid.0.into())).collect();
            assert_eq!(got, wanted, "{}", transcript.name);
        }
    }
}

fn rows(reply: &Value) -> impl Iterator<Item = &Value> {
    reply.as_array().unwrap().iter()
}

fn tid(roles: &Result<Roles, QmpError>, index: u32) -> Option<Tid> {
    let vcpus = &roles.as_ref().unwrap().vcpus;
    vcpus.iter().find(|vcpu| vcpu.index == VcpuIndex(index)).map(|vcpu| vcpu.tid)
}

#[tokio::test(start_paused = true)]
async fn a_lease_reads_the_roles_of_a_real_vm() {
    for name in ["roles-tcg-7.2", "roles-kvm-7.2", "roles-tcg-11.1", "roles-kvm-11.1"] {
        let (peer, transcript) = (Peer::new(), transcript::named(name));
        let limits = Limits::default();
        let report = run(lease(peer.path(), ourselves, &limits), play(&peer, &transcript)).await;
        let roles = report.unwrap().roles;
        assert_eq!((roles.vcpus.len(), roles.iothreads.len()), (4, 3), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn qemu_lists_vcpus_in_the_order_they_were_plugged() {
    for version in ["7.2", "11.1"] {
        let transcript = transcript::named(&format!("hotplug-{version}"));
        let orders: Vec<Vec<i64>> = transcript
            .returns("query-cpus-fast")
            .iter()
            .map(|reply| rows(reply).map(|row| row["cpu-index"].as_i64().unwrap()).collect())
            .collect();
        assert_eq!(orders, [vec![0, 1], vec![0, 1, 2, 3], vec![0, 1, 3], vec![0, 1, 3, 2]]);
        let outcome = replay(&transcript).await;
        let last: Vec<u32> =
            outcome.roles[3].as_ref().unwrap().vcpus.iter().map(|vcpu| vcpu.index.0).collect();
        assert_eq!(last, [0, 1, 2, 3]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_vcpu_plugged_again_has_a_new_thread() {
    for name in ["hotplug-7.2", "hotplug-11.1"] {
        let roles = replay_named(name).await.roles;
        assert_eq!(tid(&roles[2], 2), None);
        assert_ne!(tid(&roles[1], 2), tid(&roles[3], 2));
        for index in [0, 1, 3] {
            assert_eq!(tid(&roles[1], index), tid(&roles[3], index));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn plug_is_reported_only_by_the_guest_s_answer() {
    for name in ["hotplug-7.2", "hotplug-11.1"] {
        let events = replay_named(name).await.events;
        let reported: Vec<(&str, Option<&str>)> = events
            .iter()
            .map(|event| {
                let device = &event.data["device"];
                let info = &event.data["info"]["device"];
                (event.name.as_str(), device.as_str().or(info.as_str()))
            })
            .collect();
        assert_eq!(
            reported,
            [
                ("ACPI_DEVICE_OST", Some("cpu3")), // for two plugs: vCPU 3's guest never answered
                ("ACPI_DEVICE_OST", Some("cpu3")),
                ("DEVICE_DELETED", None),
                ("DEVICE_DELETED", Some("cpu3")),
                ("ACPI_DEVICE_OST", None),
            ]
        );
        assert_eq!(events[0].data["info"]["slot"], "2");
    }
}

#[tokio::test(start_paused = true)]
async fn iothreads_come_and_go_without_an_event() {
    for name in ["iothreads-7.2", "iothreads-11.1"] {
        let outcome = replay_named(name).await;
        assert_eq!(outcome.events, []);
        let ids: Vec<Vec<&str>> = outcome
            .roles
            .iter()
            .map(|roles| roles.as_ref().unwrap().iothreads.iter().map(|io| &*io.id.0).collect())
            .collect();
        assert_eq!(
            ids,
            [
                vec!["iothread-virtioscsi0", "iothread-virtioscsi1"],
                vec!["iothread-virtio1", "iothread-virtioscsi0", "iothread-virtioscsi1"],
                vec!["iothread-virtio1", "iothread-virtioscsi1"],
            ]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn threads_stay_through_a_reset() {
    for name in ["reset-7.2", "reset-11.1"] {
        let outcome = replay_named(name).await;
        assert_eq!(outcome.roles[0].as_ref().unwrap(), outcome.roles[1].as_ref().unwrap());
        assert!(outcome.events.iter().all(|event| event.name == "RESET"));
        assert_eq!(outcome.events[0].data["reason"], "host-qmp-system-reset");
    }
}

#[tokio::test(start_paused = true)]
async fn stop_and_cont_are_reported() {
    for name in ["stop-cont-7.2", "stop-cont-11.1"] {
        let events = replay_named(name).await.events;
        let names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
        assert_eq!(names, ["STOP", "RESUME"]);
    }
}

#[tokio::test(start_paused = true)]
async fn life_of_the_vm_is_reported() {
    for name in ["lifecycle-7.2", "lifecycle-11.1"] {
        let events = replay_named(name).await.events;
        let mut names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
        names.retain(|name| *name != "RESET");
        assert_eq!(
            names,
            ["SUSPEND", "WAKEUP", "POWERDOWN", "SHUTDOWN", "STOP", "GUEST_PANICKED", "SHUTDOWN"]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn migration_is_reported_where_its_events_are_on() {
    for name in ["migration-7.2", "migration-11.1"] {
        let events = replay_named(name).await.events;
        assert!(events.iter().any(|event| event.name == "MIGRATION_PASS"));
        let last = events.iter().rfind(|event| event.name == "MIGRATION").unwrap();
        assert_eq!(last.data["status"], "completed");
    }
}

#[tokio::test(start_paused = true)]
async fn dies_threads_and_nodes_are_read() {
    for name in ["topology-7.2", "topology-11.1"] {
        let roles = replay_named(name).await.roles.remove(0).unwrap();
        let position = |vcpu: usize| roles.vcpus[vcpu].guest;
        let first = GuestPosition {
            socket: Some(0),
            die: Some(0),
            core: Some(0),
            thread: Some(0),
            node: Some(0),
            ..GuestPosition::default()
        };
        let first = GuestPosition { module: position(0).module, ..first };
        assert_eq!(position(0), first);
        assert_eq!(position(1), GuestPosition { thread: Some(1), ..first });
        assert_eq!(position(2), GuestPosition { core: Some(1), ..first });
        let last = GuestPosition { die: Some(1), core: Some(1), thread: Some(1), ..first };
        assert_eq!(position(7), GuestPosition { node: Some(1), ..last });
    }
    let roles = replay_named("roles-kvm-7.2").await.roles.remove(0).unwrap();
    assert!(roles.vcpus.iter().all(|vcpu| vcpu.guest.die.is_none() && vcpu.guest.node.is_none()));
}

#[tokio::test(start_paused = true)]
async fn vcpus_that_share_one_thread_are_refused() {
    for name in ["single-thread-7.2", "single-thread-11.1"] {
        let roles = replay_named(name).await.roles.remove(0);
        assert!(matches!(roles, Err(QmpError::DuplicateTid { .. })), "{roles:?}");
    }
}

/// The transcript from its negotiation on: a session of ours asks nothing before it.
fn from_negotiation(mut transcript: Transcript) -> Transcript {
    let is_negotiation =
        |line: &Line| matches!(line, Line::Client(Some(c)) if c["execute"] == "qmp_capabilities");
    let at = transcript.lines.iter().position(is_negotiation).unwrap();
    transcript.lines.drain(1..at);
    transcript
}

#[tokio::test(start_paused = true)]
async fn qemu_s_no_is_handed_on_and_an_error_without_an_id_is_not() {
    for name in ["errors-7.2", "errors-11.1"] {
        let outcome = replay(&from_negotiation(transcript::named(name))).await;
        let classes: Vec<&str> = outcome.refusals.iter().map(|(class, _)| class.as_str()).collect();
        assert_eq!(
            classes,
            ["CommandNotFound", "CommandNotFound", "GenericError", "DeviceNotFound"]
        );
        assert!(outcome.refusals[0].1.contains("already complete"));
        assert_eq!(outcome.tolerated.stray_replies, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_monitor_is_made_at_run_time_where_qemu_can() {
    let peer = Peer::new();
    let paths = ChannelPaths::proxmox(peer.dir(), &"100".parse().unwrap());
    let client = async {
        let (mut channel, roles) =
            Channel::first(paths.clone(), Limits::default(), check()).await.unwrap();
        assert_eq!((channel.kind(), roles.vcpus.len()), (ChannelKind::Lease, 4));
        assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Live));
        assert_eq!(channel.kind(), ChannelKind::RuntimeMonitor);
        assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::NotNeeded));
        assert_eq!(channel.roles().await.unwrap().vcpus.len(), 2);
        let mut names = Vec::new();
        while names.len() < 3 {
            match channel.next_event().await {
                Happening::Event(event) => names.push(event.name),
                Happening::FellBack(error) => panic!("{error}"),
            }
        }
        names
    };
    let server = async {
        play(&peer, &transcript::named("roles-kvm-11.1")).await;
        let mut own_listener = None;
        let mut visit = peer.accept().await;
        transcript::named("runtime-monitor-visit-11.1")
            .play(&mut visit, peer.dir(), |command| {
                if command["execute"] == "chardev-add" {
                    own_listener = Some(UnixListener::bind(&paths.own).unwrap());
                }
            })
            .await;
        let mut own = Conn::new(own_listener.unwrap().accept().await.unwrap().0);
        // Its last command, and the answer, are the capture script's own.
        let mut transcript = transcript::named("runtime-monitor-own-11.1");
        transcript.lines.truncate(transcript.lines.len() - 2);
        transcript.play(&mut own, peer.dir(), |_| ()).await;
        (own, visit)
    };
    assert_eq!(run(client, server).await, ["RESUME", "STOP", "RESET"]);
}

#[tokio::test(start_paused = true)]
async fn a_qemu_without_runtime_monitors_keeps_its_leases() {
    let peer = Peer::new();
    let paths = ChannelPaths::proxmox(peer.dir(), &"100".parse().unwrap());
    let client = async {
        let (mut channel, _) = Channel::first(paths, Limits::default(), check()).await.unwrap();
        assert!(matches!(channel.upgrade().await.unwrap(), Upgrade::Unsupported));
        assert_eq!(channel.kind(), ChannelKind::Lease);
        channel.roles().await.unwrap()
    };
    let server = async {
        play(&peer, &transcript::named("roles-kvm-7.2")).await;
        play(&peer, &transcript::named("own-monitor-refused-7.2")).await;
        play(&peer, &transcript::named("roles-kvm-7.2")).await
    };
    assert_eq!(run(client, server).await.vcpus.len(), 4);
}

#[test]
fn every_event_of_the_transcripts_is_known() {
    for transcript in transcript::all() {
        for event in transcript.events() {
            assert!(EVENTS_KNOWN.contains(&event), "{}: {event}", transcript.name);
        }
    }
}

#[test]
fn transcripts_name_their_qemu_and_no_other_place() {
    for transcript in transcript::all() {
        let mut lines = transcript.text.lines();
        let version = lines.nth(1).unwrap().strip_prefix("# QEMU ").unwrap();
        assert!(transcript.name.ends_with(&version[..version.rfind('.').unwrap()]));
        assert!(lines.next().unwrap().starts_with("# qemu-system-x86_64 -M q35 "));
        for foreign in ["/tmp", "/root", "/home", "qmpin-capture"] {
            assert!(!transcript.text.contains(foreign), "{}: {foreign}", transcript.name);
        }
    }
}
