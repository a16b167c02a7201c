//! Files that qmpin acts upon as root: its own state, policies, pid files. Opens, reads and replaces them so that
//! no other user of the host decides what is read, and nothing outside the folder is written.
//!
//! ```text
//!   path ─▶ open its folder ─▶ owner and mode ─▶ fstatat(name): a regular file? ─▶ openat(name) ─▶ owner and mode
//!           O_DIRECTORY         root or the        never opens a FIFO or device     O_NOFOLLOW       as the folder
//!           O_NOFOLLOW          user that runs                                      O_NONBLOCK
//!                               qmpin, not g+w, o+w
//! ```
//!
//! The folder is checked first and kept open, so that a name in it means the same file for every following call.
//! No other user can create or rename files in a folder that passed the check.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat, fstat, fsync, openat, renameat, statat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Room for the names of a folder that are read at once.
const NAMES_BYTES: usize = 4 << 10;

/// Why a file or folder is not used although it can be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Distrust {
    /// It is something else than a regular file (or, where one was expected, a folder).
    #[error("it is {found}, not {expected}")]
    Kind {
        /// `a FIFO`.
        found: &'static str,
        /// `a regular file`.
        expected: &'static str,
    },
    /// It belongs to another user.
    #[error("it belongs to user {uid}, not to root: check it, then `chown root` it")]
    Owner {
        /// That user's number.
        uid: u32,
    },
    /// Other users can write it.
    #[error("other users can write it (mode {mode:04o}): check it, then `chmod go-w` it")]
    Writable {
        /// Its permission bits.
        mode: u32,
    },
    /// One of the above applies to the folder that holds it. (Not a source: it is in the message.)
    #[error("directory {}: {why}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        why: Box<Distrust>,
    },
}

impl From<Distrust> for io::Error {
    fn from(distrust: Distrust) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, distrust)
    }
}

/// What to do where the folder itself is named by a symbolic link. Links to files are never followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FolderLink {
    /// Refuse it: files are written there.
    Refuse,
    /// Follow it: `/etc/pve/qemu-server` is one, and what it leads to is checked all the same.
    Follow,
}

/// A folder that only root and the user who runs qmpin can change, held open.
#[derive(Debug)]
pub struct Folder(OwnedFd);

impl Folder {
    /// Opens a folder and checks its owner and mode.
    ///
    /// # Errors
    /// The kernel's answer, or [`Distrust`].
    pub fn open(path: &Path, link: FolderLink) -> io::Result<Folder> {
        let no_follow = match link {
            FolderLink::Refuse => OFlags::NOFOLLOW,
            FolderLink::Follow => OFlags::empty(),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | no_follow;
        let distrusted =
            |why| Distrust::Folder { path: path.to_owned(), why: Box::new(why) }.into();
        let fd = match openat(CWD, path, flags, Mode::empty()) {
            Ok(fd) => fd,
            // Linux answers ENOTDIR for a link where both flags are given.
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let found = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map(|stat| kind(&stat));
                return Err(match found {
                    Ok(found) if found != FOLDER => {
                        distrusted(Distrust::Kind { found, expected: FOLDER })
                    }
                    _ => Errno::NOTDIR.into(),
                });
            }
            Err(errno) => return Err(errno.into()),
        };
        check_owner(&fstat(&fd)?).map_err(distrusted)?;
        Ok(Folder(fd))
    }

    /// Returns the text of a file of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// The kernel's answer, [`Distrust`], or `InvalidData` where it is longer or not UTF-8.
    pub fn read(&self, name: &OsStr, bytes_max: u64) -> io::Result<String> {
        let file = self.open_to_read(name)?;
        let mut bytes = Vec::new();
        file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bytes_max {
            let text = format!("it is larger than {bytes_max} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        String::from_utf8(bytes)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
    }

    /// Opens an existing file to read it.
    ///
    /// # Errors
    /// The kernel's answer, or [`Distrust`].
    pub fn open_to_read(&self, name: &OsStr) -> io::Result<File> {
        self.open_file(name, OFlags::RDONLY, Mode::empty())
    }

    /// Opens an existing file to append to it, and to read it.
    ///
    /// # Errors
    /// The kernel's answer, or [`Distrust`].
    pub fn append(&self, name: &OsStr) -> io::Result<File> {
        self.open_file(name, OFlags::RDWR | OFlags::APPEND, Mode::empty())
    }

    /// Opens a file for writing, as it is or, where there is none, empty and for its owner alone.
    ///
    /// # Errors
    /// The kernel's answer, or [`Distrust`].
    pub fn open_or_create(&self, name: &OsStr) -> io::Result<File> {
        self.open_file(name, OFlags::WRONLY | OFlags::CREATE, Mode::from_raw_mode(0o600))
    }

    /// Creates a file to append to it, and to read it. The file must not exist.
    ///
    /// # Errors
    /// The kernel's answer; `EEXIST` also for a symbolic link that leads nowhere.
    pub fn create_new(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL;
        self.open_file(name, flags, Mode::from_raw_mode(mode))
    }

    /// Replaces a file that all may read, or creates it: whole, or not at all. It is written as `NAME.new`, made
    /// durable, and renamed; a regular file of that name, left by a process that was killed, is removed first.
    ///
    /// # Errors
    /// The kernel's answer, or [`Distrust`] where `name` or `NAME.new` is no regular file; then nothing was changed.
    pub fn replace(&self, name: &OsStr, bytes: &[u8]) -> io::Result<()> {
        let mut new = name.to_owned();
        new.push(".new");
        self.replace_by(name, &new, bytes)
    }

    /// As [`replace`](Folder::replace), with another name for the file while it is not whole.
    ///
    /// # Errors
    /// As [`replace`](Folder::replace).
    pub fn replace_by(&self, name: &OsStr, new: &OsStr, bytes: &[u8]) -> io::Result<()> {
        self.check_kind(name)?;
        if self.check_kind(new)? {
            self.remove(new)?;
        }
        let write = || -> io::Result<()> {
            let mut file = self.create_new(new, 0o644)?;
            file.write_all(bytes)?;
            file.sync_data()?;
            self.rename(new, name)
        };
        write().inspect_err(|_| {
            let _ = self.remove(new);
        })
    }

    /// Renames a file to another name of this folder, over what is there.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(renameat(&self.0, from, &self.0, to)?)
    }

    /// Removes a name. Whether it was there.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn remove(&self, name: &OsStr) -> io::Result<bool> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes names that came or went durable.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.0)?)
    }

