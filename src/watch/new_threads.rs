//! Thread creation, by the kernel's process connector (`drivers/connector/cn_proc.c`,
//! `include/uapi/linux/cn_proc.h`).
//!
//! The connector reports every fork on the host. A socket filter drops, in the kernel, all that is not
//! a new thread of our process, so that an idle VM causes no wake-up. Messages can be lost under load: they
//! are hints.
//!
//! ```text
//!   nlmsghdr 16 | cn_msg 20 | what 4, cpu 4, time 8 | parent pid, tgid | child pid, tgid
//!   0             16          36                      52                 60         64
//! ```

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _};

use crate::ids::{Pid, Tid};
use crate::sys::{self, Readable};
use nix::libc::sock_filter;
use nix::sys::socket::{self, MsgFlags, NetlinkAddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with, sockopt};

const CN_IDX_PROC: u32 = 1;
const CN_VAL_PROC: u32 = 1;
const PROC_CN_MCAST_LISTEN: u32 = 1;
const PROC_EVENT_FORK: u32 = 1;
const WHAT_AT: usize = 36;
const CHILD_PID_AT: usize = 60;
const CHILD_TGID_AT: usize = 64;
/// The size of the socket's buffer: some messages. Each message that is queued wakes this process, also while it does
/// not read any; messages that do not fit are reported once, all together.
const BUFFER_BYTES: usize = 4096;
/// More messages than the kernel keeps.
const DRAINED_MAX: usize = 64;

/// Tells of new threads of one process.
#[derive(Debug)]
pub struct NewThreads {
    socket: Readable,
    process: Pid,
}

impl NewThreads {
    /// Subscribes. It must be called within a tokio runtime.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` (Linux < 6.6), `EPROTONOSUPPORT` where the kernel has no
    /// connector, `ECONNREFUSED` outside the first network or pid namespace.
    pub fn of(process: Pid) -> io::Result<NewThreads> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let protocol = Some(netlink::CONNECTOR);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
        sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES)?;
        // The filter comes before the subscription: not one foreign message is queued.
        sys::attach_filter(socket.as_fd(), &filter(process))?;
        socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, CN_IDX_PROC))?;
        let listen = listen_message();
        let sent = socket::send(socket.as_raw_fd(), &listen, MsgFlags::empty())?;
        if sent != listen.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the subscription was cut short"));
        }
        let socket = Readable::new(socket)?;
        Ok(NewThreads { socket, process })
    }

    /// The next new thread. `None`: messages were lost, so there may have been some. Cancel safe.
    ///
    /// # Errors
    /// The socket's; it is of no more use then.
    pub async fn next(&mut self) -> io::Result<Option<Tid>> {
        let mut message = [0_u8; 256];
        loop {
            let received = self.socket.read(|socket| {
                Ok(socket::recv(socket.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT)?)
            });
            match received.await {
                Ok(length) => {
                    if let Some(tid) = new_thread(&message[..length], self.process) {
                        return Ok(Some(tid));
                    }
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Drops what has come so far: a pass that begins after this sees these threads.
    pub fn drain(&self) {
        let mut message = [0_u8; 256];
        // The kernel keeps a few of them, and then reports that some were lost.
        for _ in 0..DRAINED_MAX {
            let socket = self.socket.as_fd().as_raw_fd();
            if socket::recv(socket, &mut message, MsgFlags::MSG_DONTWAIT).is_err() {
                return;
            }
        }
    }
}

fn new_thread(message: &[u8], process: Pid) -> Option<Tid> {
    let number = |at: usize| {
        let bytes = message.get(at..at + size_of::<u32>())?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let of_process = number(CHILD_TGID_AT)? == u32::try_from(process.0).ok()?;
    let tid = i32::try_from(number(CHILD_PID_AT)?).ok()?;
    (number(WHAT_AT)? == PROC_EVENT_FORK && of_process).then_some(Tid(tid))
}

/// Subscribes: `struct nlmsghdr`, `struct cn_msg`, `enum proc_cn_mcast_op`, in the host's byte order.
fn listen_message() -> Vec<u8> {
    const NLMSG_DONE: u16 = 3;
    let mut message = Vec::with_capacity(40);
    message.extend_from_slice(&40_u32.to_ne_bytes()); // length of all
    message.extend_from_slice(&NLMSG_DONE.to_ne_bytes());
    message.extend_from_slice(&0_u16.to_ne_bytes()); // flags
    message.extend_from_slice(&[0; 8]); // sequence, port: the kernel's to fill
    message.extend_from_slice(&CN_IDX_PROC.to_ne_bytes());
    message.extend_from_slice(&CN_VAL_PROC.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, acknowledge
    message.extend_from_slice(&4_u16.to_ne_bytes()); // length of the operation
    message.extend_from_slice(&0_u16.to_ne_bytes()); // flags
    message.extend_from_slice(&PROC_CN_MCAST_LISTEN.to_ne_bytes());
    message
}

/// Classic BPF: pass a fork whose child is of this process, drop the rest. A load gives the number in
/// network order, so the constants are turned.
fn filter(process: Pid) -> [sock_filter; 6] {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const WHAT: u32 = 36;
    const CHILD_TGID: u32 = 64;
    let pid = u32::try_from(process.0).unwrap_or(0);
    [
        sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: WHAT },
        sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 3, k: PROC_EVENT_FORK.to_be() },
        sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: CHILD_TGID },
        sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: pid.to_be() },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: u32::MAX },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: 0 },
    ]
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use super::*;

    #[test]
    fn short_or_foreign_message_is_no_new_thread() {
        let mut message = vec![0_u8; 76];
        assert_eq!(new_thread(&message, Pid(7)), None);
        message[WHAT_AT..WHAT_AT + 4].copy_from_slice(&1_u32.to_ne_bytes());
        message[CHILD_PID_AT..CHILD_PID_AT + 4].copy_from_slice(&9_u32.to_ne_bytes());
        message[CHILD_TGID_AT..CHILD_TGID_AT + 4].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(new_thread(&message, Pid(7)), Some(Tid(9)));
        assert_eq!(new_thread(&message, Pid(8)), None);
        assert_eq!(new_thread(&message[..66], Pid(7)), None);
    }

    #[test]
    fn own_thread_is_reported_and_a_foreign_process_is_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let me = Pid(i32::try_from(std::process::id()).expect("a pid"));
            let mut new_threads = match NewThreads::of(me) {
                Ok(new_threads) => new_threads,
                Err(error) => {
                    // Past the capture of the test harness and off its line of dots, to be counted.
                    let test = "own_thread_is_reported_and_a_foreign_process_is_not";
                    let text = format!("\nskipped: {test}: no process connector here: {error}\n");
                    let _ = io::stderr().write_all(text.as_bytes());
                    return;
                }
            };
            // A foreign fork first: were it not filtered, it would be the first message.
            std::process::Command::new("true").status().expect("true runs");
            let created =
                std::thread::spawn(|| nix::unistd::gettid().as_raw()).join().expect("a thread");
            let message = tokio::time::timeout(Duration::from_secs(10), new_threads.next()).await;
            // Other tests run in this process, and their threads are reported as well.
            let mut message = message.expect("within 10 s").expect("a message");
            while message != Some(Tid(created)) {
                message = tokio::time::timeout(Duration::from_secs(10), new_threads.next())
                    .await
                    .expect("within 10 s")
                    .expect("a message");
            }
        });
    }
}
