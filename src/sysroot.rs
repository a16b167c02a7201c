//! `SysRoot`: the one door to `/sys`, `/proc` and `/etc`, so that a test or a captured machine can
//! stand behind it.
//!
//! A path given to it is relative and made of plain names: no `..`, no leading `/`. It reads whole
//! files of a bounded size and says, for each that it could not read, which one and why.

use std::fs;
use std::io::{self, Read, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use rustix::fs::RawDir;

/// The most that is read of one file. `/proc/interrupts` of a large machine is the longest we know.
pub const FILE_BYTES_MAX: usize = 16 << 20;

/// The most that is read of one sysfs attribute. The kernel's own limit is a page; only cpulists of
/// machines far beyond [`crate::ids::CPUS_MAX`] are longer.
pub const ATTRIBUTE_BYTES_MAX: usize = 8 << 10;

/// Enough for a line of `/proc/PID/stat`: 52 numbers and a name.
const LINE_BYTES: usize = 2 << 10;

/// Room for the names of a folder that are read at once: some hundred threads.
const NAMES_BYTES: usize = 4 << 10;

/// The root that all reading goes through: `/`, or a folder that looks like a machine.
#[derive(Clone, Debug)]
pub struct SysRoot {
    root: PathBuf,
}

/// A file or folder that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("could not read {}", path.display())]
pub struct ReadError {
    /// The full path, root included.
    pub path: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl ReadError {
    /// Whether the file is simply not there: the kernel has nothing to say.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
    }

    /// Whether a file of `/proc` says that its process or thread is gone: not there when it was
    /// opened, or gone while it was read. Any other error says nothing of the kind.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_absent() || self.source.raw_os_error() == Some(nix::libc::ESRCH)
    }
}

impl SysRoot {
    /// The machine qmpin runs on.
    #[must_use]
    pub fn live() -> SysRoot {
        SysRoot::at("/")
    }

    /// A folder that looks like a machine.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> SysRoot {
        SysRoot { root: root.into() }
    }

    /// Whether this is the machine itself and not a folder.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The folder all paths are relative to.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The full path of a relative one.
    ///
    /// # Errors
    /// [`ReadError`] where the path is absolute or has a `..`: it would leave the root.
    pub fn path(&self, relative: &str) -> Result<PathBuf, ReadError> {
        plain(relative).map(|path| self.root.join(path))
    }

    /// The whole text of a file, at most [`FILE_BYTES_MAX`].
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer; also where the file is not UTF-8 or
    /// larger than the limit.
    pub fn read(&self, relative: &str) -> Result<String, ReadError> {
        self.at_path(relative, |path| text_of(read_bytes(path)?))
    }

    /// As [`SysRoot::read`], for lines of `/proc` that hold a name of anybody's making: what is not
    /// UTF-8 in it is replaced.
    ///
    /// # Errors
    /// As [`SysRoot::read`], but for the UTF-8.
    pub fn read_lossy(&self, relative: &str) -> Result<String, ReadError> {
        let bytes = self.at_path(relative, read_bytes)?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// A file of `/proc` that is one line, such as `stat`: what is not UTF-8 in it is replaced.
    ///
    /// The end of the line shows that it was read whole, so there is no second read to find the file's.
    ///
    /// # Errors
    /// As [`SysRoot::read_lossy`].
    pub fn read_line_lossy(&self, relative: &str) -> Result<String, ReadError> {
        self.at_path(relative, |path| read_line(open_at_once(path)?))
    }

    /// A folder of which many files are to be read.
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer.
    pub fn folder(&self, relative: &str) -> Result<Folder, ReadError> {
        self.at_path(relative, |path| {
            Ok(Folder { path: path.to_owned(), file: fs::File::open(path)? })
        })
    }

    /// What a symbolic link says, without going there. Of a file in `/proc/PID/fd` it is what was opened, as
    /// that process names it.
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer; also where there is no link.
    pub fn link(&self, relative: &str) -> Result<PathBuf, ReadError> {
        self.at_path(relative, |path| fs::read_link(path))
    }

    /// The text of one sysfs attribute: one open, one read, at most [`ATTRIBUTE_BYTES_MAX`].
    ///
    /// sysfs hands an attribute out whole to a reader whose buffer is large enough
    /// (`Documentation/filesystems/sysfs.rst`), so a read that comes short of the buffer was the
    /// last one and need not be followed by another that says "end". For files of `/proc`, which
    /// give no such promise, there is [`SysRoot::read`].
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer; also where the attribute is not UTF-8
    /// or larger than the limit.
    pub fn read_attribute(&self, relative: &str) -> Result<String, ReadError> {
        self.at_path(relative, read_attribute)
    }

    /// Writes one value into a file of the kernel's: one open, one write, no newline added.
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer. A file that is not there is not made.
    pub fn write_value(&self, relative: &str, text: &str) -> Result<(), ReadError> {
        self.at_path(relative, |path| {
            let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
            // A kernel's file takes a value in one write or not at all.
            let length = file.write(text.as_bytes())?;
            if length == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
        })
    }

    /// Does something with a path, and names that path in the error.
    fn at_path<T>(
        &self,
        relative: &str,
        act: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<T, ReadError> {
        let path = self.path(relative)?;
        act(&path).map_err(|source| ReadError { path, source })
    }
}

/// A folder under the root, held open: the way to it is walked once, and a file in it is opened from
/// there. One of `/proc/PID` stands for that process for good, even if its number is used again.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    file: fs::File,
}

