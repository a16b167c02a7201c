//! One connection to one QMP monitor.

use std::borrow::Cow;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::connect::connect;
use super::error::{Awaited, QmpError, excerpt};
use super::event::{EventQueue, QmpEvent, read_event};
use super::greeting::{Greeting, read_greeting};
use super::line::{LineError, LineReader};
use super::roles::Roles;
use super::wire::{Answer, Batch, CAPABILITIES, Message, Pending, all, classify};
use super::{Limits, Tolerated};
use crate::peer::Peer;

/// Lines of no meaning that are passed over in one go; then others have their turn.
const LINES_AT_A_TIME: u32 = 64;
/// The same in time: a long line takes long.
const NOISE_AT_A_TIME: Duration = Duration::from_millis(1);
/// How long nothing is read after that, at least, and how many times as long as it took.
const NOISE_PAUSE: Duration = Duration::from_millis(50);
const NOISE_PAUSE_TIMES: u32 = 50;

/// A session with a QMP monitor. Dropping it closes the connection.
///
/// While it is open it has to be read: call [`next_event`](Session::next_event) whenever
/// nothing else is called. QEMU keeps what a client does not read in its own memory, without a
/// limit (`monitor_flush_locked` in monitor/monitor.c).
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
    limits: Limits,
    peer: Peer,
    phase: Phase,
    reader: LineReader,
    events: EventQueue,
    tolerated: Tolerated,
    /// What is awaited, for messages.
    awaited: Awaited,
    /// How long it took to make sense of the last line.
    line_took: Duration,
    /// A command is on its way out; a future dropped meanwhile has left half a line behind.
    mid_write: bool,
}

#[derive(Debug)]
enum Phase {
    Connected(UnixStream),
    Open(UnixStream),
    Ended(String),
}

impl Phase {
    fn stream(&mut self) -> Result<&mut UnixStream, QmpError> {
        match self {
            Phase::Connected(stream) | Phase::Open(stream) => Ok(stream),
            Phase::Ended(reason) => Err(QmpError::Ended { reason: reason.clone() }),
        }
    }
}

impl Session {
    /// Connects, and neither sends nor reads anything. Check [`peer`](Session::peer) next.
    ///
    /// Waits at most `limits.wait_turn_max` for a place in the socket's backlog.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::PeerUnknown`], [`QmpError::Held`].
    pub async fn connect(path: &Path, limits: &Limits) -> Result<Session, QmpError> {
        Session::connect_until(path, limits, Instant::now(), limits.wait_turn_max).await
    }

    /// Connects, waiting until `waited` after `asked` for a place in the backlog.
    pub(super) async fn connect_until(
        path: &Path,
        limits: &Limits,
        asked: Instant,
        waited: Duration,
    ) -> Result<Session, QmpError> {
        let (stream, peer) = connect(path, asked, waited).await?;
        Ok(Session {
            path: path.to_owned(),
            limits: limits.clone(),
            peer,
            phase: Phase::Connected(stream),
            reader: LineReader::new(limits.line_bytes_max),
            events: EventQueue::default(),
            tolerated: Tolerated::default(),
            awaited: Awaited::Greeting,
            line_took: Duration::ZERO,
            mid_write: false,
        })
    }

    /// The process that listens on the socket.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was let pass so far.
    #[must_use]
    pub fn tolerated(&self) -> Tolerated {
        self.tolerated
    }

    /// Whether the session has ended, for whatever reason.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// Waits for the greeting and negotiates, with no capability enabled.
    ///
    /// # Errors
    /// Any [`QmpError`] of the wire; the session has then ended.
    pub async fn open(&mut self) -> Result<Greeting, QmpError> {
        let greeting = self.greeting(self.limits.greeting_timeout).await?;
        let greeting = read_greeting(&greeting);
        let mut batch = Batch::default();
        batch.add::<()>(CAPABILITIES, None)?;
        let mut answers = self.exchange(batch, self.limits.reply_timeout).await?.into_iter();
        self.negotiated(answers.next())?;
        Ok(greeting)
    }

