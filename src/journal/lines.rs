//! A file of JSON lines, the first of which is a header: appended to durably, and read again after a crash.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::JournalError;
use super::unknown::{UnknownKind, UnknownLine};
use crate::state_file::{self, FolderLink, folder_of, version_of};

/// The longest journal that is read.
const READ_BYTES_MAX: u64 = 64 << 20;
/// The longest journal that is written: what was written can always be read again.
const WRITE_BYTES_MAX: u64 = READ_BYTES_MAX / 2;

/// A journal's file, open for writing.
#[derive(Debug)]
pub(crate) struct Lines {
    file: File,
    path: PathBuf,
    /// Where the last whole append ended.
    end: u64,
    bytes_max: u64,
    /// Whether bytes of a failed append may be behind `end`.
    is_torn: bool,
}

/// What was read besides the records.
#[derive(Debug)]
pub(crate) struct Read<H> {
    pub(crate) header: H,
    /// How many records there were.
    pub(crate) records_len: usize,
    /// Lines that this qmpin does not know how to undo.
    pub(crate) unknown: Vec<UnknownLine>,
    /// Where the last whole line ends.
    whole: u64,
}

impl Lines {
    /// Starts a file; its folder must exist, and the file must not. The header is durable on return.
    pub(crate) fn create(path: &Path, header: &impl Serialize) -> Result<Lines, JournalError> {
        let fail = io_error("create", path);
        let (folder, name) = folder_of(path, FolderLink::Refuse).map_err(fail)?;
        let mut lines = Lines::at(folder.create_new(name, 0o600).map_err(fail)?, path, 0);
        let started = lines.append(std::slice::from_ref(header)).and_then(|()| {
            // The file's name must be as durable as its lines.
            folder.sync().map_err(fail)
        });
        if started.is_err() {
            remove_incomplete(path);
        }
        started.map(|()| lines)
    }

    /// Starts a file with these lines, in the place of the one that may be there: a reader finds the one or the
    /// other, whole. Where it fails, the one that is there stays.
    pub(crate) fn replace(
        path: &Path,
        header: &impl Serialize,
        records: &[impl Serialize],
        unknown: &[UnknownLine],
    ) -> Result<Lines, JournalError> {
        let new = replacement(path);
        // One that a killed process has left is in the way of `create`.
        remove_incomplete(&new);
        let mut lines = Lines::create(&new, header)?;
        let fail = io_error("replace", path);
        let (folder, new_name) = folder_of(&new, FolderLink::Refuse).map_err(fail)?;
        let rename = |name| folder.rename(new_name, name).map_err(fail);
        let replaced = lines
            .append(records)
            .and_then(|()| lines.append_text(&unknown_text(unknown)))
            .and_then(|()| path.file_name().map_or(Ok(()), rename));
        if let Err(error) = replaced {
            remove_incomplete(&new);
            return Err(error);
        }
        path.clone_into(&mut lines.path);
        // The old file has no name any more, so there is no way back; and a power cut, which alone could undo the
        // rename, ends the boot for which the journal is valid.
        if let Err(error) = folder.sync() {
            tracing::debug!("{}: the folder cannot be synced: {error}", path.display());
        }
        Ok(lines)
    }

    /// Goes on with a file that was read: a torn last line is cut off.
    pub(crate) fn resume<H>(path: &Path, read: &Read<H>) -> Result<Lines, JournalError> {
        let fail = io_error("open", path);
        let (folder, name) = folder_of(path, FolderLink::Refuse).map_err(fail)?;
        let file = folder.append(name).map_err(fail)?;
        if read.unknown.first().is_some_and(|line| line.number == 1) {
            return Err(JournalError::Newer { path: path.to_owned() });
        }
        file.set_len(read.whole).map_err(fail)?;
        Ok(Lines::at(file, path, read.whole))
    }

    fn at(file: File, path: &Path, end: u64) -> Lines {
        let path = path.to_owned();
        Lines { file, path, end, bytes_max: WRITE_BYTES_MAX, is_torn: false }
    }

    #[cfg(test)]
    pub(crate) fn limit_to(&mut self, bytes_max: u64) {
        self.bytes_max = bytes_max;
    }

    /// Whether the file still has its name.
    pub(crate) fn has_name(&self) -> bool {
        let named = fs::symlink_metadata(&self.path);
        !named.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Adds lines, all or none, and returns once they are durable.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing may be written to any knob.
    pub(crate) fn append(&mut self, records: &[impl Serialize]) -> Result<(), JournalError> {
        let mut bytes = Vec::with_capacity(records.len() * 128);
        for record in records {
            serde_json::to_writer(&mut bytes, record)
                .map_err(|error| io_error("write", &self.path)(error.into()))?;
            bytes.push(b'\n');
        }
        self.append_text(&bytes)
    }

    fn append_text(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.check(bytes.len() as u64)?;
        let written = self.file.write_all(bytes).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // A full /run leaves half a line. It is cut off now, or before the next append.
            self.is_torn = self.file.set_len(self.end).is_err();
            return Err(io_error("write", &self.path)(source));
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Proves that what is appended now can be read again: the file is the one that has the name, it ends where
    /// the last append ended, with a whole line, and there is room for more.
    fn check(&mut self, more: u64) -> Result<(), JournalError> {
        let fail = io_error("write", &self.path);
        if self.is_torn {
            self.file.set_len(self.end).map_err(fail)?;
            self.is_torn = false;
        }
        let own = self.file.metadata().map_err(fail)?;
        let named = match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(JournalError::Removed { path: self.path.clone() });
            }
            named => named.map_err(fail)?,
        };
        let untrusted = |reason| Err(JournalError::Untrusted { path: self.path.clone(), reason });
        if (named.dev(), named.ino()) != (own.dev(), own.ino()) {
            return untrusted("another file has its name".to_owned());
        }
        if own.len() != self.end {
            let (found, end) = (own.len(), self.end);
            return untrusted(format!("it has {found} bytes instead of {end}"));
        }
        let mut last = [b'\n'];
        if let Some(at) = self.end.checked_sub(1) {
            self.file.read_exact_at(&mut last, at).map_err(fail)?;
        }
        if last != [b'\n'] {
            return untrusted("its last line is incomplete".to_owned());
        }
        if self.end + more > self.bytes_max {
            let bytes_max = self.bytes_max;
            return Err(JournalError::Full { path: self.path.clone(), bytes_max });
        }
        Ok(())
    }
}

