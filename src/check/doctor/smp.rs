//! `guest-cores`: whether the guest counts its vCPUs as the plan places them, and the `-smp` option with which it
//! does. Proxmox shows every vCPU as a core of one thread (`PVE/QemuServer.pm: config_to_command`).

use std::collections::BTreeSet;

use super::advice::{Advice, costs, fine, info, unknown};
use super::args_line::{self, QemuOption, WhenThere};
use super::facts::VmFacts;
use crate::cpuset::CpuSet;
use crate::guest::{Guest, GuestVcpu};
use crate::ids::{CpuId, VcpuIndex};
use crate::plan::Plan;
use crate::topology::Topology;
use crate::wording::counted;

const CHECK: &str = "guest-cores";

/// How QEMU counts a guest's vCPUs: thread by thread, core by core, die by die.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub(super) sockets: u32,
    /// In a socket.
    pub(super) dies: u32,
    /// In a die.
    pub(super) cores: u32,
    /// In a core.
    pub(super) threads: u32,
}

/// The host's CPU of each vCPU, by index.
pub(super) type Seats = Vec<CpuId>;

/// What `guest-cores` has come to.
pub(super) struct Cores {
    pub(super) advice: Advice,
    /// How the guest counts its vCPUs now.
    pub(super) now: Option<Shape>,
    /// How it should, as far as its cores go, and where the planner then has its vCPUs.
    pub(super) fits: Option<(Shape, Seats)>,
}

impl Cores {
    /// Returns the shape that fits better than the one it has.
    pub(super) fn better(&self) -> Option<Shape> {
        let (shape, _) = self.fits.as_ref()?;
        (Some(*shape) != self.now).then_some(*shape)
    }
}

impl Shape {
    /// Returns the shape of a guest; `None`: some of its vCPUs are not there, or no `-smp` option gives this.
    pub(super) fn of(guest: &Guest) -> Option<Shape> {
        let vcpus = &guest.vcpus;
        let sockets = distinct(vcpus.iter().map(|vcpu| vcpu.socket))?;
        let dies = distinct(vcpus.iter().map(|vcpu| (vcpu.socket, vcpu.die)))? / sockets;
        let threads = distinct(vcpus.iter().map(|vcpu| vcpu.thread))?;
        let number = u32::try_from(vcpus.len()).ok()?;
        let cores = number.checked_div(sockets.checked_mul(dies)?.checked_mul(threads)?)?;
        let shape = Shape { sockets, dies, cores, threads };
        let is_so = |(seen, meant): (&GuestVcpu, GuestVcpu)| {
            seen.index == meant.index
                && seen.socket.unwrap_or(0) == meant.socket.unwrap_or(0)
                && seen.die.unwrap_or(0) == meant.die.unwrap_or(0)
                && seen.thread.unwrap_or(0) == meant.thread.unwrap_or(0)
        };
        let meant = (0..number).map(|index| shape.vcpu(index, None));
        (shape.vcpus() == number && vcpus.iter().zip(meant).all(is_so)).then_some(shape)
    }

    /// Returns how many vCPUs it has.
    pub(super) fn vcpus(self) -> u32 {
        self.sockets * self.dies * self.cores * self.threads
    }

    /// Returns how many vCPUs a die has.
    pub(super) fn in_die(self) -> usize {
        (self.cores * self.threads) as usize
    }

    /// Returns that guest with this shape.
    pub(super) fn guest(self, like: &Guest) -> Guest {
        let node = |index: u32| like.vcpus.get(index as usize).and_then(|vcpu| vcpu.node);
        let vcpus = (0..self.vcpus()).map(|index| self.vcpu(index, node(index))).collect();
        Guest { vcpus, ..like.clone() }
    }

    fn vcpu(self, index: u32, node: Option<u32>) -> GuestVcpu {
        let Shape { dies, cores, threads, .. } = self;
        GuestVcpu {
            index: VcpuIndex(index),
            node,
            socket: Some(index / (dies * cores * threads)),
            die: (dies > 1).then_some(index / (cores * threads) % dies),
            cluster: None,
            core: Some(index / threads % cores),
            thread: Some(index % threads),
        }
    }

    /// Returns the option that gives a guest this shape. Dies are there since QEMU 4.1.
    pub(super) fn option(self) -> QemuOption {
        let Shape { sockets, dies, cores, threads } = self;
        let number = self.vcpus();
        let dies = if dies > 1 { format!("dies={dies},") } else { String::new() };
        let value = format!(
            "{number},sockets={sockets},{dies}cores={cores},threads={threads},maxcpus={number}"
        );
        QemuOption { name: "-smp", value, when_there: WhenThere::Replace }
    }

