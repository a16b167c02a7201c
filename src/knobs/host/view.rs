//! Reads the places of the host that knobs change: interrupts, kernel threads, workqueues, power,
//! kernel settings. What is not there is left out.

use std::io;

use crate::cgroups::CgroupTree;
use crate::cpuset::CpuSet;
use crate::discover::host::online_cpus;
use crate::discover::stat::Stat;
use crate::discover::{DiscoverError, stat, tasks};
use crate::ids::{CpuId, KTHREADD};
use crate::knobs::ground::Host;
use crate::knobs::host::interrupts::{irq_nodes, irq_places};
use crate::knobs::host::kernel_threads::KthreadScan;
use crate::knobs::host::memory::HostMemory;
use crate::knobs::host::places::{CpuPower, DROP_IN_THERE, HostView, IdleState, Place, Value};
use crate::knobs::host::slices::beside;
use crate::knobs::host::vfio::read::vfio_irqs;
use crate::knobs::host::{Wants, kernel_threads, noise};
use crate::knobs::partition::drop_ins::is_our_drop_in;
use crate::policy::Knob;
use crate::sched::{Sched, is_gone};
use crate::sysroot::SysRoot;
use crate::threads::ThreadKey;

const CPU: &str = "sys/devices/system/cpu";
/// The kernel has 10 (`CPUIDLE_STATE_MAX`).
const IDLE_STATES_MAX: usize = 16;

/// Reads the places of the knobs that are wanted, and those that are remembered. `scan` is for kernel threads that
/// are not: one that is remembered is found by its number.
///
/// # Errors
/// [`DiscoverError`] where not even the online CPUs can be read.
pub fn read_host_view(
    host: Host<'_>,
    wants: &Wants,
    memory: &HostMemory,
    scan: KthreadScan,
) -> Result<HostView, DiscoverError> {
    let Host { root, sched, .. } = host;
    let view = HostView { online: online_cpus(root)?, ..HostView::default() };
    let mut reader = Reader { root, sched, view };
    // After the last VM they are looked at once more, too.
    if wants.has(Knob::Irqs) || memory.has_new_irqs() {
        reader.irqs(wants);
    }
    // After the last VM they are looked at once more: one may have been created behind the exclusion mask.
    if wants.has(Knob::Kthreads) || wants.has(Knob::Partition) || memory.has_excluded() {
        reader.kernel_threads(wants, scan);
    }
    if wants.has(Knob::Workqueues) {
        let place = Place::CpuMask("sys/devices/virtual/workqueue/cpumask".to_owned());
        reader.view.workqueues = reader.take(place);
    }
    for cgroup in wants.slices.keys() {
        reader.units(cgroup, wants);
    }
    for cpu in wants.cpus(Knob::Power).iter() {
        reader.power(cpu);
    }
    if wants.has(Knob::Noise) {
        reader.view.sysctls = reader.take_all(noise::places());
    }
    for (place, _) in memory.originals() {
        if reader.view.values.contains_key(place) {
            continue;
        }
        let kernels = reader.stat_of(place).filter(Stat::is_kernel_thread);
        // Attached since, the VM has it: it is forgotten here, and not taken for another VM's that has ended.
        if kernels.as_ref().is_some_and(|stat| serves_attached(&stat.comm, wants)) {
            continue;
        }
        if let Some(place) = reader.take(place.clone())
            && matches!(place, Place::Thread(_))
        {
            // Without this, what a scan has left out would look as if no VM wanted it elsewhere any more.
            if kernels.is_some_and(|stat| !stat.is_bound()) {
                reader.view.kthreads.push(place);
            } else {
                reader.view.users.push(place);
            }
        }
    }
    Ok(reader.view)
}

/// What a place holds now; `None`: it is gone.
///
/// # Errors
/// What the kernel said, or `InvalidData` where what is there makes no sense: it is not gone then. The governor
/// of an offline CPU answers `EBUSY` (`drivers/cpufreq/cpufreq.c: show`), and is as it was when the CPU comes back.
pub fn read_place(root: &SysRoot, sched: &dyn Sched, place: &Place) -> io::Result<Option<Value>> {
    let text = |path: &str| match root.read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error.source),
    };
    let cpus = |path: &str, parse: &dyn Fn(&str) -> Option<CpuSet>| {
        let Some(text) = text(path)? else { return Ok(None) };
        let strange =
            || io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} are no CPUs"));
        parse(&text).map(|cpus| Some(Value::Cpus(cpus))).ok_or_else(strange)
    };
    match place {
        Place::CpuList(path) => cpus(path, &|text| CpuSet::parse_cpulist(text).ok()),
        Place::CpuMask(path) => cpus(path, &CpuSet::parse_cpumask),
        Place::Word(path) => Ok(text(path)?.map(|text| Value::Word(text.trim().to_owned()))),
        Place::AllowedCpus { cgroup, .. } | Place::Cpuset(cgroup) => {
            let online = online_cpus(root).map_err(io::Error::other)?;
            Ok(beside::limit(&CgroupTree::of(root), cgroup, &online)?.map(Value::Cpus))
        }
        Place::Thread(key) => {
            if !tasks::is_thread(root, *key).map_err(|error| error.source)? {
                return Ok(None);
            }
            match sched.affinity(key.tid) {
                Ok(cpus) => Ok(Some(Value::Cpus(cpus))),
                Err(error) if is_gone(&error) => Ok(None),
                Err(error) => Err(error),
            }
        }
        Place::DropIn(path) => Ok(Some(Value::Word(match text(path)? {
            Some(text) if is_our_drop_in(&text) => DROP_IN_THERE.to_owned(),
            Some(_) => "changed".to_owned(),
            None => String::new(),
        }))),
        // One that does not answer is not gone: `irqbalances` distinguishes the two.
        Place::Irqbalance(_) => Ok(None),
    }
}

