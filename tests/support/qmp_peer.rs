//! A QMP peer in the test's own process, which does as badly as the test wants.

use std::future::{Future, pending};
use std::path::{Path, PathBuf};

use qmpin::peer::Peer as Listener;
use qmpin::qmp::{CheckError, PeerCheck};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

/// A listening socket in a folder of its own.
pub(crate) struct Peer {
    dir: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

impl Peer {
    pub(crate) fn new() -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("100.qmp");
        let listener = UnixListener::bind(&path).unwrap();
        Peer { dir, path, listener }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) async fn accept(&self) -> Conn {
        Conn::new(self.listener.accept().await.unwrap().0)
    }

    /// Accepts, greets, and answers the negotiation.
    pub(crate) async fn accept_and_open(&self) -> Conn {
        let mut conn = self.accept().await;
        conn.greet().await;
        let negotiation = conn.command().await.unwrap();
        assert_eq!(negotiation.name, "qmp_capabilities");
        conn.reply(&negotiation, &json!({})).await;
        conn
    }
}

/// A client's connection, seen from the peer.
pub(crate) struct Conn {
    reader: OwnedReadHalf,
    heard: Vec<u8>,
    writer: OwnedWriteHalf,
}

/// A command that came.
pub(crate) struct Command {
    pub(crate) name: String,
    pub(crate) arguments: Value,
    pub(crate) id: Value,
}

impl Conn {
    pub(crate) fn new(stream: UnixStream) -> Conn {
        let (reader, writer) = stream.into_split();
        Conn { reader, heard: Vec::new(), writer }
    }

    /// Sends bytes as they are. `false` when the client has gone.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.writer.write_all(bytes.as_ref()).await.is_ok()
    }

    /// Sends a line.
    pub(crate) async fn say(&mut self, message: &Value) -> bool {
        self.send(format!("{message}\r\n")).await
    }

    pub(crate) async fn greet(&mut self) {
        let qemu = json!({"major": 9, "minor": 2, "micro": 0});
        let version = json!({"qemu": qemu, "package": "pve-qemu-kvm_9.2.0-5"});
        self.say(&json!({"QMP": {"version": version, "capabilities": []}})).await;
    }

    /// The next command, or `None` when the client has gone.
    pub(crate) async fn command(&mut self) -> Option<Command> {
        loop {
            let mut values = serde_json::Deserializer::from_slice(&self.heard).into_iter::<Value>();
            match values.next() {
                Some(Ok(mut message)) => {
                    let end = values.byte_offset();
                    self.heard.drain(..end);
                    return Some(Command {
                        name: message["execute"].as_str().unwrap().to_owned(),
                        arguments: message["arguments"].take(),
                        id: message["id"].take(),
                    });
                }
                Some(Err(error)) if !error.is_eof() => panic!("{error}"),
                _ if self.reader.read_buf(&mut self.heard).await.ok()? == 0 => return None,
                _ => {}
            }
        }
    }

    pub(crate) async fn reply(&mut self, command: &Command, value: &Value) -> bool {
        self.say(&json!({"return": value, "id": command.id})).await
    }

    /// Reads the negotiation and both queries, and answers the negotiation.
    pub(crate) async fn queries(&mut self) -> (Command, Command) {
        self.greet().await;
        let negotiation = self.command().await.unwrap();
        self.reply(&negotiation, &json!({})).await;
        (self.command().await.unwrap(), self.command().await.unwrap())
    }

    /// Answers both queries of an open session.
    pub(crate) async fn roles(&mut self, cpus: &Value, iothreads: &Value) {
        let (first, second) = (self.command().await.unwrap(), self.command().await.unwrap());
        self.reply(&first, cpus).await;
        self.reply(&second, iothreads).await;
    }
}

/// A row of `query-cpus-fast`.
pub(crate) fn cpu(index: i64, tid: i64) -> Value {
    json!({"cpu-index": index, "thread-id": tid, "qom-path": "/machine/unattached/device[0]",
        "props": {"socket-id": 0, "core-id": index, "thread-id": 0}, "target": "x86_64"})
}

/// A row of `query-iothreads`.
pub(crate) fn iothread(id: &str, tid: i64) -> Value {
    json!({"id": id, "thread-id": tid, "poll-max-ns": 32768})
}

/// Runs a client against a peer until the client is done. What the peer's future returns is kept
/// alive till then.
pub(crate) async fn run<T, K>(client: impl Future<Output = T>, peer: impl Future<Output = K>) -> T {
    tokio::select! {
        out = client => out,
        () = async { let _kept = peer.await; pending().await } => unreachable!(),
    }
}

/// A check that takes this very process for QEMU.
pub(crate) fn ourselves(peer: &Listener) -> Result<(), CheckError> {
    if u32::try_from(peer.pid().0) == Ok(std::process::id()) {
        Ok(())
    } else {
        Err(format!("{} is not this test", peer.pid()).into())
    }
}

/// [`ourselves`] for a channel.
pub(crate) fn check() -> PeerCheck {
    Box::new(ourselves)
}