    /// Whether each of its cores, and nothing else of it, is on a host's core.
    fn is_on_cores(self, topology: &Topology, seats: &Seats) -> bool {
        self.apart(topology, seats) == 0 && self.doubled(topology, seats) == 0
    }

    fn host_cores(self, topology: &Topology, seats: &Seats) -> Vec<BTreeSet<CpuId>> {
        let first =
            |cpu: &CpuId| topology.core_of(*cpu).and_then(|core| core.cpus.first()).unwrap_or(*cpu);
        let cores = seats.chunks(self.threads as usize);
        cores.map(|cpus| cpus.iter().map(first).collect()).collect()
    }

    /// How many of its cores are spread over cores of the host.
    fn apart(self, topology: &Topology, seats: &Seats) -> usize {
        self.host_cores(topology, seats).iter().filter(|cores| cores.len() > 1).count()
    }

    /// How many vCPUs share a host's core with one of another of its cores.
    fn doubled(self, topology: &Topology, seats: &Seats) -> usize {
        let cores = self.host_cores(topology, seats);
        let users = |core: &CpuId| cores.iter().filter(|cores| cores.contains(core)).count();
        let shares = |cores: &&BTreeSet<CpuId>| cores.iter().any(|core| users(core) > 1);
        cores.iter().filter(shares).count() * self.threads as usize
    }
}

/// Returns how many different values there are; `None`: none.
fn distinct<T: Ord>(values: impl Iterator<Item = T>) -> Option<u32> {
    let all: BTreeSet<T> = values.collect();
    u32::try_from(all.len()).ok().filter(|number| *number > 0)
}

/// Returns the CPU of each vCPU; `None`: not each has one of its own.
pub(super) fn seats(plan: &Plan, guest: &Guest) -> Option<Seats> {
    let one = |vcpu: &GuestVcpu| {
        let cpus = plan.vcpu(vcpu.index)?;
        cpus.first().filter(|_| cpus.len() == 1)
    };
    let seats: Seats = guest.vcpus.iter().map(one).collect::<Option<_>>()?;
    let all: CpuSet = seats.iter().copied().collect();
    (all.len() == seats.len()).then_some(seats)
}

/// Judges whether the guest knows which of its vCPUs share a core.
pub(super) fn cores(topology: &Topology, vm: &VmFacts<'_>) -> Cores {
    let now = Shape::of(&vm.guest);
    let only = |advice| Cores { advice, now, fits: None };
    let plan = match &vm.plan {
        Ok(plan) => plan,
        Err(why) => return only(unknown(CHECK, format!("not checked: there is no plan: {why}"))),
    };
    let Some(shape) = now else {
        return only(unknown(CHECK, "not checked: not all of its vCPUs are there"));
    };
    let number = shape.vcpus();
    let vcpus = counted(number as usize, "vCPU");
    let Some(seats) = seats(plan, &vm.guest) else {
        let reason = format!(
            "the plan does not give each of its {vcpus} a CPU of its own, so no topology of the guest matches it"
        );
        return only(info(CHECK, reason, None));
    };
    let (apart, doubled) = (shape.apart(topology, &seats), shape.doubled(topology, &seats));
    if apart == 0 && doubled == 0 {
        let each = if number == 1 { "its vCPU".to_owned() } else { format!("each of its {vcpus}") };
        let reason = match (shape.threads, idle_siblings(topology, &seats)) {
            (1, 0) => format!("{each} has a core of its own, as the guest believes"),
            (1, idle) => format!(
                "{each} has a core of its own, as the guest believes; {} idle",
                if idle == 1 { "a sibling is".to_owned() } else { format!("{idle} siblings are") }
            ),
            _ => "the guest knows which of its vCPUs share a core".to_owned(),
        };
        return Cores { advice: fine(CHECK, reason), now, fits: Some((shape, seats)) };
    }
    let reason = if shape.threads == 1 {
        format!(
            "the guest takes its {vcpus} for as many cores, and {doubled} of them share cores of the host"
        )
    } else {
        let all = counted((number / shape.threads) as usize, "core");
        format!(
            "{apart} of the guest's {all} are not on one core of the host, and {doubled} of its {vcpus} share one"
        )
    };
    let wide = seats.iter().filter_map(|cpu| topology.core_of(*cpu)).map(|core| core.cpus.len());
    let wide = wide.max().and_then(|wide| u32::try_from(wide).ok()).unwrap_or(1);
    let better = [wide, 1].into_iter().find_map(|threads| {
        let with = with_threads(shape, threads)?;
        Some((with, fitting(topology, vm, with)?))
    });
    if better.is_some() {
        return Cores { advice: costs(CHECK, reason, None), now, fits: better };
    }
    let is_odd = shape.threads == 1 && with_threads(shape, wide).is_none();
    let why =
        if is_odd { "an even number could be paired" } else { "no other topology fits better" };
    let advice = costs(CHECK, format!("{reason}; {why}"), None);
    Cores { advice, now, fits: Some((shape, seats)) }
}

