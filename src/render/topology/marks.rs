//! One character per CPU that shows, without colour, whose it is.

use crate::ids::{CpuId, VmName};
use crate::render::paint::{Line, Paint};

use super::Picture;

/// The mark of a CPU that anyone on the host may use.
pub(super) const FREE: char = '·';
/// The mark of a CPU that never goes to a VM.
pub(super) const RESERVED: char = '#';
/// The mark of a CPU where threads of all VMs may meet.
pub(super) const SHARED: char = '+';
/// The mark of a CPU that another program has to itself.
pub(super) const HARD: char = '!';
/// The mark of a CPU that another program counts on.
pub(super) const SOFT: char = '~';
/// The mark of a free CPU that was isolated on the kernel command line.
pub(super) const ISOLATED: char = ':';
/// The mark of all VMs that come after the letters.
pub(super) const OTHERS: char = '*';

/// Who has each CPU, as a mark and a paint.
pub(super) struct Marks<'a> {
    picture: Picture<'a>,
    /// How many digits the largest CPU number has.
    pub(super) digits: usize,
}

impl<'a> Marks<'a> {
    pub(super) fn new(picture: &Picture<'a>) -> Marks<'a> {
        let largest = picture.topology.cpus.last().map_or(0, |cpu| cpu.id.index());
        Marks { picture: *picture, digits: largest.to_string().len() }
    }

    /// An owner goes before what the host would like, so that a conflict shows.
    pub(super) fn of(&self, cpu: CpuId) -> (char, Paint) {
        let picture = &self.picture;
        if let Some(vm) = picture.owners.iter().position(|(_, cpus)| cpus.contains(cpu)) {
            (letter(vm), Paint::Vm(vm))
        } else if picture.reserved.contains(cpu) {
            (RESERVED, Paint::Host)
        } else if picture.shared.contains(cpu) {
            (SHARED, Paint::Shared)
        } else if picture.promises.hard().contains(cpu) {
            (HARD, Paint::Host)
        } else if picture.promises.soft().any(|promise| promise.cpus.contains(cpu)) {
            (SOFT, Paint::Shared)
        } else if picture.promises.isolated.contains(cpu) {
            (ISOLATED, Paint::Plain)
        } else {
            (FREE, Paint::Plain)
        }
    }

    /// The VM that has the CPU for itself.
    pub(super) fn owner(&self, cpu: CpuId) -> Option<&'a VmName> {
        self.picture.owners.of(cpu)
    }

    /// A CPU's number and mark, such as `12 A`; no CPU, and so blanks, in a cell with fewer threads.
    pub(super) fn cell(
        &self,
        cpu: Option<CpuId>,
        before: &str,
        between: &str,
        after: &str,
    ) -> Line {
        let digits = self.digits;
        match cpu {
            Some(cpu) => {
                let (mark, paint) = self.of(cpu);
                let number = cpu.index();
                Line::painted(paint, format!("{before}{number:>digits$}{between}{mark}{after}"))
            }
            None => Line::plain(format!("{before}{:>digits$}{between} {after}", "")),
        }
    }
}

/// A to Z, then a to z, then one mark for all the rest.
pub(super) fn letter(vm: usize) -> char {
    ('A'..='Z').chain('a'..='z').nth(vm).unwrap_or(OTHERS)
}
