//! `guest-caches`: whether the guest groups its vCPUs by the caches that they are behind on the host. Its scheduler
//! moves threads freely below a cache, and wakes others by interrupts beyond it.
//!
//! ```text
//!   QEMU shows an L3 for each die          -smp dies=, since 4.1; target/i386/cpu.c: legacy_l3_cache
//!   smp-cache l3 topology=socket           one for each socket; a property of x86 machines since 10.0
//!   l3-cache=off                           none; a CPU property, on since 2.8
//!   host-cache-info=on                     the host's sizes and sharing, of the CPU types host and max
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::advice::{Advice, costs, fine, info, unknown};
use super::args_line::{self, QemuOption, WhenThere};
use super::cpu_type;
use super::facts::VmFacts;
use super::qemu::{Qemu, Version};
use super::smp::{self, Seats, Shape};
use crate::ids::LlcId;
use crate::topology::Topology;
use crate::wording::{counted, listed};

const CHECK: &str = "guest-caches";
/// How many caches are named in a sentence.
const CACHES_MAX: usize = 6;
/// The first version whose x86 machines have `smp-cache`.
const SMP_CACHE: Version = Version { major: 10, minor: 0 };
/// What is taken out of a line that hides the L3.
pub(super) const L3_OFF: &str = "l3-cache=off";
/// What QEMU shows a guest with the CPU type `host` (target/i386/cpu.c: `legacy_l3_cache`).
const SHOWN_L3_MIB: u64 = 16;

/// What `guest-caches` has come to.
pub(super) struct Caches {
    pub(super) advice: Advice,
    /// What fixes it.
    pub(super) fix: Fix,
    /// How the host's sizes can be shown.
    pub(super) sizes: Option<Advice>,
}

/// What makes the guest see the caches as they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fix {
    /// There is nothing to do, or nothing that does it.
    Nothing,
    /// It counts its vCPUs in another way.
    Shape(Shape),
    /// An option beside `-smp`.
    Option(QemuOption),
    /// [`L3_OFF`] is taken out of its line `args:`.
    ShowL3,
}

impl Caches {
    fn only(advice: Advice) -> Caches {
        Caches { advice, fix: Fix::Nothing, sizes: None }
    }

    fn fixed(reason: String, fix: Fix) -> Caches {
        Caches { advice: costs(CHECK, reason, None), fix, sizes: None }
    }
}

/// Judges a guest of which each core is where it fits, with the QEMU that its next start gets.
pub(super) fn caches(
    topology: &Topology,
    vm: &VmFacts<'_>,
    fits: Option<&(Shape, Seats)>,
    qemu: Qemu,
) -> Caches {
    if !qemu.is_x86 {
        return Caches::only(unknown(
            CHECK,
            "not checked: it is not known that this is an x86 host",
        ));
    }
    let Some((shape, seats)) = fits else {
        return Caches::only(unknown(CHECK, "not checked: where its vCPUs belong is not known"));
    };
    let llcs: Option<Vec<LlcId>> =
        seats.iter().map(|cpu| topology.cpu(*cpu).and_then(|cpu| cpu.llc)).collect();
    let Some(llcs) = llcs else {
        return Caches::only(unknown(CHECK, "the kernel does not report which CPUs share a cache"));
    };
    let args = vm.read_config().and_then(|config| config.args.as_deref()).unwrap_or_default();
    let all = llcs.iter().collect::<BTreeSet<_>>().len();
    let is_passed_on = args_line::has_setting(args, "host-cache-info=on");
    if is_passed_on {
        let is_simple = all == 1 && shape.sockets * shape.dies == 1;
        return Caches::only(if is_simple {
            fine(CHECK, "its vCPUs are behind one cache, and host-cache-info=on shows the host's")
        } else {
            let reason = "not checked: host-cache-info=on groups its vCPUs by the host's numbers, which hold where a \
                          die of the guest takes as many as a cache of the host";
            unknown(CHECK, reason)
        });
    }
    if args_line::has_setting(args, L3_OFF) {
        let reason = "l3-cache=off hides the L3: the guest wakes its threads on other vCPUs by interrupts, each an \
                      exit (7 times as many in SAP HANA's tests, QEMU commit 14c985cf)";
        return Caches::fixed(reason.to_owned(), Fix::ShowL3);
    }
    let in_l3 = match (args_line::has_prefix(args, "smp-cache."), is_l3_of_socket(args)) {
        (true, false) => {
            let reason = "not checked: its line args: has caches of its own (smp-cache)";
            return Caches::only(unknown(CHECK, reason));
        }
        (true, true) => shape.in_die() * shape.dies as usize,
        (false, _) => shape.in_die(),
    };
    let behind: Vec<BTreeSet<LlcId>> =
        llcs.chunks(in_l3).map(|llcs| llcs.iter().copied().collect()).collect();
    if behind.iter().any(|caches| caches.len() > 1) {
        return spread(topology, vm, *shape, &llcs, behind.len());
    }
    if behind.len() > all {
        return split(vm, *shape, behind.len(), all, qemu.version);
    }
    let reason = match all {
        1 => "its vCPUs are behind one cache, and the guest sees one".to_owned(),
        _ => format!("its vCPUs are behind {all} caches, and the guest sees which is behind which"),
    };
    let sizes = size(topology, vm, *shape, seats, &llcs, args);
    Caches { sizes, ..Caches::only(fine(CHECK, reason)) }
}

