//! `proto-notes/transcripts/*.qmp`: read, and played to a session by a peer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::qmp_peer::Conn;

/// The folder that the transcripts write instead of the true one.
pub(crate) const SHOWN_DIR: &str = "/run/qemu-server";

/// One line of a transcript.
#[derive(Clone, Debug)]
pub(crate) enum Line {
    Server(Value),
    /// A command, or `None` where the client sent what is no JSON.
    Client(Option<Value>),
}

/// A transcript.
#[derive(Clone, Debug)]
pub(crate) struct Transcript {
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) lines: Vec<Line>,
}

pub(crate) fn transcripts_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proto-notes/transcripts")
}

/// All transcripts, sorted by name.
pub(crate) fn all() -> Vec<Transcript> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(transcripts_dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

/// The transcript of that name, such as `roles-kvm-7.2`.
pub(crate) fn named(name: &str) -> Transcript {
    read(&transcripts_dir().join(format!("{name}.qmp")))
}

fn read(path: &Path) -> Transcript {
    let text = fs::read_to_string(path).unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| match line.split_at_checked(2) {
            Some(("S ", rest)) => Line::Server(serde_json::from_str(rest).unwrap()),
            Some(("C ", rest)) => Line::Client(serde_json::from_str(rest).ok()),
            _ => panic!("{}: neither S nor C nor #: {line}", path.display()),
        })
        .collect();
    let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
    Transcript { name, text, lines }
}

impl Transcript {
    /// The contents of the successful replies to a command, in order.
    pub(crate) fn returns(&self, command: &str) -> Vec<&Value> {
        let ids: Vec<&Value> = self
            .commands()
            .filter(|message| message["execute"] == command)
            .map(|message| &message["id"])
            .collect();
        self.server().filter(|m| ids.contains(&&m["id"])).filter_map(|m| m.get("return")).collect()
    }

    pub(crate) fn commands(&self) -> impl Iterator<Item = &Value> {
        self.lines.iter().filter_map(|line| match line {
            Line::Client(message) => message.as_ref(),
            Line::Server(_) => None,
        })
    }

    pub(crate) fn server(&self) -> impl Iterator<Item = &Value> {
        self.lines.iter().filter_map(|line| match line {
            Line::Server(message) => Some(message),
            Line::Client(_) => None,
        })
    }

    /// The names of its events, in order.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.server().filter_map(|message| message["event"].as_str()).collect()
    }

    /// Plays QEMU's part. `before_reply` sees each command once it has come.
    pub(crate) async fn play(
        &self,
        conn: &mut Conn,
        dir: &Path,
        mut before_reply: impl FnMut(&Value),
    ) {
        let mut ids = BTreeMap::new();
        for line in &self.lines {
            match line {
                Line::Client(None) => {}
                Line::Client(Some(wanted)) => {
                    let came = conn.command().await.expect("the client is still there");
                    let arguments = came.arguments.to_string();
                    let shown = arguments.replace(dir.to_str().unwrap(), SHOWN_DIR);
                    let shown: Value = serde_json::from_str(&shown).unwrap();
                    assert_eq!(wanted["execute"], came.name, "{}", self.name);
                    let empty =
                        |arguments: &Value| *arguments == Value::Null || *arguments == json!({});
                    if !(empty(&wanted["arguments"]) && empty(&shown)) {
                        assert_eq!(wanted["arguments"], shown, "{}", self.name);
                    }
                    ids.insert(wanted["id"].to_string(), came.id);
                    before_reply(wanted);
                }
                Line::Server(message) => {
                    let mut message = message.clone();
                    if let Some(id) = message.get_mut("id") {
                        *id = ids[&id.to_string()].clone();
                    }
                    conn.say(&message).await;
                }
            }
        }
    }
}
