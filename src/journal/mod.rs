//! The undo journal: one append-only file of JSON lines per VM, and no knob is written before its
//! line is on stable storage.
//!
//! ```text
//!   {"schema":"qmpin.journal/1","vm":…,"boot_id":…,"process":{…}}      first line: whose undo it is
//!   {"baseline":{"main":"0-23","threads":[[tid,start,"0-23"],…]}}     as all was before the first write
//!   {"outside":[[tid,start,"0-23"],…]}                                the same of the VM's kernel threads, as they are found
//!   {"intent":{"thread":{…},"from":"0-23","to":"12"}}                 one per write, before it
//!   {"narrowed":{"thread":{…},"from":"0-23","to":"0-5"}}              what the kernel made of one
//!   {"priorities":[[tid,start,{"class":"other",…}],…]}                how all was scheduled before the first change of that
//!   {"priority":{"thread":{…},"from":{…},"to":{"class":"fifo",…}}}    one per change, before it
//!   {"cookie":"intended"}, {"cookie":{"made":1234}}                   before a cookie is made, and which it was
//!   {"partition":{"unit":"100.scope","cgroup":…,"cpus":"12-19",…}}    before a partition is made or changed
//!   {"slices":"12-19"}                                                before systemd excludes others
//! ```
//!
//! A line is an intention: after a crash it may or may not have been carried out, and `restore` sees
//! by looking. A torn last line was never followed by a write, so it is dropped.
//!
//! A line of an unknown kind is from a newer qmpin. It is not undone, so the file stays and is named
//! ([`UnknownLines`]). A file that is not as this process left it is written no more ([`JournalError::Untrusted`]);
//! one that was removed is written again from memory.

pub(crate) mod lines;
mod memory;
mod records;
mod unknown;

use std::io;
use std::path::{Path, PathBuf};

use crate::knobs::core_scheduling::journal::CookieRecord;
use crate::knobs::priority::journal::PriorityIntent;
use lines::Lines;
pub use memory::Memory;
use serde::{Deserialize, Serialize};
pub use unknown::{UnknownKind, UnknownLine, UnknownLines};

use crate::cpuset::CpuSet;
use crate::ids::{StartTicks, Tid, VmName};
use crate::scheduling::Scheduling;
use crate::threads::{ProcessKey, ThreadKey};

/// The schema of the first line.
pub const SCHEMA: &str = "qmpin.journal/1";

/// A file is written anew where it has this many times the records that are needed ...
const RECORDS_PER_LIVE_MAX: usize = 4;
/// ... and this many more: a small one costs nothing.
const DEAD_RECORDS_MAX: usize = 1_000;

/// The first line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Header {
    /// [`SCHEMA`].
    pub schema: String,
    /// Which VM.
    pub vm: VmName,
    /// The boot it is valid in (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// The QEMU process.
    pub process: ProcessKey,
}

/// The masks before the first write.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Baseline {
    /// The main thread's: what a thread created later would have inherited without qmpin.
    pub main: CpuSet,
    /// Every thread that was there.
    pub threads: Vec<(Tid, StartTicks, CpuSet)>,
}

/// A write about to happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Intent {
    /// Which thread.
    pub thread: ThreadKey,
    /// The mask that was seen.
    pub from: CpuSet,
    /// The mask it is to have.
    pub to: CpuSet,
}

/// A partition about to be made, or to be given other CPUs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartitionUndo {
    /// The VM's unit.
    pub unit: String,
    /// Its cgroup, below the root of the tree.
    pub cgroup: String,
    /// The drop-in of qmpin, relative to the root; none where the unit was delegated already.
    pub drop_in: Option<String>,
    /// What we set as `AllowedCPUs=`; none where another program had.
    pub allowed_set: Option<CpuSet>,
    /// Whether the groups of the unit had the controller before.
    pub had_controller: bool,
    /// The CPUs it is to have. In memory: all that it ever had.
    pub cpus: CpuSet,
}

/// A line after the first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Record {
    /// The masks before the first write.
    Baseline(Baseline),
    /// The masks of kernel threads that work for the VM, before they were written; not of its process, so
    /// they are found when it is not urgent.
    Outside(Vec<(Tid, StartTicks, CpuSet)>),
    /// A write about to happen.
    Intent(Intent),
    /// What the kernel made of a write, where that is not what was asked: `to` is what was read
    /// back. Written after the fact.
    Narrowed(Intent),
    /// A partition about to be made or changed.
    Partition(PartitionUndo),
    /// systemd is about to exclude units beside the VM from these CPUs: some kernels change the
    /// VM's masks with it.
    Slices(CpuSet),
    /// How every thread was scheduled before the first change of that.
    Priorities(Vec<(Tid, StartTicks, Scheduling)>),
    /// A change of how a thread is scheduled, about to happen.
    Priority(PriorityIntent),
    /// A core-scheduling cookie about to be made, or just made.
    Cookie(CookieRecord),
}

/// What a journal file says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Whose undo it is.
    pub header: Header,
    /// What its lines come to, unknown lines included.
    pub memory: Memory,
}

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file could not be made, written, or read.
    #[error("could not {action} the journal {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its writer was killed before the first line was there: nothing was ever written to a knob.
    #[error("{} was never begun", path.display())]
    NeverBegun {
        /// Which file.
        path: PathBuf,
    },
    /// The first line is not a journal's.
    #[error("{} is not a journal of qmpin: {reason}", path.display())]
    NotAJournal {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It has lines of which this version cannot know what they mean.
    #[error("{} was written by a newer qmpin: use that one for this VM", path.display())]
    Newer {
        /// Which file.
        path: PathBuf,
    },
    /// The file is gone. It can be written again from memory.
    #[error("the journal {} was removed", path.display())]
    Removed {
        /// Which file.
        path: PathBuf,
    },
    /// It is not as this process left it, so that what is appended might not be read again.
    #[error("another program changed the journal {}: {reason}; nothing more is changed", path.display())]
    Untrusted {
        /// Which file.
        path: PathBuf,
        /// What is not as it was.
        reason: String,
    },
    /// It would be longer than what can be read again.
    #[error("the journal {} is full ({} MiB); nothing more is changed", path.display(), bytes_max >> 20)]
    Full {
        /// Which file.
        path: PathBuf,
        /// The longest that it may be.
        bytes_max: u64,
    },
}

