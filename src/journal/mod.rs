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
//!   {"slices":"12-19"}                                                before systemd keeps others off
//! ```
//!
//! A line is an intention: after a crash it may or may not have been carried out, and `restore` tells
//! by looking. A torn last line was never followed by a write, so it is dropped.

mod cookie;
mod host;
mod lines;
mod memory;
mod scheduling;

use std::io;
use std::path::{Path, PathBuf};

pub use cookie::{CookieMemory, CookieRecord};
pub use host::{HOST_SCHEMA, HostJournal, HostMemory, HostRecord};
use lines::{Lines, Read};
pub use memory::Memory;
pub use scheduling::{PriorityIntent, SchedMemory};
use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::ids::{StartTicks, Tid, VmName};
use crate::scheduling::Scheduling;
use crate::threads::{ProcessKey, ThreadKey};

/// The schema of the first line.
pub const SCHEMA: &str = "qmpin.journal/1";

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
    /// The main thread's: what a thread born later would have inherited without qmpin.
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
    /// The drop-in of ours, relative to the root; none where the unit was delegated already.
    pub drop_in: Option<String>,
    /// What we set as `AllowedCPUs=`; none where somebody else had.
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
    /// Systemd is about to be told to keep units beside the VM off these CPUs: some kernels change the
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
    /// The lines after it.
    pub records: Vec<Record>,
    /// Lines in the middle that could not be read, by number.
    pub unreadable_lines: Vec<usize>,
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
}

/// A journal open for writing.
#[derive(Debug)]
pub struct Journal {
    lines: Lines,
    memory: Memory,
}

impl Journal {
    /// Starts a journal; its folder must exist. The header is durable on return.
    ///
    /// # Errors
    /// [`JournalError::Io`]; also where the file exists already.
    pub fn create(path: &Path, header: &Header) -> Result<Journal, JournalError> {
        Ok(Journal { lines: Lines::create(path, header)?, memory: Memory::default() })
    }

    /// Goes on with the journal of an earlier run: a torn last line is cut off.
    ///
    /// # Errors
    /// [`JournalError`] where the file cannot be read or is no journal.
    pub fn resume(path: &Path) -> Result<(Journal, Header), JournalError> {
        let read = read_lines(path)?;
        let lines = Lines::resume(path, &read)?;
        Ok((Journal { lines, memory: Memory::of(&read.records) }, read.header))
    }

    /// What is in it.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Adds records, all or none, and returns once they are durable. Intents that restoring can do
    /// without are left out.
    ///
    /// # Errors
    /// [`JournalError::Io`]; then nothing may be written to any knob.
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
        self.lines.append(&records)?;
        for record in &records {
            self.memory.add(record);
        }
        Ok(())
    }
}

/// Reads a journal.
///
/// # Errors
/// [`JournalError`] where the file cannot be read or its first line is not a journal's. A line in
/// the middle that is no record is not an error: it is listed, and the rest still counts.
pub fn read(path: &Path) -> Result<Content, JournalError> {
    let Read { header, records, unreadable_lines, .. } = read_lines(path)?;
    Ok(Content { header, records, unreadable_lines })
}

fn read_lines(path: &Path) -> Result<Read<Header, Record>, JournalError> {
    lines::read(path, SCHEMA, |header: &Header| &header.schema)
}