/// Whether the line shares an L3 in each socket, and no other cache in another way.
fn is_l3_of_socket(args: &str) -> bool {
    let has = |setting: &str| args_line::has_setting(args, setting);
    has("smp-cache.0.cache=l3")
        && has("smp-cache.0.topology=socket")
        && !args_line::has_prefix(args, "smp-cache.1.")
}

/// The guest takes several caches for one: dies tell them apart, if the vCPUs come in equal blocks.
fn spread(
    topology: &Topology,
    vm: &VmFacts<'_>,
    shape: Shape,
    llcs: &[LlcId],
    seen: usize,
) -> Caches {
    let all = llcs.iter().collect::<BTreeSet<_>>().len();
    let sees = counted(seen, "cache");
    let number = counted(llcs.len(), "vCPU");
    let reason = format!("its {number} are behind {all} caches, and the guest sees {sees}");
    if let Some(better) = by_dies(topology, vm, shape, llcs) {
        let reason = format!(
            "{reason}: its scheduler takes threads from one to the other as if they shared it"
        );
        return Caches::fixed(reason, Fix::Shape(better));
    }
    let mut behind: BTreeMap<LlcId, usize> = BTreeMap::new();
    for llc in llcs {
        *behind.entry(*llc).or_default() += 1;
    }
    if behind.values().all(|vcpus| *vcpus <= shape.threads as usize) {
        let reason = format!("{reason}; on the host every core has one of its own");
        return Caches::only(info(CHECK, reason, None));
    }
    let blocks: Vec<String> = behind.values().map(ToString::to_string).collect();
    let reason = format!(
        "{reason}; QEMU can only show caches of equal size with vCPUs one after the other, and these have {}",
        listed(&blocks, CACHES_MAX, ", ")
    );
    Caches::only(info(CHECK, reason, None))
}

/// A shape with a die for each cache, if the planner then has each die behind one.
fn by_dies(topology: &Topology, vm: &VmFacts<'_>, shape: Shape, llcs: &[LlcId]) -> Option<Shape> {
    let runs = llcs.chunk_by(|one, next| one == next);
    let sizes: BTreeSet<usize> = runs.clone().map(<[LlcId]>::len).collect();
    let number = runs.count();
    let caches: BTreeSet<&LlcId> = llcs.iter().collect();
    let size = u32::try_from(*sizes.first()?).ok()?;
    let number =
        u32::try_from(number).ok().filter(|_| sizes.len() == 1 && caches.len() == number)?;
    let divides = number.is_multiple_of(shape.sockets)
        && size.is_multiple_of(shape.threads)
        && size > shape.threads;
    let better = divides.then(|| Shape {
        dies: number / shape.sockets,
        cores: size / shape.threads,
        ..shape
    })?;
    let seats = smp::fitting(topology, vm, better)?;
    let llc = |seats: &[crate::ids::CpuId]| -> BTreeSet<Option<LlcId>> {
        seats.iter().map(|cpu| topology.cpu(*cpu).and_then(|cpu| cpu.llc)).collect()
    };
    seats.chunks(better.in_die()).all(|die| llc(die).len() == 1).then_some(better)
}

