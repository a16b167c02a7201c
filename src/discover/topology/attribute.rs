//! One attribute, one value: or the reason why not.

use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::shown;
use crate::sysroot::{ReadError, SysRoot};
use crate::topology::Unknown;

/// How much of a text that makes no sense is repeated in the reason, in characters.
const SHOWN_CHARS_MAX: usize = 40;

/// Why something is not known.
#[derive(Clone, Debug)]
pub(super) struct Why {
    /// The kernel has no such file, and so nothing to say.
    pub(super) absent: bool,
    reason: String,
}

impl Why {
    pub(super) fn new(reason: String) -> Why {
        Why { absent: false, reason }
    }
}

impl From<ReadError> for Why {
    fn from(error: ReadError) -> Why {
        Why { absent: error.is_absent(), reason: format!("{error}: {}", error.source) }
    }
}

/// The text of an attribute, without the white space around it. Some kernels and captures have NULs there.
pub(super) fn text(root: &SysRoot, relative: &str) -> Result<String, Why> {
    let mut text = root.read_attribute(relative)?;
    text.truncate(text.trim_end_matches(is_blank).len());
    Ok(text)
}

fn is_blank(char: char) -> bool {
    char.is_whitespace() || char == '\0'
}

/// What an attribute that was read says, as `parse` understands it.
pub(super) fn parsed<T>(
    root: &SysRoot,
    relative: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, Why> {
    let text = text(root, relative)?;
    parse(&text).ok_or_else(|| says(root, relative, &text, "which makes no sense there"))
}

/// A cpulist; where there is none, the mask beside it, which says the same.
pub(super) fn cpulist(root: &SysRoot, relative: &str) -> Result<CpuSet, Why> {
    let text = match text(root, relative) {
        Err(why) if why.absent => {
            let mask = mask_beside(relative).map(|mask| parsed(root, &mask, CpuSet::parse_cpumask));
            return match mask {
                Some(Err(other)) if !other.absent => Err(other),
                Some(Ok(cpus)) => Ok(cpus),
                _ => Err(why),
            };
        }
        text => text?,
    };
    CpuSet::parse_cpulist(&text).map_err(|error| says(root, relative, &text, &error.to_string()))
}

/// The file with the same as a mask (`Documentation/admin-guide/cputopology.rst`, `drivers/base/{node,cacheinfo}.c`).
fn mask_beside(list: &str) -> Option<String> {
    for (of_list, of_mask) in [("cpulist", "cpumap"), ("shared_cpu_list", "shared_cpu_map")] {
        if let Some(stem) = list.strip_suffix(of_list) {
            return Some(format!("{stem}{of_mask}"));
        }
    }
    list.strip_suffix("_list").map(str::to_owned)
}

/// An id of the kernel's, which writes -1 where it does not know (`include/linux/topology.h`).
pub(super) fn id(root: &SysRoot, relative: &str) -> Result<u32, Why> {
    let text = text(root, relative)?;
    text.parse().map_err(|_| {
        let wrong = if text == "-1" { "the kernel does not know" } else { "not an id" };
        says(root, relative, &text, wrong)
    })
}

/// The reason that names a file, what it says, and what is wrong with that.
pub(super) fn says(root: &SysRoot, relative: &str, text: &str, wrong: &str) -> Why {
    let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let path = root.root().join(relative);
    Why::new(format!("{} says `{}`: {wrong}", path.display(), shown::line(&shown)))
}

/// What is not known, with one line for all CPUs that lack the same file.
#[derive(Default)]
pub(super) struct Notes {
    notes: Vec<Note>,
}

enum Note {
    Plain { what: String, why: Why },
    Cpus { subject: &'static str, cpus: CpuSet, why: Why },
}

impl Notes {
    pub(super) fn add(&mut self, what: String, why: Why) {
        self.notes.push(Note::Plain { what, why });
    }

    /// The value that was read; where there is none, a note of `what`.
    pub(super) fn value_of<T>(
        &mut self,
        what: impl FnOnce() -> String,
        read: Result<T, Why>,
    ) -> Option<T> {
        read.map_err(|why| self.add(what(), why)).ok()
    }

    /// Notes that `subject`, such as `the LLC`, is not known of these CPUs.
    pub(super) fn add_cpus(&mut self, subject: &'static str, cpus: &CpuSet, why: Why) {
        if why.absent {
            for note in &mut self.notes {
                if let Note::Cpus { subject: of, cpus: known, why: first } = note
                    && *of == subject
                    && first.absent
                {
                    *known |= *cpus;
                    return;
                }
            }
        }
        self.notes.push(Note::Cpus { subject, cpus: *cpus, why });
    }

    pub(super) fn add_cpu(&mut self, subject: &'static str, cpu: CpuId, why: Why) {
        self.add_cpus(subject, &CpuSet::single(cpu), why);
    }

    pub(super) fn append(&mut self, mut other: Notes) {
        self.notes.append(&mut other.notes);
    }

    pub(super) fn into_unknown(self) -> Vec<Unknown> {
        let unknown = |note| match note {
            Note::Plain { what, why } => Unknown { what, reason: why.reason },
            Note::Cpus { subject, cpus, why } => {
                let s = if cpus.len() == 1 { "" } else { "s" };
                Unknown { what: format!("{subject} of CPU{s} {cpus}"), reason: why.reason }
            }
        };
        self.notes.into_iter().map(unknown).collect()
    }
}
