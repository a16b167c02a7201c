//! The last-level caches: of the data and unified caches that a CPU describes, the highest level.
//!
//! That is the L3 of a CCX or a socket, the L2 of an Arm cluster without L3, and where only private
//! caches are described a group for each core. All indexes of the first CPU are looked at. Each other
//! group is expected to have its LLC at the same index and nothing above it, which two opens show;
//! where that fails, as for the cores without L3 of some hybrid parts, all its indexes are looked at.

use super::attribute::{Notes, Why};
use super::groups::{Witness, split};
use super::{CPU, attribute};
use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::sysroot::SysRoot;

/// More cache indexes than any machine has; s390 with its split L2 has the most, six.
const INDEXES_MAX: u32 = 16;

/// The LLC groups in the order of their first CPUs, with their sizes in bytes.
pub(super) fn read_llcs(
    root: &SysRoot,
    online: &CpuSet,
    notes: &mut Notes,
) -> Vec<(CpuSet, Option<u64>)> {
    let mut witness = CacheWitness { root, llc: None, asked: Vec::new() };
    let groups = split("the LLC", online, &mut witness, notes);
    groups.into_iter().map(|group| (group, witness.size_bytes(&group, notes))).collect()
}

struct CacheWitness<'a> {
    root: &'a SysRoot,
    /// The index at which the CPU asked last has its LLC.
    llc: Option<u32>,
    /// Who was asked, and the index of their LLC.
    asked: Vec<(CpuId, u32)>,
}

impl Witness for CacheWitness<'_> {
    fn ask(&mut self, cpu: CpuId) -> Result<CpuSet, Why> {
        let index = match self.llc {
            Some(index) if self.is_last(cpu, index) => index,
            _ => self.find_llc(cpu)?,
        };
        self.llc = Some(index);
        self.asked.push((cpu, index));
        self.shared(cpu, index)
    }

    fn ask_another(&mut self, cpu: CpuId) -> Result<CpuSet, Why> {
        match self.llc {
            Some(index) => self.shared(cpu, index),
            None => self.ask(cpu),
        }
    }
}

impl CacheWitness<'_> {
    fn shared(&self, cpu: CpuId, index: u32) -> Result<CpuSet, Why> {
        attribute::cpulist(self.root, &path(cpu, index, "shared_cpu_list"))
    }

    fn is_last(&self, cpu: CpuId, index: u32) -> bool {
        matches!(self.holds_data(cpu, index), Ok(true))
            && self.holds_data(cpu, index + 1).is_err_and(|why| why.absent)
    }

    fn holds_data(&self, cpu: CpuId, index: u32) -> Result<bool, Why> {
        attribute::parsed(self.root, &path(cpu, index, "type"), |text| match text {
            "Unified" | "Data" => Some(true),
            "Instruction" => Some(false),
            _ => None,
        })
    }

    fn find_llc(&self, cpu: CpuId) -> Result<u32, Why> {
        let mut levels: Vec<(u32, u32)> = Vec::new();
        for index in 0..INDEXES_MAX {
            let level = attribute::parsed(self.root, &path(cpu, index, "level"), |text| {
                text.parse::<u32>().ok().filter(|level| *level > 0)
            });
            match level {
                Ok(level) => levels.push((level, index)),
                Err(why) if why.absent && index > 0 => break,
                Err(why) => return Err(why),
            }
        }
        levels.sort_unstable_by_key(|(level, index)| (std::cmp::Reverse(*level), *index));
        for (_, index) in levels {
            if self.holds_data(cpu, index)? {
                return Ok(index);
            }
        }
        Err(Why::new(format!("CPU {cpu} describes instruction caches alone")))
    }

    fn size_bytes(&self, group: &CpuSet, notes: &mut Notes) -> Option<u64> {
        let (cpu, index) = self.asked.iter().find(|(cpu, _)| group.contains(*cpu))?;
        let size = attribute::parsed(self.root, &path(*cpu, *index, "size"), parse_size_bytes);
        size.map_err(|why| notes.add_cpus("the LLC size", group, why)).ok()
    }
}

fn path(cpu: CpuId, index: u32, name: &str) -> String {
    format!("{CPU}/cpu{cpu}/cache/index{index}/{name}")
}

/// `32768K`; the kernel writes no other unit (`size_show` in `drivers/base/cacheinfo.c`), and a zero
/// where the firmware does not say.
fn parse_size_bytes(text: &str) -> Option<u64> {
    let kib: u64 = text.strip_suffix('K')?.parse().ok()?;
    kib.checked_mul(1024).filter(|bytes| *bytes > 0)
}
