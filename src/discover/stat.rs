//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`: one line, five facts
//! (`Documentation/filesystems/proc.rst`, table 1-4).

use std::fmt::Display;
use std::io;
use std::path::Path;

use crate::ids::StartTicks;
use crate::sysroot::{Folder, ReadError, SysRoot};

/// A kernel thread (`PF_KTHREAD`, `include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x0020_0000;
/// An io_uring worker (`PF_IO_WORKER`).
const PF_IO_WORKER: u32 = 0x0000_0010;
/// A kernel worker that runs in a user process, such as vhost since Linux 6.4 (`PF_USER_WORKER`).
const PF_USER_WORKER: u32 = 0x0000_4000;

/// A thread whose mask is not to be set from outside (`PF_NO_SETAFFINITY`).
const PF_NO_SETAFFINITY: u32 = 0x0400_0000;

/// What the line says of a thread.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Stat {
    pub(crate) comm: String,
    pub(crate) state: char,
    pub(crate) flags: u32,
    pub(crate) start: StartTicks,
    pub(crate) last_cpu: Option<u32>,
}

impl Stat {
    /// Whether it is a zombie or on its way out.
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    /// Whether it was stopped, or is traced and stands.
    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }

    pub(crate) fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    pub(crate) fn is_bound(&self) -> bool {
        self.flags & PF_NO_SETAFFINITY != 0
    }

    pub(crate) fn is_io_worker(&self) -> bool {
        self.flags & PF_IO_WORKER != 0
    }

    pub(crate) fn is_user_worker(&self) -> bool {
        self.flags & PF_USER_WORKER != 0
    }
}

/// Of a process, or of any thread by its number.
///
/// # Errors
/// [`ReadError`]; where the kernel knows no such number it is that there is no file.
pub(crate) fn of(root: &SysRoot, id: impl Display) -> Result<Stat, ReadError> {
    read(root, &format!("proc/{id}/stat"))
}

/// Of the file at this path below the root.
///
/// # Errors
/// [`ReadError`], also where the file is none of the kernel's form.
pub(crate) fn read(root: &SysRoot, relative: &str) -> Result<Stat, ReadError> {
    let text = root.read_line_lossy(relative)?;
    parse(&text).ok_or_else(|| not_a_line(root.root(), relative))
}

pub(crate) fn read_in(folder: &Folder, relative: &str) -> Result<Stat, ReadError> {
    let text = folder.read_line_lossy(relative)?;
    parse(&text).ok_or_else(|| not_a_line(folder.path(), relative))
}

fn not_a_line(folder: &Path, relative: &str) -> ReadError {
    let source = io::Error::new(io::ErrorKind::InvalidData, "not a stat line");
    ReadError { path: folder.join(relative), source }
}

fn parse(text: &str) -> Option<Stat> {
    // The name is anything, brackets and spaces included: it ends at the last bracket.
    let (open, close) = (text.find('(')?, text.rfind(')')?);
    let comm = text.get(open + 1..close)?.to_owned();
    let mut fields = text.get(close + 1..)?.split_ascii_whitespace();
    // Fields are counted from 1 as in the manual; the first after the name is 3.
    let state = fields.next()?.chars().next()?;
    let flags = fields.nth(9 - 4)?.parse().ok()?;
    let start = StartTicks(fields.nth(22 - 10)?.parse().ok()?);
    let last_cpu = fields.nth(39 - 23).and_then(|field| field.parse().ok());
    Some(Stat { comm, state, flags, start, last_cpu })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_name_is() {
        let fields = (4..=52).map(|field| (field * 10).to_string()).collect::<Vec<_>>().join(" ");
        for comm in ["kvm", "CPU 0/KVM", "a) S 1 (b", ""] {
            let stat = parse(&format!("529 ({comm}) S {fields}\n")).expect("good");
            assert_eq!(stat.comm, comm);
            assert_eq!((stat.state, stat.flags, stat.start.0), ('S', 90, 220));
            assert_eq!(stat.last_cpu, Some(390));
        }
    }

    #[test]
    fn a_line_that_is_none_is_refused() {
        for text in
            ["", "1 (x", "1 (x) S 1 2", ") (", "1 (x) S a b c d e f g h i j k l m n o p q r s t"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn this_thread_reads_itself() {
        let stat = read(&SysRoot::live(), "proc/thread-self/stat").expect("live /proc");
        assert!(!stat.is_dead() && !stat.is_kernel_thread());
    }
}
