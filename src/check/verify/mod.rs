//! Whether what was promised holds, by the kernel's own files. Pure: the facts are read elsewhere.
//!
//! | check | holds when |
//! |---|---|
//! | `vcpus` | every vCPU may run on one CPU of the VM's own, no two on the same; or all float over the set that is named |
//! | `helpers` | no other thread of the VM may run there |
//! | `sched` | every vCPU that has its CPU to itself has the priority, and no other thread has it |
//! | `core-scheduling` | all threads of the VM have one cookie, where others share a core with it |
//! | `partition` | these CPUs are an isolated partition, and it is in force; in the next fallback, units are limited as planned |
//! | `processes` | no other process may run there |
//! | `kthreads` | nor any kernel thread that can be moved; one that was refused is listed separately |
//! | `bound-kthreads` | never quite: what the kernel binds to each CPU is counted |
//! | `irqs` … | nothing of that knob is left to be done |
//! | `irqbalance` | an irqbalance that runs excludes interrupts from there |
//! | `vfio-irqs` | interrupts of the VM's own devices are where the policy wants them |
//!
//! A check is made where the VM's policy asks for what it is about.

pub mod host;
pub mod vm;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::cpuset::CpuSet;
use crate::discover::Occupant;
use crate::discover::cgroup::PartitionFile;
use crate::journal::Memory;
use crate::knobs::core_scheduling::plan::Cookies;
use crate::knobs::host::interrupts::Interrupt;
use crate::knobs::host::places::{Irqbalance, Place, Value};
use crate::leases::Lease;
use crate::policy::Knob;
use crate::scheduling::Scheduling;
use crate::threads::{Thread, ThreadKey};

/// How many are named, of many that break one promise.
const NAMED: usize = 4;

/// What a check has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckVerdict {
    /// It is as promised.
    Holds,
    /// It is not.
    Broken,
    /// The kernel allows no better.
    Refused,
}

/// One promise, and whether it is kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// Which.
    pub check: &'static str,
    /// Whether it is kept.
    pub verdict: CheckVerdict,
    /// How, or why not.
    pub reason: String,
}

/// A place that does not hold what it should.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unmet {
    /// Whose it is.
    pub knob: Knob,
    /// Where.
    pub place: Place,
    /// What is there.
    pub found: Value,
    /// What should be.
    pub wanted: Value,
    /// Why that is so, as far as is known.
    pub cause: UnmetCause,
}

/// Why a place does not hold what it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnmetCause {
    /// It was changed externally, or it is new: a promise that is not kept.
    Changed,
    /// It was tried, and the kernel would not.
    Refused,
    /// irqbalance is configured, and applies it later.
    Pending,
}

/// Where an interrupt of one of the VM's own devices is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VfioSeat {
    /// The place that says so.
    pub place: Place,
    /// The device's PCI address.
    pub device: String,
    /// Where it may go.
    pub on: CpuSet,
}

/// What there is to see of the VM itself.
#[derive(Clone, Debug)]
pub struct VmFacts<'a> {
    /// What the VM was given.
    pub lease: &'a Lease,
    /// Its threads as they are.
    pub threads: &'a [Thread],
    /// How they are scheduled.
    pub scheduling: &'a BTreeMap<ThreadKey, Scheduling>,
    /// Their core-scheduling cookies; none where the kernel has no such thing.
    pub cookies: &'a Cookies,
    /// The CPUs of the VM's cores that others may use.
    pub beside: CpuSet,
    /// How they were before, and what of it was changed.
    pub memory: &'a Memory,
}

/// What there is to see of everybody else.
#[derive(Clone, Debug)]
pub struct HostFacts<'a> {
    /// What the VM was given.
    pub lease: &'a Lease,
    /// The group of the vCPUs; `None`: the VM has no partition.
    pub partition: Option<PartitionFile>,
    /// Others that may run on the VM's CPUs.
    pub occupants: Vec<Occupant>,
    /// What else is not as it should be.
    pub unmet: Vec<Unmet>,
    /// Interrupts of the VM's own devices.
    pub vfio: Vec<VfioSeat>,
    /// Every irqbalance that runs.
    pub irqbalances: Vec<Irqbalance>,
    /// Interrupts by number, with how often they have fired on the VM's CPUs.
    pub interrupts: BTreeMap<u32, Interrupt>,
}