/// The same number of vCPUs with other cores; `None`: it is the same, or does not divide.
fn with_threads(shape: Shape, threads: u32) -> Option<Shape> {
    let in_die = shape.cores * shape.threads;
    let is_other = threads != shape.threads && in_die.is_multiple_of(threads);
    is_other.then(|| Shape { cores: in_die / threads, threads, ..shape })
}

/// Where the planner has a guest of that shape, if each of its cores is then on a host's core.
pub(super) fn fitting(topology: &Topology, vm: &VmFacts<'_>, shape: Shape) -> Option<Seats> {
    let guest = shape.guest(&vm.guest);
    let seats = seats(&(vm.plans)(&guest).ok()?, &guest)?;
    shape.is_on_cores(topology, &seats).then_some(seats)
}

/// How many siblings of the vCPUs' CPUs have no vCPU.
fn idle_siblings(topology: &Topology, seats: &Seats) -> usize {
    let used: CpuSet = seats.iter().copied().collect();
    let whole = seats.iter().filter_map(|cpu| topology.core_of(*cpu)).map(|core| core.cpus);
    whole.fold(CpuSet::EMPTY, |all, cpus| all | cpus).len() - used.len()
}

/// Returns whether Proxmox plugs the vCPUs itself, and the words that say why there is no `-smp` option then.
pub(super) fn cpu_hotplug(vm: &VmFacts<'_>) -> Option<String> {
    vm.read_config()?.has_hotplug("cpu").then(|| {
        format!(
            "hotplug has cpu, with which Proxmox plugs every vCPU as a core of one thread, so there is no -smp option; \
             qm set {} --hotplug {} loses adding vCPUs while it runs",
            vm.vm,
            without_cpu(vm)
        )
    })
}

/// Names an `-smp` option that Proxmox's own plugging of vCPUs contradicts.
pub(super) fn clash(vm: &VmFacts<'_>) -> Option<Advice> {
    let config = vm.read_config()?;
    let has_smp = args_line::has_option(config.args.as_deref()?, "-smp");
    (has_smp && config.has_hotplug("cpu")).then(|| {
        let reason = "its line args: has -smp, and hotplug has cpu: Proxmox plugs every vCPU by its own count of \
                      cores, so QEMU may not start; either has to go, and without cpu in hotplug no vCPU is added \
                      while it runs";
        let mend = format!("qm set {} --hotplug {}", vm.vm, without_cpu(vm));
        costs(CHECK, reason, Some(mend))
    })
}