struct Reader<'a> {
    root: &'a SysRoot,
    sched: &'a dyn Sched,
    view: HostView,
}

impl Reader<'_> {
    /// Reads a place; `None`: there is nothing to be read.
    fn take(&mut self, place: Place) -> Option<Place> {
        match read_place(self.root, self.sched, &place) {
            Ok(value) => {
                self.view.values.insert(place.clone(), value?);
                Some(place)
            }
            Err(error) => {
                self.view.unreadable.insert(place, error.to_string());
                None
            }
        }
    }

    /// Reads places, and leaves out those of which there is nothing to be read.
    fn take_all(&mut self, places: impl IntoIterator<Item = Place>) -> Vec<Place> {
        places.into_iter().filter_map(|place| self.take(place)).collect()
    }

    fn irqs(&mut self, wants: &Wants) {
        self.view.irqs = self.take_all(irq_places(self.root));
        self.view.irq_nodes = irq_nodes(self.root, &self.view.irqs);
        for vm in wants.vfio.keys() {
            self.view.vfio.extend(vfio_irqs(self.root, *vm));
        }
    }

    fn stat_of(&self, place: &Place) -> Option<Stat> {
        let Place::Thread(key) = place else { return None };
        stat::of(self.root, key.tid).ok()
    }

    fn kernel_threads(&mut self, wants: &Wants, scan: KthreadScan) {
        for tid in
            std::iter::once(KTHREADD).chain(kernel_threads::all_kernel_threads(self.root, scan))
        {
            let Ok(stat) = stat::of(self.root, tid) else { continue };
            // Those of an attached VM go with the VM.
            if !stat.is_kernel_thread() || serves_attached(&stat.comm, wants) {
                continue;
            }
            let Ok(allowed) = self.sched.affinity(tid) else { continue };
            if stat.is_bound() {
                self.view.bound.push((stat.comm, allowed));
            } else {
                let place = Place::Thread(ThreadKey { tid, start: stat.start });
                self.view.kthreads.push(place.clone());
                self.view.values.insert(place, Value::Cpus(allowed));
            }
        }
    }

    /// The units beside a VM; those that have a partition in them are not for others to limit.
    fn units(&mut self, cgroup: &str, wants: &Wants) {
        for place in beside::groups_beside(&CgroupTree::of(self.root), cgroup) {
            let Some(cgroup) = place.limited_cgroup() else { continue };
            if !wants.partitions.contains(cgroup) && !self.view.units.contains(&place) {
                let place = self.take(place);
                self.view.units.extend(place);
            }
        }
    }

    fn power(&mut self, cpu: CpuId) {
        let of_cpu = format!("{CPU}/cpu{cpu}");
        let mut power = CpuPower::default();
        let governors = format!("{of_cpu}/cpufreq/scaling_available_governors");
        let governors = self.root.read(&governors).unwrap_or_default();
        if governors.split_ascii_whitespace().any(|governor| governor == "performance") {
            power.governor = self.take(Place::Word(format!("{of_cpu}/cpufreq/scaling_governor")));
            let preference = format!("{of_cpu}/cpufreq/energy_performance_preference");
            power.preference = self.take(Place::Word(preference));
        }
        power.idle_states = self.idle_states(&of_cpu);
        if !power.idle_states.is_empty() {
            let place = Place::Word(format!("{of_cpu}/power/pm_qos_resume_latency_us"));
            power.resume_latency = self.take(place);
        }
        self.view.power.insert(cpu, power);
    }

    /// The idle states of a CPU (`Documentation/admin-guide/pm/cpuidle.rst`); those that cannot be read are left out.
    fn idle_states(&self, of_cpu: &str) -> Vec<IdleState> {
        let folder = format!("{of_cpu}/cpuidle");
        let names = self.root.folder(&folder).and_then(|folder| folder.names());
        let state = |state: String| {
            let text = |file: &str| self.root.read(&format!("{folder}/{state}/{file}")).ok();
            Some(IdleState {
                name: text("name")?.trim().to_owned(),
                latency_us: text("latency")?.trim().parse().ok()?,
                is_disabled: text("disable").is_some_and(|text| text.trim() != "0"),
            })
        };
        let names = names.unwrap_or_default().into_iter().take(IDLE_STATES_MAX);
        names.filter_map(state).collect()
    }
}

/// Whether a kernel thread of this name works for a VM that is attached.
fn serves_attached(comm: &str, wants: &Wants) -> bool {
    kernel_threads::serves(comm).is_some_and(|(_, process)| wants.processes.contains(&process))
}