/// The guest takes one cache for several.
fn split(
    vm: &VmFacts<'_>,
    shape: Shape,
    seen: usize,
    all: usize,
    version: Option<Version>,
) -> Caches {
    let reason = format!(
        "the guest sees {seen} caches, and its vCPUs are behind {}: it wakes threads beyond a cache by interrupts",
        if all == 1 { "one".to_owned() } else { all.to_string() }
    );
    if shape.dies > 1 && shape.sockets as usize <= all {
        if version.is_some_and(|version| version >= SMP_CACHE) {
            let value = "smp-cache.0.cache=l3,smp-cache.0.topology=socket".to_owned();
            let option = QemuOption { name: "-machine", value, when_there: WhenThere::Add };
            return Caches::fixed(reason, Fix::Option(option));
        }
        // Every version can do without dies.
        let one = Shape { dies: 1, cores: shape.cores * shape.dies, ..shape };
        return Caches::fixed(reason, Fix::Shape(one));
    }
    let config = vm.read_config();
    let is_numa = config.is_some_and(|config| config.line("numa") == Some("1"));
    let mend = config.and_then(|config| config.max_vcpus).filter(|_| !is_numa && all == 1);
    let mend = mend.map(|number| format!("qm set {} --sockets 1 --cores {number}", vm.vm));
    let reason =
        format!("{reason}; one socket shows one, and a guest may count sockets for licences");
    Caches::only(info(CHECK, reason, mend))
}

