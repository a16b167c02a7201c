//! How long a lease holds a shared socket, against the bare minimum: a blocking client that
//! negotiates, asks both queries, without ids, and closes, and reads nothing of the answers but
//! their newlines. Prints ratios of medians of one run, the clients taken in turn; asserts nothing
//! about time.
//!
//! `cargo bench --bench lease_hold`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "../support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use qmpin::peer::Peer;
use qmpin::qmp::{Limits, lease};
use support::qemu::{Accel, Qemu, QemuOptions, has_kvm};

const ROUNDS: usize = 400;

const COMMANDS: [&str; 3] = [
    "{\"execute\":\"qmp_capabilities\"}\n",
    "{\"execute\":\"query-cpus-fast\"}\n",
    "{\"execute\":\"query-iothreads\"}\n",
];

/// Reads until that many lines have come.
fn lines(stream: &mut UnixStream, buffer: &mut [u8], wanted: usize) {
    let mut seen = 0;
    while seen < wanted {
        let count = stream.read(buffer).unwrap();
        assert!(count > 0);
        seen += buffer[..count].split(|&byte| byte == b'\n').count() - 1;
    }
}

/// The time from the greeting to the close, and that of the whole visit.
fn bare_minimum(path: &Path, buffer: &mut [u8], in_one_write: bool) -> [Duration; 2] {
    let start = Instant::now();
    let mut stream = UnixStream::connect(path).unwrap();
    lines(&mut stream, buffer, 1);
    let turn = Instant::now();
    if in_one_write {
        stream.write_all(COMMANDS.concat().as_bytes()).unwrap();
        lines(&mut stream, buffer, 3);
    } else {
        for command in COMMANDS {
            stream.write_all(command.as_bytes()).unwrap();
            lines(&mut stream, buffer, 1);
        }
    }
    drop(stream);
    [turn.elapsed(), start.elapsed()]
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limits = Limits::default();
    println!("us, medians of {ROUNDS}, from the greeting / of the whole visit");
    println!("vcpus  lease          minimum: one write, three writes     ratios");
    for vcpus in [4, 16, 64] {
        let accel = if has_kvm() { Accel::Kvm } else { Accel::Tcg };
        let qemu =
            Qemu::start(&QemuOptions { accel, vcpus, iothreads: 3, ..QemuOptions::default() });
        let path = qemu.paths().shared;
        let mut buffer = vec![0; 64 << 10];
        let mut times: [[Vec<Duration>; 2]; 3] = Default::default();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let accept = |_: &Peer| Ok::<(), String>(());
            let report = runtime.block_on(lease(&path, accept, &limits)).unwrap();
            let visits = [
                [report.held, start.elapsed()],
                bare_minimum(&path, &mut buffer, true),
                bare_minimum(&path, &mut buffer, false),
            ];
            for (times, visit) in times.iter_mut().zip(visits) {
                times[0].push(visit[0]);
                times[1].push(visit[1]);
            }
        }
        let [ours, one, three] = times.map(|pair| pair.map(median));
        let ratio =
            |other: [f64; 2]| format!("{:.2} / {:.2}", ours[0] / other[0], ours[1] / other[1]);
        let times = [ours, one, three].map(|pair| format!("{:>5.0} / {:<5.0}", pair[0], pair[1]));
        println!("{vcpus:>5} {}   {}, {}", times.join(" "), ratio(one), ratio(three));
    }
}