/// A journal open for writing.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    header: Header,
    lines: Lines,
    memory: Memory,
    /// How many records the file has.
    records_len: usize,
    /// At how many it is worth writing anew.
    compact_at: usize,
}

impl Journal {
    /// Starts a journal; its folder must exist. The header is durable on return.
    ///
    /// # Errors
    /// [`JournalError::Io`]; also where the file exists already.
    pub fn create(path: &Path, header: &Header) -> Result<Journal, JournalError> {
        lines::remove_replacement(path);
        let lines = Lines::create(path, header)?;
        Ok(Journal::with(path, header.clone(), lines, Memory::default(), 0))
    }

    /// Goes on with the journal of an earlier run: a torn last line is cut off.
    ///
    /// # Errors
    /// [`JournalError`] where the file cannot be read or is no journal, and [`JournalError::Newer`] where its
    /// schema is of a later version.
    pub fn resume(path: &Path) -> Result<(Journal, Header), JournalError> {
        lines::remove_replacement(path);
        let (read, memory) = read_lines(path)?;
        let lines = Lines::resume(path, &read)?;
        let journal = Journal::with(path, read.header.clone(), lines, memory, read.records_len);
        Ok((journal, read.header))
    }

    fn with(
        path: &Path,
        header: Header,
        lines: Lines,
        memory: Memory,
        records_len: usize,
    ) -> Journal {
        let compact_at = compact_at(memory.records().len());
        Journal { path: path.to_owned(), header, lines, memory, records_len, compact_at }
    }

    /// What is in it.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Adds records, all or none, and returns once they are durable. Intents that restoring can do
    /// without are left out. A file that was removed is written again first.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing may be written to any knob.
    pub fn append(&mut self, mut records: Vec<Record>) -> Result<(), JournalError> {
        records.retain(|record| match record {
            Record::Baseline(_)
            | Record::Outside(_)
            | Record::Partition(_)
            | Record::Priorities(_)
            | Record::Cookie(_) => true,
            Record::Slices(_) => !self.memory.has_slices(),
            Record::Priority(intent) => !self.memory.scheduling().covers(intent),
            Record::Intent(intent) | Record::Narrowed(intent) => !self.memory.covers(intent),
        });
        if records.is_empty() {
            return Ok(());
        }
        match self.lines.append(&records) {
            Err(JournalError::Removed { .. }) => {
                self.write_anew()?;
                self.lines.append(&records)?;
            }
            appended => appended?,
        }
        self.records_len += records.len();
        for record in &records {
            self.memory.add(record);
        }
        Ok(())
    }

    /// Writes the file again from memory where it was removed. Returns whether it was.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn ensure_file(&mut self) -> Result<bool, JournalError> {
        let is_gone = !self.lines.has_name();
        if is_gone {
            self.write_anew()?;
        }
        Ok(is_gone)
    }

    /// Whether most of the file is history.
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.records_len > self.compact_at
    }

    /// Writes the file anew without what is not needed: threads that have ended, and lines that say the same. A
    /// process that is killed meanwhile leaves the old file or the new one. A file with something that a newer
    /// qmpin wrote stays as it is.
    ///
    /// # Errors
    /// [`JournalError`]; then the file is as it was, and serves as before.
    pub fn compact(&mut self, lives: impl Fn(ThreadKey) -> bool) -> Result<(), JournalError> {
        // Whatever comes of it, it is not tried again at once.
        self.compact_at = compact_at(self.records_len);
        if self.memory.unknown().is_some() || lines::has_unknown_members::<Record>(&self.path)? {
            return Ok(());
        }
        self.memory.forget_threads(lives);
        self.write_anew()
    }

    fn write_anew(&mut self) -> Result<(), JournalError> {
        let records = self.memory.records();
        let unknown = self.memory.unknown().map(|unknown| &*unknown.lines).unwrap_or_default();
        self.lines = Lines::replace(&self.path, &self.header, &records, unknown)?;
        self.records_len = records.len();
        self.compact_at = compact_at(records.len());
        Ok(())
    }
}

fn compact_at(live_len: usize) -> usize {
    RECORDS_PER_LIVE_MAX * live_len + DEAD_RECORDS_MAX
}

/// Reads a journal.
///
/// # Errors
/// [`JournalError`] where the file cannot be read or its first line is not a journal's. A line in
/// the middle that is no record is not an error: it is listed, and the rest still counts.
pub fn read(path: &Path) -> Result<Content, JournalError> {
    let (read, memory) = read_lines(path)?;
    Ok(Content { header: read.header, memory })
}

/// Returns what a VM's journal remembers; nothing where there is none that can be read: then nothing was changed.
#[must_use]
pub fn memory(path: &Path) -> Memory {
    read(path).map(|content| content.memory).unwrap_or_default()
}

fn read_lines(path: &Path) -> Result<(lines::Read<Header>, Memory), JournalError> {
    let mut memory = Memory::default();
    let read = lines::read::<Header, Record>(path, SCHEMA, |record| memory.add(&record))?;
    memory.unknown = UnknownLines::of(path, &read.unknown);
    Ok((read, memory))
}

#[cfg(test)]
mod tests;
