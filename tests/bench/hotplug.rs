//! From the creation of a thread, as the kernel's process connector dates it, until it is where its role
//! belongs. A thread is created with the mask of the emulator, which is another.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{sleep, spawn};
use std::time::Duration;

use nix::sys::socket::{self, MsgFlags, NetlinkAddr};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use qmpin::ids::{Pid, Tid};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with, sockopt};
use serde_json::json;

use crate::figures::{Samples, Table};
use crate::qemu::{Client, QemuOptions};
use crate::vm::{PATIENCE, Vm, await_placed, emulator_cpu, stop, vcpu_cpu};

const IOTHREADS: usize = 100;
const VCPUS: u32 = 16;
/// Threads are plugged one after the other, as an administrator does.
const PAUSE: Duration = Duration::from_millis(300);

pub(crate) fn measure(table: &mut Table) {
    // Of its own, so that qmpin has the shared socket to itself.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bench.qmp");
    let vm = Vm::start(QemuOptions {
        vcpus: 1,
        vcpus_max: VCPUS + 1,
        extra: vec!["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())],
        ..QemuOptions::default()
    });
    let placements = match watch_births(vm.qemu.pid()) {
        Ok(placements) => placements,
        Err(error) => return table.skipped("hotplugged threads", &error.to_string()),
    };
    let mut client = Client::connect(&socket);
    let qmpin = vm.attach().spawn().unwrap();
    await_placed(vm.last_vcpu(), vcpu_cpu()).expect("attached");
    await_placed(vm.qemu.pid().main_thread(), emulator_cpu()).expect("attached");
    sleep(PAUSE);

    let mut iothreads = Samples::default();
    for number in 0..IOTHREADS {
        let id = format!("plugged{number}");
        client.must("object-add", &json!({"qom-type": "iothread", "id": id}));
        iothreads.add(next(&placements));
        client.must("object-del", &json!({"id": id}));
        sleep(PAUSE);
    }
    let what = format!("{IOTHREADS} hotplugged iothreads, created to placed");
    table.alone(&what, &iothreads, "median and worst");

    let mut vcpus = Samples::default();
    for index in 1..=VCPUS {
        client.plug_vcpu(index);
        vcpus.add(next(&placements));
        sleep(PAUSE);
    }
    let what = format!("{VCPUS} hotplugged vCPUs, created to placed");
    table.alone(&what, &vcpus, "median and worst");
    stop(qmpin);
}

fn next(placements: &Receiver<Duration>) -> Duration {
    placements.recv_timeout(PATIENCE).expect("placed in time")
}

/// Sends, for every thread the process is given from now on, how long it was until it was placed.
fn watch_births(process: Pid) -> io::Result<Receiver<Duration>> {
    // `drivers/connector/cn_proc.c`: an nlmsghdr of 16 bytes, a cn_msg of 20, and the event.
    const CN_IDX_PROC: u32 = 1;
    const LISTEN: u32 = 1;
    let (flags, protocol) = (SocketFlags::CLOEXEC, Some(netlink::CONNECTOR));
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    sockopt::set_socket_recv_buffer_size(&socket, 4 << 20)?;
    socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, CN_IDX_PROC))?;
    let words = [40, 3, 0, 0, CN_IDX_PROC, 1, 0, 0, 4, LISTEN];
    let message: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
    socket::send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let (sender, receiver) = channel();
    spawn(move || follow(&socket, process, &sender));
    Ok(receiver)
}

fn follow(socket: &OwnedFd, process: Pid, placements: &Sender<Duration>) {
    const FORK: u32 = 1;
    // A thread's slack is its own; children inherit it, but this one was made before anything else.
    let _ = nix::sys::prctl::set_timerslack(1);
    let mut message = [0; 256];
    loop {
        let Ok(length) = socket::recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()) else {
            continue; // some were lost; the one that is waited for may be among them, then it is said
        };
        let message = &message[..length];
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?))
        };
        let (Some(FORK), Some(tid), Some(tgid)) = (word(36), word(60), word(64)) else { continue };
        if i32::try_from(tgid) != Ok(process.0) {
            continue;
        }
        let born_ns = u64::from_ne_bytes(message[44..52].try_into().unwrap());
        let tid = Tid(i32::try_from(tid).unwrap());
        if await_placed(tid, vcpu_cpu()).is_none() {
            return;
        }
        let now = Duration::from(clock_now());
        if placements.send(now.saturating_sub(Duration::from_nanos(born_ns))).is_err() {
            return;
        }
    }
}

fn clock_now() -> TimeSpec {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()
}