/// Says how the host's sizes are shown, where the guest's cores are like the host's.
fn size(
    topology: &Topology,
    vm: &VmFacts<'_>,
    shape: Shape,
    seats: &Seats,
    llcs: &[LlcId],
    args: &str,
) -> Option<Advice> {
    let config = vm.read_config()?;
    let is_alike = seats.iter().all(|cpu| {
        topology.core_of(*cpu).is_some_and(|core| core.cpus.len() == shape.threads as usize)
    });
    let is_one = shape.sockets * shape.dies == 1;
    if cpu_type::of(config) != "host"
        || args_line::names_property(args, "host-cache-info")
        || !is_alike
        || !is_one
    {
        return None;
    }
    let llc = topology.llcs.iter().find(|llc| Some(&llc.llc) == llcs.first())?;
    let mib = llc.size_bytes? >> 20;
    let reason = format!(
        "cpu: host shows the guest sizes that QEMU made up ({SHOWN_L3_MIB} MiB of L3 in QEMU 10.0), and the host's \
         cache has {mib} MiB; this option, in its one line args:, shows the host's, and ties the guest to hosts with \
         such caches"
    );
    let is_other = mib != SHOWN_L3_MIB;
    is_other
        .then(|| info(CHECK, reason, Some("-global max-x86_64-cpu.host-cache-info=on".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{self, World};
    use super::*;
    use crate::guest::Guest;
    use crate::policy::Policy;

    const OLD: Option<Version> = Some(Version { major: 9, minor: 2 });
    const NEW: Option<Version> = Some(SMP_CACHE);

    fn of(world: &World, guest: &Guest, config: &str, version: Option<Version>) -> Caches {
        world.vm_of(guest, Some(config), |vm| of_vm(world, vm, Qemu { version, is_x86: true }))
    }

    fn of_vm(world: &World, vm: &VmFacts<'_>, qemu: Qemu) -> Caches {
        let cores = smp::cores(&world.topology, vm);
        caches(&world.topology, vm, cores.fits.as_ref(), qemu)
    }

    fn shape(found: &Caches) -> Option<String> {
        if let Fix::Shape(shape) = &found.fix { Some(shape.option().value) } else { None }
    }

    /// Two caches of which the guest needs both, and the host's core is behind neither.
    fn two() -> World {
        let mut world = World::new(3, 4, 2);
        // The planner leaves the first core to the host, so the first cache is the small one.
        world.topology.llcs[0].size_bytes = Some(8 << 20);
        world
    }

    #[test]
    fn several_caches_are_shown_as_dies_where_they_are_equal() {
        let found = of(&two(), &fixture::guest(1, 1, 8, 2), "cores: 16\n", None);
        assert_eq!(found.advice.severity, Severity::Costs, "{:?}", found.advice);
        assert!(
            found
                .advice
                .reason
                .contains("its 16 vCPUs are behind 2 caches, and the guest sees 1 cache")
        );
        let dies = "16,sockets=1,dies=2,cores=4,threads=2,maxcpus=16";
        assert_eq!(shape(&found).as_deref(), Some(dies));
        let right = of(&two(), &fixture::guest(1, 2, 4, 2), "cores: 16\n", None);
        assert_eq!(
            (right.advice.severity, right.fix),
            (Severity::Fine, Fix::Nothing),
            "{:?}",
            right.advice
        );
        let uneven = of(&two(), &fixture::guest(1, 1, 6, 2), "cores: 12\n", None);
        assert_eq!(
            (uneven.advice.severity, uneven.fix),
            (Severity::Info, Fix::Nothing),
            "{:?}",
            uneven.advice
        );
        assert!(uneven.advice.reason.contains("these have "), "{:?}", uneven.advice);
    }

    #[test]
    fn dies_are_for_a_plan_that_has_each_behind_one_cache() {
        let world = two();
        let guest = fixture::guest(1, 1, 8, 2);
        // With dies the planner would have the first core of each on the other's cache.
        let crossed = |guest: &Guest| {
            let mut plan = world.plan(guest, &Policy::default())?;
            let seat = |at: usize| plan.vcpus[at].cpus;
            let (first, second) = ([seat(0), seat(1)], [seat(8), seat(9)]);
            for at in 0..2 {
                plan.vcpus[at].cpus = second[at];
                plan.vcpus[8 + at].cpus = first[at];
            }
            Ok(plan)
        };
        let found = world.vm_planned_by(&crossed, &guest, Some("cores: 16\n"), |vm| {
            of_vm(&world, vm, Qemu { version: None, is_x86: true })
        });
        assert_eq!(
            (found.advice.severity, found.fix),
            (Severity::Info, Fix::Nothing),
            "{:?}",
            found.advice
        );
    }

    #[test]
    fn a_cache_for_each_core_is_not_shown_as_dies() {
        let alone = of(&World::new(9, 1, 2), &fixture::guest(1, 1, 8, 2), "cores: 16\n", None);
        assert_eq!(
            (alone.advice.severity, alone.fix),
            (Severity::Info, Fix::Nothing),
            "{:?}",
            alone.advice
        );
        assert!(alone.advice.reason.contains("every core has one of its own"));
    }

    #[test]
    fn one_cache_that_the_guest_takes_for_several_is_shown_as_one() {
        let world = World::new(1, 9, 1);
        let guest = fixture::guest(1, 2, 4, 1);
        let new = of(&world, &guest, "cores: 8\n", NEW);
        assert_eq!(new.advice.severity, Severity::Costs, "{:?}", new.advice);
        let Fix::Option(option) = new.fix else { panic!("QEMU can: {:?}", new.fix) };
        assert_eq!(
            (option.name, option.value.as_str()),
            ("-machine", "smp-cache.0.cache=l3,smp-cache.0.topology=socket")
        );
        for version in [OLD, None] {
            let old = of(&world, &guest, "cores: 8\n", version);
            let one = "8,sockets=1,cores=8,threads=1,maxcpus=8";
            assert_eq!(shape(&old).as_deref(), Some(one), "it may know no smp-cache");
        }
        let args = "args: -machine smp-cache.0.cache=l3,smp-cache.0.topology=socket\n";
        assert_eq!(of(&world, &guest, args, NEW).advice.severity, Severity::Fine);
        let other = "args: -machine smp-cache.0.cache=l2,smp-cache.0.topology=socket\n";
        assert_eq!(of(&world, &guest, other, NEW).advice.severity, Severity::Unknown);
        let sockets = of(&world, &fixture::guest(2, 1, 4, 1), "sockets: 2\ncores: 4\n", NEW);
        assert_eq!(sockets.advice.severity, Severity::Info);
        assert_eq!(sockets.advice.mend.as_deref(), Some("qm set 100 --sockets 1 --cores 8"));
        let numa = of(&world, &fixture::guest(2, 1, 4, 1), "sockets: 2\ncores: 4\nnuma: 1\n", NEW);
        assert_eq!(numa.advice.mend, None, "sockets are its nodes");
    }

    #[test]
    fn an_l3_that_is_hidden_costs() {
        let world = World::flat(4);
        let guest = fixture::guest(1, 1, 4, 1);
        let off = of(&world, &guest, "args: -cpu host,l3-cache=off\n", None);
        assert!(
            off.fix == Fix::ShowL3 && off.advice.severity == Severity::Costs,
            "{:?}",
            off.advice
        );
        // This is how libvirt passes the host's caches on.
        let both = of(&world, &guest, "args: -cpu host,host-cache-info=on,l3-cache=off\n", None);
        assert!(
            both.fix == Fix::Nothing && both.advice.severity == Severity::Fine,
            "{:?}",
            both.advice
        );
        let dies = fixture::guest(1, 2, 2, 1);
        let both = of(&world, &dies, "args: -cpu host,host-cache-info=on\n", None);
        assert_eq!(both.advice.severity, Severity::Unknown);
    }

    #[test]
    fn the_hosts_sizes_are_shown_only_where_the_cores_are_alike() {
        let option = "-global max-x86_64-cpu.host-cache-info=on";
        let mends = |world: &World, guest: &Guest, config: &str| {
            let found = of(world, guest, config, None);
            found.sizes.and_then(|sizes| sizes.mend)
        };
        let world = World::new(1, 5, 2);
        assert_eq!(
            mends(&world, &fixture::guest(1, 1, 4, 2), "cpu: host\n"),
            Some(option.to_owned())
        );
        assert_eq!(mends(&world, &fixture::guest(1, 1, 4, 2), "cpu: kvm64\n"), None);
        assert_eq!(
            mends(&world, &fixture::guest(1, 1, 4, 1), "cpu: host\n"),
            None,
            "siblings are not shown"
        );
        let args = "cpu: host\nargs: -global max-x86_64-cpu.host-cache-info=off\n";
        assert_eq!(mends(&world, &fixture::guest(1, 1, 4, 2), args), None, "it was chosen");
    }

    #[test]
    fn what_is_not_known_of_caches_is_said() {
        let mut world = World::flat(4);
        for cpu in &mut world.topology.cpus {
            cpu.llc = None;
        }
        world.topology.llcs.clear();
        let dark = of(&world, &fixture::guest(1, 1, 4, 1), "cores: 4\n", None);
        assert_eq!(dark.advice.severity, Severity::Unknown, "{:?}", dark.advice);
        let none = of(&World::flat(4), &fixture::guest(1, 1, 40, 1), "cores: 40\n", None);
        assert_eq!(none.advice.severity, Severity::Unknown, "{:?}", none.advice);
        let world = two();
        let arm = world.vm_of(&fixture::guest(1, 1, 8, 2), Some(""), |vm| {
            of_vm(&world, vm, Qemu { version: NEW, is_x86: false })
        });
        assert_eq!((arm.advice.severity, arm.fix), (Severity::Unknown, Fix::Nothing));
    }
}
