//! A file of JSON lines, the first of which is a header: appended to, durably, and read again after a
//! crash.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::JournalError;
use crate::state_file::{FolderLink, folder_of, read_state};

/// The longest journal that is read: a VM of 4,096 vCPUs replanned some hundred times.
const BYTES_MAX: u64 = 64 << 20;

/// A journal's file, open for writing.
#[derive(Debug)]
pub(super) struct Lines {
    file: File,
    path: PathBuf,
    /// Where the last whole append ended: a failed one is cut off there.
    end: u64,
}

/// What was read of one.
#[derive(Debug)]
pub(super) struct Read<H, R> {
    pub(super) header: H,
    pub(super) records: Vec<R>,
    /// Lines in the middle that could not be read, by number.
    pub(super) unreadable_lines: Vec<usize>,
    /// Where the last whole line ends.
    whole: u64,
}

impl Lines {
    /// Starts a file; its folder must exist, and the file not. The header is durable on return.
    pub(super) fn create(path: &Path, header: &impl Serialize) -> Result<Lines, JournalError> {
        let fail = io_error("create", path);
        let (folder, name) = folder_of(path, FolderLink::Refuse).map_err(fail)?;
        let file = folder.create_new(name, 0o600).map_err(fail)?;
        let mut lines = Lines { file, path: path.to_owned(), end: 0 };
        let started = lines.append(std::slice::from_ref(header)).and_then(|()| {
            // The file's name must be as durable as its lines.
            folder.sync().map_err(fail)
        });
        if started.is_err() {
            let _ = folder.remove(name);
        }
        started.map(|()| lines)
    }

    /// Starts a file with these records, in the place of the one that may be there: whoever reads meanwhile
    /// finds the one or the other, whole. Where it cannot be, the one that is there stays.
    pub(super) fn replace(
        path: &Path,
        header: &impl Serialize,
        records: &[impl Serialize],
    ) -> Result<Lines, JournalError> {
        let new = replacement(path);
        let mut lines = Lines::create(&new, header)?;
        let fail = io_error("replace", path);
        let (folder, new_name) = folder_of(&new, FolderLink::Refuse).map_err(fail)?;
        let rename = |name| folder.rename(new_name, name).map_err(fail);
        let replaced = lines.append(records).and_then(|()| path.file_name().map_or(Ok(()), rename));
        if let Err(error) = replaced {
            let _ = folder.remove(new_name);
            return Err(error);
        }
        path.clone_into(&mut lines.path);
        // The old file has no name any more, so there is no way back; and what a power cut may undo is of a boot
        // that is over then.
        let _ = folder.sync();
        Ok(lines)
    }

    /// Goes on with a file that was read: a torn last line is cut off.
    pub(super) fn resume<H, R>(path: &Path, read: &Read<H, R>) -> Result<Lines, JournalError> {
        let fail = io_error("open", path);
        let (folder, name) = folder_of(path, FolderLink::Refuse).map_err(fail)?;
        let file = folder.append(name).map_err(fail)?;
        file.set_len(read.whole).map_err(fail)?;
        Ok(Lines { file, path: path.to_owned(), end: read.whole })
    }

    /// Adds lines, all or none, and returns once they are durable.
    pub(super) fn append(&mut self, records: &[impl Serialize]) -> Result<(), JournalError> {
        let mut bytes = Vec::with_capacity(records.len() * 128);
        for record in records {
            serde_json::to_writer(&mut bytes, record)
                .map_err(|error| io_error("write", &self.path)(error.into()))?;
            bytes.push(b'\n');
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // A full /run leaves half a line; cut it off, so that later lines stay whole.
            let _ = self.file.set_len(self.end);
            let _ = self.file.seek(io::SeekFrom::End(0));
            return Err(io_error("write", &self.path)(source));
        }
        self.end += bytes.len() as u64;
        Ok(())
    }
}

/// Where a file is while it is not yet whole. No VM's file can have that name.
fn replacement(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    new.into()
}

/// Removes what somebody has left who was killed as he replaced the file. It is in nobody's way but of who
/// replaces it again.
pub(super) fn remove_replacement(path: &Path) {
    let new = replacement(path);
    if let Ok((folder, name)) = folder_of(&new, FolderLink::Refuse) {
        let _ = folder.remove(name);
    }
}

/// Reads a file whose header has this schema.
pub(super) fn read<H: DeserializeOwned, R: DeserializeOwned>(
    path: &Path,
    schema: &str,
    schema_of: impl Fn(&H) -> &str,
) -> Result<Read<H, R>, JournalError> {
    let text = read_state(path, BYTES_MAX).map_err(io_error("read", path))?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    let mut lines = text[..whole].lines();
    let not_a_journal =
        |reason: String| JournalError::NotAJournal { path: path.to_owned(), reason };
    let Some(first) = lines.next() else {
        return Err(if is_torn_header(&text, schema) {
            JournalError::NeverBegun { path: path.to_owned() }
        } else {
            not_a_journal("it has no first line".to_owned())
        });
    };
    let header: H =
        serde_json::from_str(first).map_err(|error| not_a_journal(error.to_string()))?;
    if schema_of(&header) != schema {
        return Err(not_a_journal(format!("its schema is {}", schema_of(&header))));
    }
    let mut read =
        Read { header, records: Vec::new(), unreadable_lines: Vec::new(), whole: whole as u64 };
    for (at, line) in lines.enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => read.records.push(record),
            Err(_) => read.unreadable_lines.push(at + 2),
        }
    }
    Ok(read)
}

/// Whether this may be the beginning of a header, and no more.
fn is_torn_header(text: &str, schema: &str) -> bool {
    let start = format!("{{\"schema\":\"{schema}\"");
    start.starts_with(text) || text.starts_with(&start)
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl Fn(io::Error) -> JournalError + Copy {
    move |source| JournalError::Io { action, path: path.to_owned(), source }
}
