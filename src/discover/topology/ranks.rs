//! Which cores the processor itself prefers: those that reach the highest frequency
//! (`Documentation/admin-guide/pm/amd-pstate.rst`, "Preferred Core"; ACPI's CPPC). The numbers may change while the
//! machine runs.

use super::{CPU, PerCpu, attribute};
use crate::cpuset::CpuSet;
use crate::sysroot::SysRoot;

/// Where it is said; the first that there is counts.
const SOURCES: [&str; 2] = ["cpufreq/amd_pstate_prefcore_ranking", "acpi_cppc/highest_perf"];

/// The rank of each core, a larger one for a better core; none where the kernel does not say. What of a single core
/// cannot be read is left out: it is no worse than the best.
pub(super) fn read_ranks(root: &SysRoot, cores: &[CpuSet]) -> PerCpu<u32> {
    let mut ranks = PerCpu::none();
    let rank = |core: &CpuSet, source: &str| {
        let first = core.first()?;
        attribute::id(root, &format!("{CPU}/cpu{first}/{source}")).ok()
    };
    let source = SOURCES.into_iter().find(|source| {
        cores.first().is_some_and(|core| rank(core, source).is_some_and(|rank| rank > 0))
    });
    if let Some(source) = source.filter(|_| cores.len() > 1) {
        for core in cores {
            ranks.set(core, rank(core, source));
        }
    }
    ranks
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ids::CpuId;

    fn ranks(files: &[(&str, &str)]) -> Vec<Option<u32>> {
        let dir = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = dir.path().join(CPU).join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        let cores: Vec<CpuSet> = ["0,2", "1,3"].map(|core| core.parse().expect("cpus")).to_vec();
        let found = read_ranks(&SysRoot::at(dir.path()), &cores);
        (0..4).filter_map(CpuId::from_index).map(|cpu| found.get(cpu)).collect()
    }

    #[test]
    fn the_kernels_ranking_goes_before_the_firmwares() {
        let firmware =
            [("cpu0/acpi_cppc/highest_perf", "166\n"), ("cpu1/acpi_cppc/highest_perf", "161\n")];
        assert_eq!(ranks(&firmware), [Some(166), Some(161), Some(166), Some(161)]);
        let kernel = ("cpu0/cpufreq/amd_pstate_prefcore_ranking", "231\n");
        assert_eq!(ranks(&[firmware[0], firmware[1], kernel]), [Some(231), None, Some(231), None]);
        assert_eq!(ranks(&[]), [None; 4]);
        assert_eq!(ranks(&[("cpu0/acpi_cppc/highest_perf", "0\n")]), [None; 4]);
        assert_eq!(ranks(&[("cpu0/acpi_cppc/highest_perf", "fast\n")]), [None; 4]);
    }
}
