//! What became of a step, and what a restore has come to: the same words for all knobs.

use std::collections::BTreeSet;
use std::{fmt, io};

use crate::knobs::execute::{Applied, Step};
use crate::knobs::step::ThreadStep;
use crate::mask::Mask;
use crate::scheduling::Scheduling;
use crate::threads::ThreadKey;

/// What became of a step. `V` is what the place holds: a mask, a priority, the value of a file.
#[derive(Debug)]
pub enum Outcome<V> {
    /// Written and read back; or there was nothing to write.
    Done,
    /// There was no such thread or place any more.
    Gone,
    /// Another program was configured, and applies it later: until then it cannot be read back.
    Pending {
        /// In so many seconds at most.
        within_s: u32,
    },
    /// The kernel took it and made something else of it, such as a mask cut to the thread's cpuset.
    Narrowed {
        /// What is there now.
        to: V,
    },
    /// The kernel said no.
    Refused {
        /// What it said.
        error: io::Error,
    },
}

impl<V> Outcome<V> {
    /// Whether the place does not hold what it should.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        matches!(self, Outcome::Narrowed { .. } | Outcome::Refused { .. })
    }
}

impl<V: fmt::Display> Outcome<V> {
    /// Whether there is such a thread or place, and it holds what it should.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn done(self) -> io::Result<bool> {
        match self {
            Outcome::Done | Outcome::Pending { .. } => Ok(true),
            Outcome::Gone => Ok(false),
            Outcome::Narrowed { to } => Err(io::Error::other(format!("it is {to} all the same"))),
            Outcome::Refused { error } => Err(error),
        }
    }
}

/// What a thread has and qmpin changes, in messages.
pub trait Named: fmt::Display {
    /// Its name in messages.
    const NAME: &'static str;
    /// Why the kernel may make something else of it: the end of a sentence.
    const NARROWED: &'static str;
}

impl Named for Mask {
    const NAME: &'static str = "affinity";
    const NARROWED: &'static str = ": its cpuset allows no more";
}

impl Named for Scheduling {
    const NAME: &'static str = "scheduling";
    const NARROWED: &'static str = "";
}

impl<V: Named> Applied<ThreadStep<V>>
where
    ThreadStep<V>: Step<Outcome = Outcome<V>>,
{
    /// Whether the thread is not as it should be now.
    #[must_use]
    pub fn fell_short(&self) -> bool {
        self.outcome.fell_short()
    }

    /// About a thread that is not as it should be. `None`: nothing was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        let Applied { step, outcome } = self;
        let (who, from, to) = (step.who(), &step.from, &step.to);
        match outcome {
            Outcome::Refused { error } => {
                Some(format!("{who}: {from} → {to} was refused: {error}"))
            }
            Outcome::Narrowed { to: now } => {
                Some(format!("{who}: wanted {to}, the kernel made it {now}{}", V::NARROWED))
            }
            Outcome::Done | Outcome::Gone | Outcome::Pending { .. } => None,
        }
    }
}

/// A thread that another program has changed meanwhile: it is left so.
#[derive(Clone, Debug)]
pub struct Foreign<V> {
    /// Which thread.
    pub thread: ThreadKey,
    /// What it has now.
    pub found: V,
    /// What it had before qmpin.
    pub before: V,
}

/// A thread that could not be restored.
#[derive(Debug)]
pub struct Failed<V> {
    /// Which thread.
    pub thread: ThreadKey,
    /// What it should have.
    pub to: V,
    /// What the kernel said.
    pub error: io::Error,
}

/// What has come of restoring a VM's threads in one respect.
#[derive(Debug)]
pub struct Restored<V> {
    /// Threads restored.
    pub put_back: BTreeSet<ThreadKey>,
    /// Threads that another program has changed meanwhile: left alone.
    pub foreign: Vec<Foreign<V>>,
    /// Threads that could not be restored.
    pub failed: Vec<Failed<V>>,
}

impl<V> Default for Restored<V> {
    fn default() -> Restored<V> {
        Restored { put_back: BTreeSet::new(), foreign: Vec::new(), failed: Vec::new() }
    }
}

impl<V: fmt::Display> Restored<V> {
    /// Notes what has become of a thread; `Ok(false)`: it has ended.
    pub(crate) fn note(&mut self, thread: ThreadKey, to: V, done: io::Result<bool>) {
        match done {
            Ok(true) => {
                self.put_back.insert(thread);
            }
            Ok(false) => {}
            Err(error) => self.failed.push(Failed { thread, to, error }),
        }
    }

    /// What is worth saying of single threads.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let foreign = self.foreign.iter().map(ToString::to_string);
        foreign.chain(self.failed.iter().map(ToString::to_string))
    }
}

impl<V: fmt::Display> fmt::Display for Foreign<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Foreign { thread, found, before } = self;
        write!(
            f,
            "thread {} was changed externally to {found} and is left as it is (before qmpin: {before})",
            thread.tid
        )
    }
}

impl<V: fmt::Display> fmt::Display for Failed<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failed { thread, to, error } = self;
        write!(f, "thread {} could not be restored to {to}: {error}", thread.tid)
    }
}
