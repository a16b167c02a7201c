//! The envelope: commands out, lines in. What a line *is* is decided here, without building its
//! content, so that a shared socket can be closed before the content is read.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};
use serde_json::Value;

use super::error::{QmpError, excerpt};
use super::{AskMemory, Limits};

/// The name of the negotiation.
pub(super) const CAPABILITIES: Cow<'static, str> = Cow::Borrowed("qmp_capabilities");
/// The name of the query for vCPUs.
pub(super) const QUERY_CPUS: Cow<'static, str> = Cow::Borrowed("query-cpus-fast");
/// The name of the query for the guest's memory.
pub(super) const QUERY_MEMORY: Cow<'static, str> = Cow::Borrowed("query-memdev");
/// The name of the query for iothreads.
pub(super) const QUERY_IOTHREADS: Cow<'static, str> = Cow::Borrowed("query-iothreads");

/// The ids: numbers of two digits. QEMU reads one byte in each turn of its main loop
/// (`monitor_can_read` in monitor/monitor.c), so the length of what we send is the better part of
/// the time that we hold a socket. Ninety are enough: QEMU answers one client in order, so an id is
/// used again long after its last answer.
const IDS: Range<u32> = 10..100;

/// Commands are numbered through the life of the process, not of the session, and begin at a number
/// made of the process's: a reply meant for an earlier session then does not pass for one of this session.
static COMMANDS: LazyLock<AtomicU32> =
    LazyLock::new(|| AtomicU32::new(std::process::id().wrapping_mul(57)));

fn next_id() -> u32 {
    let number = COMMANDS.fetch_add(1, Ordering::Relaxed);
    IDS.start + number % (IDS.end - IDS.start)
}

/// A command that was sent, and what became of it.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) id: u32,
    pub(super) command: Cow<'static, str>,
    pub(super) answer: Option<Answer>,
}

/// QEMU's answer to a command of ours.
#[derive(Debug)]
pub(super) enum Answer {
    /// The whole line with its `return`, not yet read.
    Return(Vec<u8>),
    /// QEMU said no.
    Error(ErrorBody),
}

/// The `error` member. QEMU's classes are an enum that may grow, so they stay texts.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ErrorBody {
    pub(super) class: String,
    pub(super) desc: String,
}

impl Pending {
    /// The content of the reply, as `T`.
    ///
    /// # Errors
    /// [`QmpError::Refused`] and [`QmpError::BadReply`].
    pub(super) fn read<T: for<'de> Deserialize<'de>>(self) -> Result<T, QmpError> {
        #[derive(Deserialize)]
        struct Reply<T> {
            #[serde(rename = "return")]
            value: T,
        }
        let command = self.command;
        match self.answer {
            Some(Answer::Return(line)) => serde_json::from_slice::<Reply<T>>(&line)
                .map(|reply| reply.value)
                .map_err(|source| QmpError::BadReply { command, excerpt: excerpt(&line), source }),
            Some(Answer::Error(ErrorBody { class, desc })) => Err(QmpError::Refused {
                command,
                class: excerpt(class.as_bytes()),
                desc: excerpt(desc.as_bytes()),
            }),
            None => Err(QmpError::Ended { reason: "the reply was never read".to_owned() }),
        }
    }
}

/// Appends a command to `out`, a line of its own, and notes its id in `pending`. QEMU's parser would do
/// without the newline; whatever stands in for QEMU may read by lines.
///
/// # Errors
/// [`QmpError::Encode`]; `out` is then as it was.
fn write_command<A: Serialize>(
    out: &mut Vec<u8>,
    pending: &mut Vec<Pending>,
    command: Cow<'static, str>,
    arguments: Option<&A>,
) -> Result<(), QmpError> {
    #[derive(Serialize)]
    struct Command<'a, A> {
        execute: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        arguments: Option<&'a A>,
        id: u32,
    }
    let id = next_id();
    let before = out.len();
    if let Err(source) =
        serde_json::to_writer(&mut *out, &Command { execute: &command, arguments, id })
    {
        out.truncate(before);
        return Err(QmpError::Encode { command, source });
    }
    out.push(b'\n');
    pending.push(Pending { id, command, answer: None });
    Ok(())
}

/// Commands that leave in one write.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) pending: Vec<Pending>,
}

impl Batch {
    /// The negotiation and the queries.
    pub(super) fn first_roles(limits: &Limits) -> Result<Batch, QmpError> {
        let mut batch = Batch::default();
        batch.add::<()>(CAPABILITIES, None)?;
        batch.add_roles(limits)?;
        Ok(batch)
    }

    /// The queries for the roles, and for the memory where that is wanted.
    pub(super) fn add_roles(&mut self, limits: &Limits) -> Result<(), QmpError> {
        self.add::<()>(QUERY_CPUS, None)?;
        self.add::<()>(QUERY_IOTHREADS, None)?;
        match limits.memory {
            AskMemory::No => Ok(()),
            AskMemory::Yes => self.add::<()>(QUERY_MEMORY, None),
        }
    }

