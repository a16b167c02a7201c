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

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::journal::lines::{Lines, Schema, io_error};
use crate::journal::{JournalError, UnknownLines, lines};
use crate::knobs::host::places::{Place, Value};

/// A file is written anew where it has more lines than this many times those that are needed …
const LINES_PER_LIVE_MAX: usize = 4;
/// … and so many: a small one costs nothing.
const DEAD_LINES_MAX: usize = 1_000;

/// The schema of the host's journal.
pub const HOST_SCHEMA: &str = "qmpin.host-journal/1";

const FAMILY: Schema = Schema { family: "qmpin.host-journal/", version: 1 };

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Header {
    schema: String,
    boot_id: String,
}

/// A line after the first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostRecord {
    /// What a place held before anything could have changed it.
    Original {
        /// Where.
        place: Place,
        /// What.
        value: Value,
    },
    /// CPUs of one VM about to be taken away from the host: the kernel will change masks by itself.
    Off(CpuSet),
    /// A write about to happen, or what the kernel does because of one: an interrupt is created with it, a preference
    /// changes with its governor.
    Intent {
        /// Where.
        place: Place,
        /// What was seen.
        from: Value,
        /// What is to be there.
        to: Value,
    },
    /// The kernel would not take it, or made something else of it. Nothing to undo: it is for who asks later.
    Refused {
        /// Where.
        place: Place,
        /// What was to be there.
        value: Value,
    },
    /// The place is as before again, or gone, or another program's.
    Settled(Place),
}

/// What the host's journal remembers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostMemory {
    places: BTreeMap<Place, Known>,
    off: Vec<CpuSet>,
    unknown: Option<UnknownLines>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Known {
    original: Value,
    ours: Vec<Value>,
    /// What of `ours` the kernel would not take the last time.
    refused: Vec<Value>,
}

impl HostMemory {
    /// Sorts records.
    #[must_use]
    pub fn of<'a>(records: impl IntoIterator<Item = &'a HostRecord>) -> HostMemory {
        let mut memory = HostMemory::default();
        for record in records {
            memory.add(record);
        }
        memory
    }

    fn add(&mut self, record: &HostRecord) {
        match record {
            HostRecord::Original { place, value } => {
                self.places.entry(place.clone()).or_insert_with(|| Known::of(value));
            }
            HostRecord::Off(cpus) => {
                if !self.off.contains(cpus) {
                    self.off.push(*cpus);
                }
            }
            HostRecord::Intent { place, from, to } => {
                let known = self.places.entry(place.clone()).or_insert_with(|| Known::of(from));
                if !known.ours.contains(to) {
                    known.ours.push(to.clone());
                }
                known.refused.retain(|value| value != to);
            }
            HostRecord::Refused { place, value } => {
                if let Some(known) = self.places.get_mut(place)
                    && !known.refused.contains(value)
                {
                    known.refused.push(value.clone());
                }
            }
            HostRecord::Settled(place) => {
                self.places.remove(place);
            }
        }
    }

    /// Whether it is known already.
    fn covers(&self, record: &HostRecord) -> bool {
        match record {
            HostRecord::Original { place, .. } => self.places.contains_key(place),
            HostRecord::Off(cpus) => self.off.contains(cpus),
            HostRecord::Intent { place, to, .. } => self
                .places
                .get(place)
                .is_some_and(|known| known.ours.contains(to) && !known.refused.contains(to)),
            HostRecord::Refused { place, value } => {
                self.places.get(place).is_none_or(|known| known.refused.contains(value))
            }
            HostRecord::Settled(place) => !self.places.contains_key(place),
        }
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty() && self.off.is_empty() && self.unknown.is_none()
    }

    /// Lines of the file that this qmpin does not know how to undo.
    #[must_use]
    pub fn unknown(&self) -> Option<&UnknownLines> {
        self.unknown.as_ref()
    }

    /// How many records come to this.
    fn records_len(&self) -> usize {
        let of_place = |known: &Known| 1 + known.ours.len() + known.refused.len();
        self.off.len() + self.places.values().map(of_place).sum::<usize>()
    }

    /// The records that come to this.
    fn records(&self) -> Vec<HostRecord> {
        let mut records: Vec<HostRecord> = self.off.iter().copied().map(HostRecord::Off).collect();
        for (place, Known { original, ours, refused }) in &self.places {
            let (place, from) = (place.clone(), original.clone());
            records.push(HostRecord::Original { place: place.clone(), value: from.clone() });
            records.extend(ours.iter().map(|to| HostRecord::Intent {
                place: place.clone(),
                from: from.clone(),
                to: to.clone(),
            }));
            records.extend(
                refused.iter().map(|value| HostRecord::Refused {
                    place: place.clone(),
                    value: value.clone(),
                }),
            );
        }
        records
    }

    /// Whether units of systemd's are limited, or about to be.
    #[must_use]
    pub fn has_units(&self) -> bool {
        self.places.keys().any(|place| place.limited_cgroup().is_some())
    }

    /// Whether interrupts, where new ones go, or who balances them, are remembered.
    #[must_use]
    pub fn has_irqs(&self) -> bool {
        self.has_irqbalance()
            || self.has_new_irqs()
            || self.places.keys().any(|place| place.irq().is_some())
    }

    /// Whether it was changed where new interrupts go, or is about to be.
    #[must_use]
    pub fn has_new_irqs(&self) -> bool {
        self.places.contains_key(&Place::of_new_irqs())
    }

    /// Whether an irqbalance was configured, or is about to be.
    #[must_use]
    pub fn has_irqbalance(&self) -> bool {
        self.places.keys().any(|place| matches!(place, Place::Irqbalance(_)))
    }

    /// Whether CPUs were kept from kernel threads at any time.
    #[must_use]
    pub fn has_excluded(&self) -> bool {
        !self.off.is_empty()
    }

    /// What a place held before qmpin.
    #[must_use]
    pub fn original(&self, place: &Place) -> Option<&Value> {
        self.places.get(place).map(|known| &known.original)
    }

    /// All places that are remembered, with what they held.
    pub fn originals(&self) -> impl Iterator<Item = (&Place, &Value)> {
        self.places.iter().map(|(place, known)| (place, &known.original))
    }

    /// Whether a place was to hold something else at any time.
    #[must_use]
    pub fn was_changed(&self, place: &Place) -> bool {
        self.places.get(place).is_some_and(|known| !known.ours.is_empty())
    }

    /// Whether a place was to hold this value once.
    #[must_use]
    pub fn was_tried(&self, place: &Place, value: &Value) -> bool {
        self.places.get(place).is_some_and(|known| known.ours.contains(value))
    }

    /// Whether a place was to hold this value, and the kernel would not take it.
    #[must_use]
    pub fn was_refused(&self, place: &Place, value: &Value) -> bool {
        self.places.get(place).is_some_and(|known| known.refused.contains(value))
    }

    /// Whether what is there now is qmpin's doing: written by it, or by the kernel as it took CPUs away
    /// or got them back. A kernel thread is then on all others, or on all.
    #[must_use]
    pub fn is_ours(&self, place: &Place, found: &Value, online: &CpuSet) -> bool {
        let Some(known) = self.places.get(place) else { return false };
        let same = |other: &Value| other.same(found, online);
        let has_exclusion_mask = |from: &CpuSet| self.has_exclusion_mask(found, from, online);
        known.ours.iter().any(same)
            || matches!(place, Place::Thread(_))
                && (same(&Value::Cpus(*online))
                    || has_exclusion_mask(online)
                    || known.original.cpus().is_some_and(|original| has_exclusion_mask(&original)))
    }

    /// Whether a kernel thread with this mask was put where it is as CPUs were taken away: it is on all of
    /// `from` but those of one or several VMs, which come and go one by one. One that is new has no mask of its
    /// own, and would be on all that are online; one that another program has set keeps what is left of that
    /// (`kernel/sched/core.c: __set_cpus_allowed_ptr`, `user_cpus_ptr`, since Linux 6.2).
    #[must_use]
    pub fn has_exclusion_mask(&self, found: &Value, from: &CpuSet, online: &CpuSet) -> bool {
        let Some(found) = found.cpus().map(|found| found & *online) else { return false };
        let missing = (*from & *online) - found;
        let off = self.off.iter().map(|off| *off & *from & *online);
        let off = off.filter(|off| off.is_subset(&missing));
        found.is_subset(from)
            && !missing.is_empty()
            && off.fold(CpuSet::EMPTY, |all, off| all | off) == missing
    }
}

