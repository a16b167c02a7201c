//! The host's journal, `/run/qmpin/.host.journal`: what places of the host held before qmpin. One for
//! all VMs: a place is the host's, whichever VM wanted it changed.
//!
//! ```text
//!   {"schema":"qmpin.host-journal/1","boot_id":"…"}
//!   {"original":{"place":…,"value":…}}           seen before anything could have changed it
//!   {"off":"12-19"}                              CPUs of a VM that are about to be taken away from the host
//!   {"intent":{"place":…,"from":…,"to":…}}       a write about to happen
//!   {"refused":{"place":…,"value":…}}            it was tried, and the kernel would not
//!   {"settled":…}                                as before again: forgotten
//! ```
//!
//! The file goes with the last place. Kernel threads that come and go leave lines of which nothing is left
//! to know; where these are most of it, it is written anew without them ([`HostJournal::compact`]).

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::journal::lines::{Lines, io_error};
use crate::journal::{JournalError, UnknownLines, lines};
use crate::knobs::execute::Undo;
use crate::knobs::host::memory::{HostMemory, HostRecord};

/// A file is written anew where it has more lines than this many times those that are needed …
const LINES_PER_LIVE_MAX: usize = 4;
/// … and so many: a small one costs nothing.
const DEAD_LINES_MAX: usize = 1_000;

/// The schema of the host's journal.
pub const HOST_SCHEMA: &str = "qmpin.host-journal/1";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Header {
    schema: String,
    boot_id: String,
}

fn read(path: &Path) -> Result<(lines::Read<Header>, HostMemory), JournalError> {
    let mut memory = HostMemory::default();
    let read = lines::read::<Header, HostRecord>(path, HOST_SCHEMA, |record| memory.add(&record))?;
    memory.unknown = UnknownLines::of(path, &read.unknown);
    Ok((read, memory))
}

/// Whether there is no file.
fn is_absent(error: &JournalError) -> bool {
    matches!(error, JournalError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// The host's journal, open for writing.
#[derive(Debug)]
pub struct HostJournal {
    path: PathBuf,
    header: Header,
    lines: Option<Lines>,
    memory: HostMemory,
    /// How many records the file has.
    records_len: usize,
}

impl HostJournal {
    /// Opens it, or what will be it: nothing is written before the first record. A journal of another
    /// boot belongs to no VM any more and is removed. Only under the host's lock, and for no longer: the
    /// next one to have it may write the file anew.
    ///
    /// # Errors
    /// [`JournalError`] where the file cannot be read or is no such journal.
    pub fn open(path: &Path, boot_id: &str) -> Result<HostJournal, JournalError> {
        let mut journal = HostJournal {
            path: path.to_owned(),
            header: Header { schema: HOST_SCHEMA.to_owned(), boot_id: boot_id.to_owned() },
            lines: None,
            memory: HostMemory::default(),
            records_len: 0,
        };
        lines::remove_replacement(path);
        match read(path) {
            Ok((read, memory)) if read.header.boot_id == boot_id => {
                journal.lines = Some(Lines::resume(path, &read)?);
                journal.memory = memory;
                journal.records_len = read.records_len;
            }
            // Of another boot; or its writer was killed before the first line was there: nothing was written.
            Ok(_) | Err(JournalError::NeverBegun { .. }) => journal.remove()?,
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(journal)
    }

    /// What a journal of this boot remembers, without opening it for writing; nothing where there is
    /// none.
    ///
    /// # Errors
    /// [`JournalError`] where the file cannot be read or is no such journal.
    pub fn read(path: &Path, boot_id: &str) -> Result<HostMemory, JournalError> {
        match read(path) {
            Ok((read, memory)) if read.header.boot_id == boot_id => Ok(memory),
            Ok(_) | Err(JournalError::NeverBegun { .. }) => Ok(HostMemory::default()),
            Err(error) if is_absent(&error) => Ok(HostMemory::default()),
            Err(error) => Err(error),
        }
    }

    /// Writes anew what was known of a file that another program has removed.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn rewrite(&mut self, known: &HostMemory) -> Result<(), JournalError> {
        let records = known.records();
        let unknown = known.unknown().map(|unknown| &*unknown.lines).unwrap_or_default();
        self.lines = Some(Lines::replace(&self.path, &self.header, &records, unknown)?);
        self.memory = known.clone();
        self.records_len = records.len();
        Ok(())
    }

    /// Writes it anew where most of it is history: every pass reads all of it. A file with something that a newer
    /// qmpin wrote stays as it is, since that one may work beside this one.
    ///
    /// # Errors
    /// [`JournalError`]; then the file is as it was, and serves as before.
    pub fn compact(&mut self) -> Result<(), JournalError> {
        let enough = LINES_PER_LIVE_MAX * self.memory.records_len() + DEAD_LINES_MAX;
        if self.records_len <= enough
            || self.memory.unknown.is_some()
            || lines::has_unknown_members::<HostRecord>(&self.path)?
        {
            return Ok(());
        }
        let memory = self.memory.clone();
        self.rewrite(&memory)
    }

    /// What is in it.
    #[must_use]
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// Whether there is a file.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.lines.is_some()
    }

    /// Adds records, all or none, and returns once they are durable. What is known already is left out.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing may be written anywhere. Also where a record could not be read again, since a
    /// place is only read where qmpin is known to write it.
    pub fn append(&mut self, mut records: Vec<HostRecord>) -> Result<(), JournalError> {
        records.retain(|record| !self.memory.covers(record));
        if records.is_empty() {
            return Ok(());
        }
        for record in &records {
            let again = serde_json::to_value(record).and_then(HostRecord::deserialize);
            again.map_err(|error| io_error("write", &self.path)(error.into()))?;
        }
        let lines = match &mut self.lines {
            Some(lines) => lines,
            none => none.insert(Lines::create(&self.path, &self.header)?),
        };
        lines.append(&records)?;
        self.records_len += records.len();
        for record in &records {
            self.memory.add(record);
        }
        Ok(())
    }

    /// Removes the file: there is nothing left to restore.
    ///
    /// # Errors
    /// [`JournalError::Io`].
    pub fn remove(&mut self) -> Result<(), JournalError> {
        self.lines = None;
        self.memory = HostMemory::default();
        self.records_len = 0;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

impl Undo for HostJournal {
    type Record = HostRecord;

    fn append(&mut self, records: Vec<HostRecord>) -> Result<(), JournalError> {
        HostJournal::append(self, records)
    }
}