impl HostFacts<'_> {
    fn is_of_own_device(&self, place: &Place) -> bool {
        self.vfio.iter().any(|seat| seat.place == *place)
    }
}

/// The checks of the VM's own threads that its policy gives cause for.
#[must_use]
pub fn vm_checks(facts: &VmFacts<'_>) -> Vec<Check> {
    let mut checks = vec![vm::vcpus(facts), vm::helpers(facts)];
    checks.extend(vm::sched(facts));
    if facts.lease.knobs.contains(&Knob::CoreScheduling) && !facts.beside.is_empty() {
        checks.push(vm::core_scheduling(facts));
    }
    checks
}

/// The checks of everybody else that the VM's policy gives cause for. QEMU is not asked for any of them.
#[must_use]
pub fn host_checks(facts: &HostFacts<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    let asked = |knob: Knob| facts.lease.knobs.contains(&knob);
    if asked(Knob::Partition) {
        checks.push(host::partition(facts));
        checks.push(host::processes(facts));
    }
    if asked(Knob::Kthreads) {
        checks.extend(host::kthreads(facts));
        checks.extend(host::bound(facts));
    }
    for (knob, check) in [
        (Knob::Irqs, "irqs"),
        (Knob::Workqueues, "workqueues"),
        (Knob::Power, "power"),
        (Knob::Noise, "noise"),
    ] {
        if asked(knob) {
            let is_apart = |unmet: &&Unmet| {
                facts.is_of_own_device(&unmet.place) || host::is_irqbalance(&unmet.place)
            };
            let of_knob = facts.unmet.iter().filter(|unmet| unmet.knob == knob && !is_apart(unmet));
            checks.extend(host::places(facts, of_knob, check, "as it should be".to_owned()));
        }
    }
    if asked(Knob::Irqs) && !facts.irqbalances.is_empty() {
        checks.extend(host::irqbalance(facts));
    }
    if asked(Knob::Irqs) && !facts.vfio.is_empty() {
        let own = facts.unmet.iter().filter(|unmet| facts.is_of_own_device(&unmet.place));
        checks.extend(host::places(facts, own, "vfio-irqs", host::seats(facts)));
    }
    checks
}

fn holds(check: &'static str, reason: String) -> Check {
    Check { check, verdict: CheckVerdict::Holds, reason }
}

fn broken(check: &'static str, reason: String) -> Check {
    Check { check, verdict: CheckVerdict::Broken, reason }
}

fn refused(check: &'static str, reason: String) -> Check {
    Check { check, verdict: CheckVerdict::Refused, reason }
}

/// Holds, for the reason `why`, where nothing is wrong.
fn judged(check: &'static str, wrong: impl Iterator<Item = String>, why: String) -> Check {
    let mut wrong = wrong.peekable();
    if wrong.peek().is_none() { holds(check, why) } else { broken(check, some(wrong)) }
}

/// The first few, and how many more there are.
fn some(list: impl Iterator<Item = String>) -> String {
    some_of(list, "; ")
}