    /// Opens the session and asks for the roles: the negotiation and the queries leave in one
    /// write.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub async fn open_and_query_roles(&mut self) -> Result<Roles, QmpError> {
        self.greeting(self.limits.greeting_timeout).await?;
        let within = self.limits.reply_timeout;
        let batch = Batch::first_roles(&self.limits)?;
        let answers = self.negotiate_and_ask_roles(batch, within).await?;
        Roles::read(answers, &self.limits)
    }

    /// Asks for the roles, all queries in one write.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub async fn query_roles(&mut self) -> Result<Roles, QmpError> {
        self.must_be_open()?;
        let mut batch = Batch::default();
        batch.add_roles(&self.limits)?;
        let answers = self.exchange(batch, self.limits.reply_timeout).await?;
        Roles::read(answers, &self.limits)
    }

    /// Executes a command of the `qapi` crate. Its reply type must be lenient enough: no enum
    /// (`proto-notes/quirks.md`).
    ///
    /// # Errors
    /// Any [`QmpError`]; [`QmpError::Refused`] where QEMU said no.
    pub async fn execute<C: qapi::Command>(&mut self, command: &C) -> Result<C::Ok, QmpError> {
        self.must_be_open()?;
        let mut batch = Batch::default();
        batch.add_command(command)?;
        let [answer] = all(self.exchange(batch, self.limits.reply_timeout).await?)?;
        answer.read()
    }

    /// Executes a command by its name.
    ///
    /// # Errors
    /// Any [`QmpError`]; [`QmpError::Refused`] where QEMU said no.
    pub async fn execute_raw(
        &mut self,
        command: impl Into<Cow<'static, str>>,
        arguments: Option<&Value>,
    ) -> Result<Value, QmpError> {
        self.must_be_open()?;
        let mut batch = Batch::default();
        batch.add(command.into(), arguments)?;
        let [answer] = all(self.exchange(batch, self.limits.reply_timeout).await?)?;
        answer.read()
    }

    /// The next event. Cancel safe: a dropped future loses nothing.
    ///
    /// # Errors
    /// [`QmpError::Closed`] when QEMU goes or throws us out, and other errors of the wire. The
    /// session has then ended.
    pub async fn next_event(&mut self) -> Result<QmpEvent, QmpError> {
        if let Some(event) = self.events.pop() {
            return Ok(event);
        }
        self.must_be_open()?;
        self.awaited = Awaited::Event;
        loop {
            let mut took = Duration::ZERO;
            for _ in 0..LINES_AT_A_TIME {
                let next = self.next_line().await;
                took += std::mem::take(&mut self.line_took);
                match self.settled(next)? {
                    Line::Event(event) => return Ok(event),
                    Line::Greeting(_) | Line::Unknown => self.tolerated.unknown_lines += 1,
                    Line::Answer { .. } => self.tolerated.stray_replies += 1,
                }
                if took > NOISE_AT_A_TIME {
                    break;
                }
            }
            // No QEMU does so. One that writes faster than it is read must not keep a CPU busy here.
            sleep(NOISE_PAUSE.max(took * NOISE_PAUSE_TIMES)).await;
        }
    }

    /// Waits for the greeting and returns its line.
    pub(super) async fn greeting(&mut self, within: Duration) -> Result<Vec<u8>, QmpError> {
        match self.phase {
            Phase::Connected(_) => {}
            Phase::Open(_) => return Err(QmpError::WrongState { state: "open already" }),
            Phase::Ended(ref reason) => return Err(QmpError::Ended { reason: reason.clone() }),
        }
        self.awaited = Awaited::Greeting;
        let deadline = Instant::now() + within;
        let result = timeout_at(deadline, self.greeting_line()).await;
        self.settled_in_time(result, within)
    }

    async fn greeting_line(&mut self) -> Result<Vec<u8>, QmpError> {
        for _ in 0..=self.limits.noise_lines_max {
            match self.next_line().await {
                Ok(Line::Greeting(greeting)) => return Ok(greeting),
                Ok(Line::Event(event)) => {
                    self.tolerated.events_before_greeting += 1;
                    self.events.push(event, &mut self.tolerated);
                }
                // What an earlier client asked for may still be on its way.
                Ok(Line::Answer { .. }) => self.tolerated.stray_replies += 1,
                Ok(Line::Unknown) => self.tolerated.unknown_lines += 1,
                Err(QmpError::BadJson { excerpt, .. }) => {
                    return Err(QmpError::NotAGreeting { path: self.path.clone(), excerpt });
                }
                Err(error) => return Err(error),
            }
        }
        Err(self.flood())
    }

    /// After the greeting: sends [`Batch::first_roles`]. The answers are not yet read, so that a
    /// shared socket can be closed first.
    pub(super) async fn negotiate_and_ask_roles(
        &mut self,
        batch: Batch,
        within: Duration,
    ) -> Result<Vec<Pending>, QmpError> {
        let mut answers = self.exchange(batch, within).await?;
        let rest = answers.split_off(1.min(answers.len()));
        self.negotiated(answers.pop())?;
        Ok(rest)
    }

    /// Takes the answer to the negotiation.
    pub(super) fn negotiated(&mut self, answer: Option<Pending>) -> Result<(), QmpError> {
        match answer.map(|answer| answer.answer) {
            Some(Some(Answer::Return(_))) => {}
            // Not in negotiation mode: an earlier client's command reached our session. QEMU then
            // does not know the command (`qmp_dispatch`), and it does know the queries.
            Some(Some(Answer::Error(body))) if body.class == "CommandNotFound" => {
                self.tolerated.already_negotiated += 1;
            }
            Some(Some(Answer::Error(body))) => {
                let error = QmpError::Refused {
                    command: CAPABILITIES,
                    class: excerpt(body.class.as_bytes()),
                    desc: excerpt(body.desc.as_bytes()),
                };
                return Err(self.end(error));
            }
            Some(None) | None => {
                return Err(QmpError::WrongState { state: "not negotiated" });
            }
        }
        if let Phase::Connected(_) = self.phase {
            let ended = Phase::Ended(String::new());
            if let Phase::Connected(stream) = std::mem::replace(&mut self.phase, ended) {
                self.phase = Phase::Open(stream);
            }
        }
        Ok(())
    }

    /// Sends a batch in one write and waits for all its answers.
    pub(super) async fn exchange(
        &mut self,
        batch: Batch,
        within: Duration,
    ) -> Result<Vec<Pending>, QmpError> {
        let Batch { bytes, mut pending } = batch;
        if let Some(first) = pending.first() {
            self.awaited = Awaited::Reply(first.command.clone());
        }
        let deadline = Instant::now() + within;
        let result = timeout_at(deadline, self.exchange_lines(&bytes, &mut pending)).await;
        self.settled_in_time(result, within)?;
        Ok(pending)
    }

    async fn exchange_lines(
        &mut self,
        bytes: &[u8],
        pending: &mut [Pending],
    ) -> Result<(), QmpError> {
        if self.mid_write {
            return Err(QmpError::Ended { reason: "a command was cut off half-way".to_owned() });
        }
        let stream = self.phase.stream()?;
        self.mid_write = true;
        if let Err(source) = stream.write_all(bytes).await {
            let awaited = self.awaited.clone();
            return Err(match source.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    QmpError::Closed { awaited, partial_bytes: 0 }
                }
                _ => QmpError::Io { awaited, source },
            });
        }
        self.mid_write = false;
        let mut noise = 0;
        while let Some(first) = pending.iter().find(|pending| pending.answer.is_none()) {
            self.awaited = Awaited::Reply(first.command.clone());
            match self.next_line().await? {
                Line::Answer { id: Some(id), answer } => {
                    let open = |p: &&mut Pending| p.answer.is_none() && id == p.id;
                    match pending.iter_mut().find(open) {
                        Some(pending) => {
                            pending.answer = Some(answer);
                            continue;
                        }
                        None => self.tolerated.stray_replies += 1,
                    }
                }
                // An error without an id answers a line that QEMU could not parse. Ours parse, so
                // it answers another session's.
                Line::Answer { .. } => self.tolerated.stray_replies += 1,
                Line::Event(event) => self.events.push(event, &mut self.tolerated),
                Line::Greeting(_) | Line::Unknown => self.tolerated.unknown_lines += 1,
            }
            noise += 1;
            if noise > self.limits.noise_lines_max {
                return Err(self.flood());
            }
        }
        Ok(())
    }

    fn flood(&self) -> QmpError {
        QmpError::Flood { awaited: self.awaited.clone(), lines: self.limits.noise_lines_max }
    }

    /// Reads a line and says what it is. Cancel safe.
    async fn next_line(&mut self) -> Result<Line, QmpError> {
        let stream = self.phase.stream()?;
        let range = self.reader.next_line(stream).await.map_err(|error| {
            let awaited = self.awaited.clone();
            match error {
                LineError::Closed { partial_bytes } => QmpError::Closed { awaited, partial_bytes },
                LineError::TooLong => {
                    QmpError::LineTooLong { awaited, limit_bytes: self.limits.line_bytes_max }
                }
                LineError::Io(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    QmpError::Closed { awaited, partial_bytes: 0 }
                }
                LineError::Io(source) => QmpError::Io { awaited, source },
            }
        })?;
        let started = std::time::Instant::now();
        let line = self.reader.bytes(range);
        let bad_json = |source| QmpError::BadJson {
            awaited: self.awaited.clone(),
            excerpt: excerpt(line),
            source,
        };
        let line = match classify(line).map_err(bad_json)? {
            Message::Greeting => Line::Greeting(line.to_vec()),
            Message::Return { id } => Line::Answer { id, answer: Answer::Return(line.to_vec()) },
            Message::Error { id, body } => Line::Answer { id, answer: Answer::Error(body) },
            Message::Event => match read_event(line, &mut self.tolerated) {
                Some(event) => Line::Event(event),
                None => Line::Unknown,
            },
            Message::Unknown => Line::Unknown,
        };
        self.line_took = started.elapsed();
        Ok(line)
    }

    fn must_be_open(&self) -> Result<(), QmpError> {
        match &self.phase {
            Phase::Open(_) => Ok(()),
            Phase::Connected(_) => Err(QmpError::WrongState { state: "not open yet" }),
            Phase::Ended(reason) => Err(QmpError::Ended { reason: reason.clone() }),
        }
    }

    fn settled_in_time<T>(
        &mut self,
        result: Result<Result<T, QmpError>, tokio::time::error::Elapsed>,
        limit: Duration,
    ) -> Result<T, QmpError> {
        let result = result.unwrap_or_else(|_| {
            let (awaited, strays) = (self.awaited.clone(), self.tolerated.stray_replies);
            Err(QmpError::Timeout { awaited, limit, strays })
        });
        self.settled(result)
    }

    /// Ends the session if the error leaves the stream in doubt.
    fn settled<T>(&mut self, result: Result<T, QmpError>) -> Result<T, QmpError> {
        match result {
            Err(error) if !error.leaves_session_usable() => Err(self.end(error)),
            other => other,
        }
    }

    /// Closes the connection and remembers why.
    fn end(&mut self, error: QmpError) -> QmpError {
        if !self.has_ended() {
            self.phase = Phase::Ended(error.to_string());
        }
        error
    }
}

/// A line that was read.
enum Line {
    Greeting(Vec<u8>),
    Answer { id: Option<Value>, answer: Answer },
    Event(QmpEvent),
    Unknown,
}

/// Runs `work` and gives up after `within`; for steps that no session of ours can time.
pub(super) async fn within<T>(
    limit: Duration,
    work: impl Future<Output = T>,
) -> Result<T, tokio::time::error::Elapsed> {
    timeout_at(Instant::now() + limit, work).await
}