    /// Returns the names in it, sorted. Those that are not UTF-8 are left out.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let fd = openat(&self.0, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut room = [MaybeUninit::uninit(); NAMES_BYTES];
        let mut entries = RawDir::new(fd, &mut room);
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            if let Ok(name) = entry?.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn open_file(&self, name: &OsStr, access: OFlags, mode: Mode) -> io::Result<File> {
        // Opening a device may already do something, so that is asked before.
        self.check_kind(name)?;
        // Without O_NONBLOCK, opening a FIFO would wait for its other end.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(openat(&self.0, name, flags, mode)?);
        let stat = fstat(&file)?;
        must_be_regular(&stat)?;
        check_owner(&stat)?;
        Ok(file)
    }

    /// Whether there is a file of this name. One that is not regular is an error.
    fn check_kind(&self, name: &OsStr) -> io::Result<bool> {
        if name.as_bytes().contains(&b'/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name with a slash"));
        }
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(must_be_regular(&stat).map(|()| true)?),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

const FOLDER: &str = "a directory";

fn kind(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "a regular file",
        FileType::Directory => FOLDER,
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "something unknown",
    }
}

fn must_be_regular(stat: &Stat) -> Result<(), Distrust> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        _ => Err(Distrust::Kind { found: kind(stat), expected: "a regular file" }),
    }
}

fn check_owner(stat: &Stat) -> Result<(), Distrust> {
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return Err(Distrust::Owner { uid: stat.st_uid });
    }
    let mode = stat.st_mode & 0o7777;
    if mode & 0o022 == 0 { Ok(()) } else { Err(Distrust::Writable { mode }) }
}

/// Opens the folder of a file, and returns the file's name beside it.
///
/// # Errors
/// As [`Folder::open`]; `InvalidInput` for a path without a name.
pub fn folder_of(path: &Path, link: FolderLink) -> io::Result<(Folder, &OsStr)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok((Folder::open(folder, link)?, name))
}

/// Returns the text of a state file of at most `bytes_max` bytes. Its folder is not a symbolic link.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::read`].
pub fn read_state(path: &Path, bytes_max: u64) -> io::Result<String> {
    let (folder, name) = folder_of(path, FolderLink::Refuse)?;
    folder.read(name, bytes_max)
}

/// Replaces a state file, or creates it: whole, or not at all. Its folder is not a symbolic link.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::replace`].
pub fn write_state(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (folder, name) = folder_of(path, FolderLink::Refuse)?;
    folder.replace(name, bytes)
}

/// Removes a state file. Whether it was there; where there is no folder it was not.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::remove`].
pub fn remove_state(path: &Path) -> io::Result<bool> {
    match folder_of(path, FolderLink::Refuse) {
        Ok((folder, name)) => folder.remove(name),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a state file to read it. Its folder is not a symbolic link.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::open_to_read`].
pub fn open_state(path: &Path) -> io::Result<File> {
    let (folder, name) = folder_of(path, FolderLink::Refuse)?;
    folder.open_to_read(name)
}

/// Returns the text of a file that qmpin reads and never writes: a policy, a pid file. As [`read_state`], but its
/// folder may be named by a symbolic link.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::read`].
pub fn read_config(path: &Path, bytes_max: u64) -> io::Result<String> {
    let (folder, name) = folder_of(path, FolderLink::Follow)?;
    folder.read(name, bytes_max)
}

/// Whether this name still leads to the file that is open: another process may have removed or replaced it.
///
/// # Errors
/// The kernel's answer about the open file.
pub fn has_name(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    let named = fs::symlink_metadata(path);
    Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino())))
}

/// Returns the version of a schema, such as 2 of `qmpin.lease/2`; `None`: it is no later version of `first`, which is
/// that of version 1.
pub(crate) fn version_of(schema: &str, first: &str) -> Option<u32> {
    let version = schema.strip_prefix(first.strip_suffix('1')?)?.parse().ok()?;
    (version >= 1).then_some(version)
}

/// Creates a folder for its owner to write and all to read, with those above it, and opens it.
///
/// # Errors
/// As [`Folder::open`], and those of `mkdir(2)`.
pub fn create_folder(path: &Path) -> io::Result<Folder> {
    use std::os::unix::fs::DirBuilderExt as _;
    let is_there = fs::symlink_metadata(path).is_ok();
    if !is_there {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
    }
    Folder::open(path, FolderLink::Refuse)
}

#[cfg(test)]
mod tests;