/// The kinds of devices that can be plugged, but for vCPUs.
fn without_cpu(vm: &VmFacts<'_>) -> String {
    let kinds = ["network", "disk", "memory", "usb", "cloudinit"];
    let has = |kind: &&str| vm.read_config().is_some_and(|config| config.has_hotplug(kind));
    let left: Vec<&str> = kinds.into_iter().filter(has).collect();
    if left.is_empty() { "0".to_owned() } else { left.join(",") }
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::{self, World};
    use super::*;
    use crate::policy::{Policy, Sharing};

    fn of(world: &World, guest: &Guest) -> Cores {
        world.vm_of(guest, Some("cores: 8\n"), |vm| cores(&world.topology, vm))
    }

    fn value(cores: &Cores) -> Option<String> {
        cores.better().map(|shape| shape.option().value)
    }

    #[test]
    fn a_shape_is_read_from_what_qemu_reports() {
        for (sockets, dies, cores, threads) in
            [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2), (2, 3, 4, 2)]
        {
            let guest = fixture::guest(sockets, dies, cores, threads);
            let shape = Shape { sockets, dies, cores, threads };
            assert_eq!(Shape::of(&guest), Some(shape));
            assert_eq!(shape.guest(&guest), guest, "and back");
        }
        let mut some = fixture::guest(2, 1, 4, 1);
        some.vcpus.truncate(6);
        assert_eq!(Shape::of(&some), None, "4 and 2");
        some.vcpus.remove(1);
        assert_eq!(Shape::of(&some), None, "a hole");
        assert_eq!(Shape::of(&Guest::default()), None);
    }

    #[test]
    fn the_number_of_threads_is_that_of_the_plan() {
        // Five cores behind each cache are left, or six.
        let world = World::new(2, 6, 2);
        let paired = of(&world, &fixture::guest(1, 1, 8, 1));
        assert_eq!(paired.advice.severity, Severity::Costs, "{:?}", paired.advice);
        assert!(
            paired.advice.reason.contains("its 8 vCPUs for as many cores, and 4 of them"),
            "{:?}",
            paired.advice
        );
        assert_eq!(value(&paired).as_deref(), Some("8,sockets=1,cores=4,threads=2,maxcpus=8"));
        let two = of(&world, &fixture::guest(2, 1, 4, 1));
        assert_eq!(value(&two).as_deref(), Some("8,sockets=2,cores=2,threads=2,maxcpus=8"));
        for (guest, words) in [
            (
                fixture::guest(1, 1, 6, 1),
                "each of its 6 vCPUs has a core of its own, as the guest believes; 6 siblings are idle",
            ),
            (fixture::guest(1, 1, 4, 2), "knows which of its vCPUs share a core"),
        ] {
            let right = of(&world, &guest);
            assert_eq!(
                (right.advice.severity, value(&right)),
                (Severity::Fine, None),
                "{:?}",
                right.advice
            );
            assert!(right.advice.reason.contains(words), "{:?}", right.advice);
        }
        let odd = of(&world, &fixture::guest(1, 1, 9, 1));
        assert_eq!((odd.advice.severity, value(&odd)), (Severity::Costs, None));
        assert!(odd.advice.reason.contains("even number"), "{:?}", odd.advice);
    }

    #[test]
    fn a_topology_that_the_planner_would_not_follow_is_not_advised() {
        let world = World::new(2, 6, 2);
        // It would have the first two cores crosswise.
        let crossed = |guest: &Guest| {
            let mut plan = world.plan(guest, &Policy::default())?;
            let (second, third) = (plan.vcpus[1].cpus, plan.vcpus[2].cpus);
            (plan.vcpus[1].cpus, plan.vcpus[2].cpus) = (third, second);
            Ok(plan)
        };
        let flat = fixture::guest(1, 1, 8, 1);
        let found = world.vm_planned_by(&crossed, &flat, None, |vm| cores(&world.topology, vm));
        assert_eq!((found.advice.severity, value(&found)), (Severity::Costs, None));
        assert!(
            found.advice.reason.ends_with("no other topology fits better"),
            "{:?}",
            found.advice
        );
    }

    #[test]
    fn vcpus_that_share_a_cpu_match_no_topology() {
        let world = World::flat(4);
        let mut policy = Policy::default();
        policy.vm.share.value = Sharing::Wrap;
        let flat = fixture::guest(1, 1, 8, 1);
        let found = world.vm_of(&flat, None, |vm| {
            vm.plan = world.plan(&flat, &policy);
            cores(&world.topology, vm)
        });
        assert_eq!(
            (found.advice.severity, value(&found)),
            (Severity::Info, None),
            "{:?}",
            found.advice
        );
        assert!(found.advice.reason.contains("a CPU of its own"), "{:?}", found.advice);
    }

    #[test]
    fn threads_that_the_host_does_not_have_are_to_go() {
        let world = World::flat(8);
        let apart = of(&world, &fixture::guest(1, 1, 4, 2));
        assert_eq!(apart.advice.severity, Severity::Costs, "{:?}", apart.advice);
        assert!(apart.advice.reason.contains("4 of the guest's 4 cores"), "{:?}", apart.advice);
        assert_eq!(value(&apart).as_deref(), Some("8,sockets=1,cores=8,threads=1,maxcpus=8"));
    }

    #[test]
    fn without_a_plan_nothing_is_said_of_cores() {
        let world = World::new(1, 4, 2);
        let none = of(&world, &fixture::guest(1, 1, 32, 1));
        assert_eq!(none.advice.severity, Severity::Unknown, "{:?}", none.advice);
        assert!(none.advice.reason.contains("there is no plan: "), "{:?}", none.advice);
        let mut part = fixture::guest(2, 1, 2, 1);
        part.vcpus.truncate(3);
        assert_eq!(of(&world, &part).advice.severity, Severity::Unknown);
    }

    #[test]
    fn an_smp_option_beside_cpu_hotplug_is_named() {
        let world = World::flat(4);
        let of = |config: &str| world.vm(4, Some(config), |vm| (clash(vm), cpu_hotplug(vm)));
        let (clash, hotplug) = of("args: -smp 4,cores=2\nhotplug: network,cpu\n");
        let clash = clash.expect("both");
        assert_eq!(clash.severity, Severity::Costs);
        assert_eq!(clash.mend.as_deref(), Some("qm set 100 --hotplug network"));
        assert!(hotplug.is_some_and(|why| why.contains("qm set 100 --hotplug network loses")));
        assert_eq!(of("args: -smp 4\n"), (None, None));
        let (clash, hotplug) = of("args: -k de\nhotplug: cpu\n");
        assert!(clash.is_none() && hotplug.is_some_and(|why| why.contains("--hotplug 0")));
    }
}
