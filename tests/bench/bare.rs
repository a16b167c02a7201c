//! The bare minimum: connect, negotiate, two queries, a `sched_setaffinity` for each vCPU. No check, no
//! undo, no plan; what any program that pins a VM by QMP must do at least.
//!
//! The same executable, run with [`MODE`], is this and nothing else.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::Deserialize;

/// The first argument that makes this executable the bare minimum: `--bare SOCKET CPU`.
pub(crate) const MODE: &str = "--bare";

/// All in one write, as qmpin does it: QEMU answers in order.
const COMMANDS: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n\
    {\"execute\":\"query-cpus-fast\"}\n{\"execute\":\"query-iothreads\"}\n";

/// What a visit has brought.
pub(crate) struct Visit {
    /// Host threads of the vCPUs.
    pub(crate) tids: Vec<i32>,
    /// From the greeting to the close.
    pub(crate) held: Duration,
}

pub(crate) fn main(args: &[String]) -> ExitCode {
    let [socket, cpu] = args else { return ExitCode::from(2) };
    let Ok(cpu) = cpu.parse() else { return ExitCode::from(2) };
    match pin(Path::new(socket), cpu) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Pins every vCPU to one CPU.
pub(crate) fn pin(socket: &Path, cpu: usize) -> io::Result<()> {
    let visit = visit(socket)?;
    let mut mask = CpuSet::new();
    mask.set(cpu)?;
    for tid in visit.tids {
        sched_setaffinity(Pid::from_raw(tid), &mask)?;
    }
    Ok(())
}

/// Asks for the vCPUs and iothreads in one visit.
pub(crate) fn visit(socket: &Path) -> io::Result<Visit> {
    let mut stream = UnixStream::connect(socket)?;
    let mut text = Vec::with_capacity(64 << 10);
    read_lines(&mut stream, &mut text, 1)?;
    let greeted = Instant::now();
    text.clear();
    stream.write_all(COMMANDS)?;
    read_lines(&mut stream, &mut text, 3)?;
    drop(stream);
    let held = greeted.elapsed();
    // The second line is the one of the vCPUs.
    let vcpus = text.split(|byte| *byte == b'\n').nth(1).unwrap_or_default();
    Ok(Visit { tids: thread_ids(vcpus)?, held })
}

fn read_lines(stream: &mut UnixStream, text: &mut Vec<u8>, lines: usize) -> io::Result<()> {
    const ROOM: usize = 32 << 10;
    let mut missing = lines;
    while missing > 0 {
        let filled = text.len();
        text.resize(filled + ROOM, 0);
        let length = stream.read(&mut text[filled..])?;
        text.truncate(filled + length);
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let ends = text[filled..].split(|byte| *byte == b'\n').count() - 1;
        missing = missing.saturating_sub(ends);
    }
    Ok(())
}

fn thread_ids(line: &[u8]) -> io::Result<Vec<i32>> {
    #[derive(Deserialize)]
    struct Reply {
        #[serde(rename = "return")]
        vcpus: Vec<Vcpu>,
    }
    #[derive(Deserialize)]
    struct Vcpu {
        #[serde(rename = "thread-id")]
        tid: i32,
    }
    let reply: Reply = serde_json::from_slice(line)?;
    Ok(reply.vcpus.iter().map(|vcpu| vcpu.tid).collect())
}