    pub(super) fn add<A: Serialize>(
        &mut self,
        command: Cow<'static, str>,
        arguments: Option<&A>,
    ) -> Result<(), QmpError> {
        write_command(&mut self.bytes, &mut self.pending, command, arguments)
    }

    pub(super) fn add_command<C: qapi::Command>(&mut self, command: &C) -> Result<(), QmpError> {
        let encode = |source| QmpError::Encode { command: C::NAME.into(), source };
        let arguments = serde_json::to_value(command).map_err(encode)?;
        let has_some = arguments.as_object().is_some_and(|members| !members.is_empty());
        self.add(C::NAME.into(), has_some.then_some(&arguments))
    }
}

/// The answers as an array.
pub(super) fn all<const N: usize>(answers: Vec<Pending>) -> Result<[Pending; N], QmpError> {
    answers.try_into().map_err(|_| QmpError::WrongState { state: "out of step" })
}

/// What a line is.
#[derive(Debug)]
pub(super) enum Message {
    Greeting,
    Return { id: Option<Value> },
    Error { id: Option<Value>, body: ErrorBody },
    Event,
    Unknown,
}

/// Whether a member is there, whatever it holds.
#[derive(Debug, Default)]
struct Present(bool);

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Present, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Present(true))
    }
}

/// Says what a line is. The whole line is checked to be JSON (nesting costs no stack here), and
/// nothing of its content is built.
pub(super) fn classify(line: &[u8]) -> Result<Message, serde_json::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Envelope {
        #[serde(rename = "QMP")]
        greeting: Present,
        #[serde(rename = "return")]
        returned: Present,
        error: Option<ErrorBody>,
        event: Present,
        id: Option<Value>,
    }
    match line.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') => {}
        None => return Ok(Message::Unknown),
        // An array would pass for a struct with its members in order.
        Some(_) => return Err(serde::de::Error::custom("not an object")),
    }
    let envelope: Envelope = serde_json::from_slice(line)?;
    Ok(match envelope {
        Envelope { event: Present(true), .. } => Message::Event,
        Envelope { greeting: Present(true), .. } => Message::Greeting,
        Envelope { returned: Present(true), id, .. } => Message::Return { id },
        Envelope { error: Some(body), id, .. } => Message::Error { id, body },
        _ => Message::Unknown,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tokens of JSON and members of QMP, in any order.
    const JSON_LIKE: &str = concat!(
        r#"(\{|\}|\[|\]|"(QMP|return|error|event|id|data)""#,
        r#"|:|,|-?[0-9]{1,3}|null|\\|"){0,40}"#
    );

    #[test]
    fn a_line_is_known_by_its_members_and_not_by_their_order() {
        assert!(matches!(classify(br#"{"QMP": {"x": 1}}"#), Ok(Message::Greeting)));
        assert!(matches!(
            classify(br#"{"id": 7, "new": [1], "return": null}"#),
            Ok(Message::Return { id: Some(_) })
        ));
        assert!(matches!(
            classify(br#"{"error": {"class": "New", "desc": "d", "more": 1}}"#),
            Ok(Message::Error { id: None, .. })
        ));
        assert!(matches!(classify(br#"{"event": "X", "return": 1}"#), Ok(Message::Event)));
        assert!(matches!(classify(b"{}"), Ok(Message::Unknown)));
        assert!(matches!(classify(b" \r"), Ok(Message::Unknown)));
    }

    #[test]
    fn what_is_not_one_object_is_bad_json() {
        for bad in ["[{\"QMP\":1}]", "7", "null", "{} {}", "{", "{\"QMP\"", "\u{feff}{}", "{]"] {
            assert!(classify(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_differ_and_commands_are_short() {
        let (mut out, mut pending) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            write_command::<()>(&mut out, &mut pending, "stop".into(), None).unwrap();
        }
        assert_ne!(pending[0].id, pending[1].id);
        assert_ne!(pending[1].id, pending[2].id);
        let wanted: Vec<String> =
            pending.iter().map(|p| format!("{{\"execute\":\"stop\",\"id\":{}}}\n", p.id)).collect();
        assert_eq!(String::from_utf8(out).unwrap(), wanted.concat());
        assert!(pending.iter().all(|pending| IDS.contains(&pending.id)));
    }

    #[test]
    fn nesting_costs_no_stack() {
        let deep =
            [b"{\"return\": ".as_slice(), &b"[".repeat(400_000), &b"]".repeat(400_000), b"}"];
        let line = deep.concat();
        assert!(matches!(classify(&line), Ok(Message::Return { id: None })));
        let pending = Pending { id: 10, command: "c".into(), answer: Some(Answer::Return(line)) };
        assert!(matches!(pending.read::<Value>(), Err(QmpError::BadReply { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_classified_or_refused(line in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = classify(&line);
        }

        #[test]
        fn any_json_like_bytes_are_classified_or_refused(line in JSON_LIKE) {
            let _ = classify(line.as_bytes());
        }
    }
}