/// Where a file is while it is not yet whole. No VM's file can have that name.
fn replacement(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    new.into()
}

/// Removes what a process has left that was killed as it replaced the file.
pub(crate) fn remove_replacement(path: &Path) {
    remove_incomplete(&replacement(path));
}

/// Removes a file that says nothing yet. Where that fails it is in the way only of the process that replaces the
/// journal again, which then reports it.
fn remove_incomplete(path: &Path) {
    if let Err(error) = state_file::remove_state(path) {
        tracing::debug!("{}: cannot be removed: {error}", path.display());
    }
}

fn unknown_text(lines: &[UnknownLine]) -> Vec<u8> {
    let lines = lines.iter().filter(|line| line.number > 1);
    lines.flat_map(|line| line.text.iter().copied().chain([b'\n'])).collect()
}

/// Reads a file whose header has this schema, or a later version of it. Each record goes to `take`.
///
/// # Errors
/// [`JournalError`] where the file cannot be read or its first line is no such header.
pub(crate) fn read<H: DeserializeOwned, R: DeserializeOwned>(
    path: &Path,
    schema: &str,
    mut take: impl FnMut(R),
) -> Result<Read<H>, JournalError> {
    let fail = io_error("read", path);
    let not_a_journal =
        |reason: String| JournalError::NotAJournal { path: path.to_owned(), reason };
    let file = state_file::open_state(path).map_err(fail)?;
    let mut reader = BufReader::new(file.take(READ_BYTES_MAX + 1));
    let mut line = Vec::new();
    let mut next = |line: &mut Vec<u8>| -> Result<usize, JournalError> {
        line.clear();
        reader.read_until(b'\n', line).map_err(fail)
    };
    let mut length = next(&mut line)? as u64;
    if line.pop_if(|last| *last == b'\n').is_none() {
        return Err(if is_torn_header(&line, schema) {
            JournalError::NeverBegun { path: path.to_owned() }
        } else {
            not_a_journal("it has no first line".to_owned())
        });
    }
    let (header, version) = header(&line, schema).map_err(not_a_journal)?;
    let mut read = Read { header, records_len: 0, unknown: Vec::new(), whole: length };
    if version > 1 {
        read.unknown.push(UnknownLine { number: 1, kind: UnknownKind::Newer, text: line.clone() });
    }
    for number in 2.. {
        let bytes = next(&mut line)? as u64;
        length += bytes;
        if length > READ_BYTES_MAX {
            let text = format!("larger than {READ_BYTES_MAX} bytes");
            return Err(fail(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        // A torn last line was never followed by a write.
        if bytes == 0 || line.pop_if(|last| *last == b'\n').is_none() {
            break;
        }
        read.whole = length;
        match serde_json::from_slice(&line) {
            Ok(record) => {
                read.records_len += 1;
                take(record);
            }
            Err(_) => read.unknown.push(UnknownLine::of(number, &line)),
        }
    }
    Ok(read)
}

/// Whether a line that can be read has members that this version does not know: it would lose them if it wrote
/// the file anew.
pub(crate) fn has_unknown_members<R: DeserializeOwned + Serialize>(
    path: &Path,
) -> Result<bool, JournalError> {
    let file = state_file::open_state(path).map_err(io_error("read", path))?;
    let lines = BufReader::new(file.take(READ_BYTES_MAX)).split(b'\n').skip(1);
    for line in lines {
        let line = line.map_err(io_error("read", path))?;
        let Ok(record) = serde_json::from_slice::<R>(&line) else { continue };
        let said: Value = serde_json::from_slice(&line).unwrap_or_default();
        let known = serde_json::to_value(record).unwrap_or_default();
        if !covers(&known, &said) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether all members of `said` are in `known`.
fn covers(known: &Value, said: &Value) -> bool {
    match (known, said) {
        (Value::Object(known), Value::Object(said)) => {
            said.iter().all(|(name, said)| known.get(name).is_some_and(|known| covers(known, said)))
        }
        (Value::Array(known), Value::Array(said)) => {
            known.len() == said.len()
                && known.iter().zip(said).all(|(known, said)| covers(known, said))
        }
        // How a value is written may differ, such as a cpulist.
        _ => true,
    }
}

/// The header, and the version of its schema.
fn header<H: DeserializeOwned>(line: &[u8], schema: &str) -> Result<(H, u32), String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let found = value.get("schema").and_then(Value::as_str).unwrap_or("missing");
    let version = version_of(found, schema).ok_or_else(|| format!("its schema is {found}"))?;
    let header = serde_json::from_value(value).map_err(|error| error.to_string())?;
    Ok((header, version))
}

/// Whether this may be the beginning of a header, and no more.
fn is_torn_header(text: &[u8], schema: &str) -> bool {
    let start = format!("{{\"schema\":\"{schema}\"");
    start.as_bytes().starts_with(text) || text.starts_with(start.as_bytes())
}

pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl Fn(io::Error) -> JournalError + Copy {
    move |source| JournalError::Io { action, path: path.to_owned(), source }
}