impl Folder {
    /// As [`SysRoot::read_line_lossy`], of a file in this folder.
    ///
    /// # Errors
    /// As [`SysRoot::read_lossy`].
    pub fn read_line_lossy(&self, relative: &str) -> Result<String, ReadError> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = openat(&self.file, plain(relative)?, flags, Mode::empty());
        let line = file.map_err(io::Error::from).and_then(|file| read_line(file.into()));
        line.map_err(|source| ReadError { path: self.path.join(relative), source })
    }

    /// The names in it that are numbers, ascending. It reads on from where it was read last, so this is
    /// for a folder just opened.
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer.
    pub fn numbers(&self) -> Result<Vec<i32>, ReadError> {
        self.entries(|name| name.parse().ok())
    }

    /// The names in it, sorted; those that are not UTF-8 are left out. As with [`Folder::numbers`], for a
    /// folder just opened.
    ///
    /// # Errors
    /// [`ReadError`] with the path and the kernel's answer.
    pub fn names(&self) -> Result<Vec<String>, ReadError> {
        self.entries(|name| (name != "." && name != "..").then(|| name.to_owned()))
    }

    fn entries<T: Ord>(&self, take: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, ReadError> {
        let mut room = [MaybeUninit::uninit(); NAMES_BYTES];
        let mut entries = RawDir::new(&self.file, &mut room);
        let mut taken = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry
                .map_err(|errno| ReadError { path: self.path.clone(), source: errno.into() })?;
            taken.extend(entry.file_name().to_str().ok().and_then(&take));
        }
        taken.sort_unstable();
        Ok(taken)
    }

    /// Its full path, root included.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A path that stays where it starts.
fn plain(relative: &str) -> Result<&Path, ReadError> {
    let path = Path::new(relative);
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(path);
    }
    let source = io::Error::new(io::ErrorKind::InvalidInput, "not a relative path of plain names");
    Err(ReadError { path: path.to_owned(), source })
}

fn read_line(mut file: fs::File) -> io::Result<String> {
    let mut bytes = [0; LINE_BYTES];
    let length = file.read(&mut bytes)?;
    let start = &bytes[..length];
    if start.ends_with(b"\n") {
        return Ok(String::from_utf8_lossy(start).into_owned());
    }
    let bytes = read_rest(file, start.to_owned())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_attribute(path: &Path) -> io::Result<String> {
    let mut file = open_at_once(path)?;
    let mut bytes = vec![0; ATTRIBUTE_BYTES_MAX + 1];
    let length = loop {
        match file.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read?,
        }
    };
    bytes.truncate(length);
    text_of(bounded(bytes, ATTRIBUTE_BYTES_MAX)?)
}

/// Opens a file for reading without waiting: a FIFO in its place has no other end that will come.
fn open_at_once(path: &Path) -> io::Result<fs::File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn text_of(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not UTF-8"))
}

fn bounded(bytes: Vec<u8>, bytes_max: usize) -> io::Result<Vec<u8>> {
    if bytes.len() <= bytes_max {
        return Ok(bytes);
    }
    let text = format!("larger than {bytes_max} bytes");
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file = open_at_once(path)?;
    // All that the kernel shows in /proc and /sys is a regular file.
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    // Files of /proc and /sys say they are empty or a page long, so their size is no help; nearly
    // all fit one read of this buffer, and the second read that finds the end is then skipped by
    // of use: a short read of a seq_file is not the end.
    read_rest(file, Vec::with_capacity(4096))
}

fn read_rest(file: fs::File, mut bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    bounded(bytes, FILE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_root() {
        let root = SysRoot::at("/nonexistent");
        let folder = SysRoot::live().folder("proc").expect("a folder");
        assert!(folder.read_line_lossy("self/../version").is_err_and(|error| !error.is_absent()));
        for bad in ["/etc/passwd", "../etc/passwd", "a/../b"] {
            assert!(root.read(bad).is_err_and(|error| !error.is_absent()), "{bad}");
        }
    }

    #[test]
    fn an_attribute_is_read_whole_or_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = SysRoot::at(dir.path());
        let full = "x".repeat(ATTRIBUTE_BYTES_MAX);
        fs::write(dir.path().join("full"), &full).expect("write");
        fs::write(dir.path().join("long"), format!("{full}x")).expect("write");
        assert_eq!(root.read_attribute("full").expect("read"), full);
        assert!(root.read_attribute("long").is_err_and(|error| !error.is_absent()));
        assert!(root.read_attribute("none").is_err_and(|error| error.is_absent()));
    }

    #[test]
    fn what_is_no_file_is_an_error_at_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = SysRoot::at(dir.path());
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR).expect("a FIFO");
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("zero")).expect("a link");
        for name in ["fifo", "zero"] {
            let error = root.read(name).expect_err(name);
            assert!(error.source.to_string().contains("not a regular file"), "{name}: {error:?}");
            assert!(root.read_lossy(name).is_err(), "{name}");
            // These do not ask, and do not wait, either.
            let _ = root.read_attribute(name);
            let _ = root.read_line_lossy(name);
        }
    }

    #[test]
    fn absent_file_is_distinguished_from_an_unreadable_one() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::write(dir.path().join("bin"), [0xff, 0xfe]).expect("write");
        let root = SysRoot::at(dir.path());
        assert!(root.read("nothing").is_err_and(|error| error.is_absent()));
        let error = root.read("bin").expect_err("not UTF-8");
        assert!(!error.is_absent());
        assert!(error.to_string().ends_with("bin"));
    }
}