fn some_of(list: impl Iterator<Item = String>, separator: &str) -> String {
    let list: Vec<String> = list.collect();
    let shown = list[..list.len().min(NAMED)].join(separator);
    match list.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown}{separator}and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::sync::LazyLock;

    use super::*;
    use crate::discover::OccupantKind;
    use crate::ids::{Pid, StartTicks, Tid, VcpuIndex};
    use crate::journal::Record;
    use crate::knobs::core_scheduling::journal::CookieRecord;
    use crate::knobs::priority::journal::PriorityIntent;
    use crate::policy::{Level, VfioIrqs};
    use crate::scheduling::Cookie;
    use crate::threads::{ProcessKey, Role};

    fn cpus(list: &str) -> CpuSet {
        list.parse().expect("a cpulist")
    }

    fn thread(role: Role, on: &str) -> Thread {
        let key = ThreadKey { tid: Tid(7), start: StartTicks(1) };
        Thread { key, role, comm: String::new(), allowed: cpus(on).into(), last_cpu: None }
    }

    fn occupant(kind: OccupantKind) -> Occupant {
        Occupant { tid: Tid(9), comm: "ksoftirqd/4".to_owned(), kind, allowed: cpus("4") }
    }

    fn lease(level: Level) -> Lease {
        Lease {
            exclusive: cpus("4-5"),
            emulator: cpus("0"),
            iothreads: cpus("0"),
            knobs: level.knobs(),
            ..Lease::new(
                "100".parse().expect("a name"),
                String::new(),
                ProcessKey { pid: Pid(1), start: StartTicks(1) },
            )
        }
    }

    /// A VM without threads.
    fn no_threads(lease: &Lease) -> VmFacts<'_> {
        static SCHEDULING: BTreeMap<ThreadKey, Scheduling> = BTreeMap::new();
        static COOKIES: Cookies = Cookies::new();
        static MEMORY: LazyLock<Memory> = LazyLock::new(Memory::default);
        VmFacts {
            lease,
            threads: &[],
            scheduling: &SCHEDULING,
            cookies: &COOKIES,
            beside: CpuSet::EMPTY,
            memory: &MEMORY,
        }
    }

    /// No other thread is there to see.
    fn no_process(lease: &Lease) -> HostFacts<'_> {
        HostFacts {
            lease,
            partition: None,
            occupants: Vec::new(),
            unmet: Vec::new(),
            vfio: Vec::new(),
            irqbalances: Vec::new(),
            interrupts: BTreeMap::new(),
        }
    }

    fn isolated(state: &str, list: &str) -> PartitionFile {
        let group = "qemu.slice/100.scope/vcpus".to_owned();
        PartitionFile { group, state: state.to_owned(), cpus: cpus(list), lost_drop_in: None }
    }

    fn verdicts(
        threads: &[Thread],
        occupants: &[Occupant],
        unmet: &[Unmet],
        level: Level,
    ) -> BTreeMap<&'static str, CheckVerdict> {
        let lease = lease(level);
        let partition = Some(isolated("isolated", "4-5"));
        let (occupants, unmet) = (occupants.to_vec(), unmet.to_vec());
        let of_vm = vm_checks(&VmFacts { threads, ..no_threads(&lease) });
        let of_host = HostFacts { partition, occupants, unmet, ..no_process(&lease) };
        let all = of_vm.into_iter().chain(host_checks(&of_host));
        all.map(|check| (check.check, check.verdict)).collect()
    }

    fn vcpu(index: u32, on: &str) -> Thread {
        thread(Role::Vcpu(VcpuIndex(index)), on)
    }

    #[test]
    fn each_promise_is_broken_by_what_breaks_it() {
        use CheckVerdict::{Broken, Holds, Refused};
        let good = [vcpu(0, "4"), vcpu(1, "5"), thread(Role::Emulator, "0-3")];
        let all = verdicts(&good, &[], &[], Level::Strict);
        assert!(all.len() >= 8 && all.values().all(|verdict| *verdict == Holds), "{all:?}");
        for wrong in [vcpu(1, "4"), vcpu(1, "0"), vcpu(1, "4-5")] {
            assert_eq!(verdicts(&[vcpu(0, "4"), wrong], &[], &[], Level::Pinned)["vcpus"], Broken);
        }
        let helper = [vcpu(0, "4"), thread(Role::Emulator, "0-5")];
        assert_eq!(verdicts(&helper, &[], &[], Level::Pinned)["helpers"], Broken);
        for (kind, check, verdict) in [
            (OccupantKind::User, "processes", Broken),
            (OccupantKind::Movable, "kthreads", Broken),
            (OccupantKind::Bound, "bound-kthreads", Refused),
        ] {
            let found = verdicts(&good, &[occupant(kind)], &[], Level::Exclusive);
            let other = found.iter().filter(|(_, verdict)| **verdict != Holds).count();
            assert_eq!((found[check], other), (verdict, 1), "{found:?}");
            assert!(!verdicts(&good, &[occupant(kind)], &[], Level::Pinned).contains_key(check));
        }
        let unmet = |cause| Unmet {
            knob: Knob::Irqs,
            place: Place::CpuList("proc/irq/24/smp_affinity_list".to_owned()),
            found: Value::Cpus(cpus("4")),
            wanted: Value::Cpus(cpus("0-3")),
            cause,
        };
        assert_eq!(
            verdicts(&good, &[], &[unmet(UnmetCause::Changed)], Level::Exclusive)["irqs"],
            Broken
        );
        assert_eq!(
            verdicts(&good, &[], &[unmet(UnmetCause::Refused)], Level::Exclusive)["irqs"],
            Refused
        );
    }

    #[test]
    fn refused_kernel_thread_is_listed_separately() {
        use CheckVerdict::{Broken, Refused};
        let lease = lease(Level::Exclusive);
        let other = Occupant { tid: Tid(8), ..occupant(OccupantKind::Movable) };
        let unmet = |cause| Unmet {
            knob: Knob::Kthreads,
            place: Place::Thread(ThreadKey { tid: Tid(9), start: StartTicks(1) }),
            found: Value::Cpus(cpus("4")),
            wanted: Value::Cpus(cpus("0-3")),
            cause,
        };
        let kthreads = |occupants: &[Occupant], cause| {
            let (occupants, unmet) = (occupants.to_vec(), vec![unmet(cause)]);
            let checks = host_checks(&HostFacts { occupants, unmet, ..no_process(&lease) });
            let checks = checks.into_iter().filter(|check| check.check == "kthreads");
            checks.map(|check| (check.verdict, check.reason)).collect::<Vec<_>>()
        };
        let one = occupant(OccupantKind::Movable);
        let refused = (Refused, "the kernel would not move ksoftirqd/4 (9) on 4".to_owned());
        let broken = |tid: i32| (Broken, format!("ksoftirqd/4 ({tid}) on 4"));
        let alone = std::slice::from_ref(&one);
        assert_eq!(kthreads(alone, UnmetCause::Refused), std::slice::from_ref(&refused));
        assert_eq!(kthreads(alone, UnmetCause::Changed), [broken(9)]);
        assert_eq!(kthreads(&[one, other], UnmetCause::Refused), [broken(8), refused]);
    }

    #[test]
    fn only_vcpus_have_the_priority() {
        let mut lease = lease(Level::Pinned);
        lease.sched = "fifo:1".to_owned().try_into().expect("a policy");
        let (fifo, other) = (lease.sched.wanted().expect("a priority"), Scheduling::OTHER);
        let key = |tid| ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        let intent = PriorityIntent { thread: key(1), from: other, to: fifo };
        let memory = Memory::of(&[Record::Priority(intent)]);
        let threads = [
            Thread { key: key(1), ..vcpu(0, "4") },
            Thread { key: key(2), ..thread(Role::Worker, "0") },
        ];
        let verdict = |of_vcpu, of_worker| {
            let facts = VmFacts {
                threads: &threads,
                scheduling: &BTreeMap::from([(key(1), of_vcpu), (key(2), of_worker)]),
                memory: &memory,
                ..no_threads(&lease)
            };
            vm::sched(&facts).map(|check| check.verdict)
        };
        assert_eq!(verdict(fifo, other), Some(CheckVerdict::Holds));
        assert_eq!(verdict(other, other), Some(CheckVerdict::Broken));
        assert_eq!(verdict(fifo, fifo), Some(CheckVerdict::Broken));
    }

    #[test]
    fn a_cookie_is_all_the_vms_threads_and_ours() {
        let lease = lease(Level::Strict);
        let key = |tid| ThreadKey { tid: Tid(tid), start: StartTicks(1) };
        let cookie = |number| NonZeroU64::new(number).map(Cookie);
        let verdict = |list: &[u64], records: &[Record]| {
            let cookies = (1..).map(key).zip(list.iter().map(|one| cookie(*one))).collect();
            let facts = VmFacts {
                cookies: &cookies,
                beside: cpus("6"),
                memory: &Memory::of(records),
                ..no_threads(&lease)
            };
            vm::core_scheduling(&facts).verdict
        };
        let made = cookie(7).map(|made| Record::Cookie(CookieRecord::Made(made)));
        let made = made.as_slice();
        assert_eq!(verdict(&[7, 7], made), CheckVerdict::Holds);
        assert_eq!(verdict(&[0, 0], &[]), CheckVerdict::Refused);
        for wrong in [[7, 0], [0, 0], [7, 8], [8, 8]] {
            assert_eq!(verdict(&wrong, made), CheckVerdict::Broken, "{wrong:?}");
        }
    }

    #[test]
    fn irqbalance_and_the_vms_own_devices_are_checked_apart() {
        use CheckVerdict::{Broken, Holds, Refused};
        let lease = Lease { vfio_irqs: VfioIrqs::Vcpus, ..lease(Level::Exclusive) };
        let process = ProcessKey { pid: Pid(812), start: StartTicks(1) };
        let seat = |irq: u32, on: &str| VfioSeat {
            place: Place::CpuList(format!("proc/irq/{irq}/smp_affinity_list")),
            device: "0000:0a:00.0".to_owned(),
            on: cpus(on),
        };
        let seats = [seat(40, "4-5"), seat(41, "4-5")];
        let check = |unmet: &[Unmet], banned: Result<CpuSet, String>| {
            let irqbalances = vec![Irqbalance { process, banned }];
            let (unmet, vfio) = (unmet.to_vec(), seats.to_vec());
            let facts = HostFacts { unmet, vfio, irqbalances, ..no_process(&lease) };
            let checks = host_checks(&facts).into_iter().map(|check| (check.check, check));
            let mut checks: BTreeMap<_, Check> = checks.collect();
            ["irqs", "irqbalance", "vfio-irqs"].map(|name| {
                let check = checks.remove(name).expect("it is made");
                (check.verdict, check.reason)
            })
        };
        let [irqs, irqbalance, vfio] = check(&[], Ok(cpus("4-5")));
        assert_eq!(irqs.0, Holds);
        assert_eq!(irqbalance, (Holds, "it keeps interrupts off CPUs 4-5".to_owned()));
        let on = "vfio_irqs = \"vcpus\": 0000:0a:00.0 on CPUs 4-5 (40, 41)";
        assert_eq!(vfio, (Holds, on.to_owned()));
        let unmet = |place, found, wanted, cause| Unmet {
            knob: Knob::Irqs,
            place,
            found: Value::Cpus(cpus(found)),
            wanted: Value::Cpus(cpus(wanted)),
            cause,
        };
        let astray = unmet(seats[0].place.clone(), "0", "4-5", UnmetCause::Changed);
        let pending = unmet(Place::Irqbalance(process), "", "4-5", UnmetCause::Pending);
        let [irqs, irqbalance, vfio] = check(&[astray, pending], Ok(CpuSet::EMPTY));
        assert_eq!((irqs.0, irqbalance.0, vfio.0), (Holds, Refused, Broken));
        assert!(irqbalance.1.contains("is none and not 4-5; it is configured"), "{}", irqbalance.1);
        let [_, irqbalance, _] = check(&[], Err("it does not answer".to_owned()));
        let silent = "process 812 cannot be configured: it does not answer";
        assert_eq!(irqbalance, (Refused, silent.to_owned()));
    }

    #[test]
    fn a_partition_is_there_in_force_and_of_these_cpus() {
        let lease = lease(Level::Exclusive);
        let verdict = |partition: Option<PartitionFile>| {
            host::partition(&HostFacts { partition, ..no_process(&lease) }).verdict
        };
        assert_eq!(verdict(None), CheckVerdict::Refused);
        assert_eq!(verdict(Some(isolated("isolated", "4-5"))), CheckVerdict::Holds);
        assert_eq!(verdict(Some(isolated("isolated invalid (…)", "4-5"))), CheckVerdict::Broken);
        assert_eq!(verdict(Some(isolated("isolated", "4"))), CheckVerdict::Broken);
    }
}