impl Known {
    fn of(original: &Value) -> Known {
        Known { original: original.clone(), ours: Vec::new(), refused: Vec::new() }
    }
}

/// What is at the journal's path.
enum File {
    None,
    /// Its writer was killed before the first line was there: nothing was written.
    NeverBegun,
    Begun(lines::Read<Header>, HostMemory),
}

fn read(path: &Path) -> Result<File, JournalError> {
    let mut memory = HostMemory::default();
    match lines::read::<Header, HostRecord>(path, FAMILY, |record| memory.add(&record)) {
        Ok(read) => {
            memory.unknown = UnknownLines::of(path, &read.unknown);
            Ok(File::Begun(read, memory))
        }
        Err(JournalError::NeverBegun { .. }) => Ok(File::NeverBegun),
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(File::None)
        }
        Err(error) => Err(error),
    }
}

/// The host's journal, open for writing.
#[derive(Debug)]
pub struct HostJournal {
    path: PathBuf,
    boot_id: String,
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
            boot_id: boot_id.to_owned(),
            lines: None,
            memory: HostMemory::default(),
            records_len: 0,
        };
        lines::remove_replacement(path);
        match read(path)? {
            File::None => {}
            File::NeverBegun => journal.remove()?,
            File::Begun(read, _) if read.header.boot_id != boot_id => journal.remove()?,
            File::Begun(read, memory) => {
                journal.lines = Some(Lines::resume(path, &read)?);
                journal.memory = memory;
                journal.records_len = read.records_len;
            }
        }
        Ok(journal)
    }

    /// What a journal of this boot remembers, without opening it for writing; nothing where there is
    /// none.
    ///
    /// # Errors
    /// [`JournalError`] where the file cannot be read or is no such journal.
    pub fn read(path: &Path, boot_id: &str) -> Result<HostMemory, JournalError> {
        match read(path)? {
            File::Begun(read, memory) if read.header.boot_id == boot_id => Ok(memory),
            _ => Ok(HostMemory::default()),
        }
    }

    /// Writes anew what was known of a file that another program has removed.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn rewrite(&mut self, known: &HostMemory) -> Result<(), JournalError> {
        let records = known.records();
        let unknown = known.unknown().map(|unknown| &*unknown.lines).unwrap_or_default();
        self.lines = Some(Lines::replace(&self.path, &self.header(), &records, unknown)?);
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

    fn header(&self) -> Header {
        Header { schema: HOST_SCHEMA.to_owned(), boot_id: self.boot_id.clone() }
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
        let header = self.header();
        let lines = match &mut self.lines {
            Some(lines) => lines,
            none => none.insert(Lines::create(&self.path, &header)?),
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
