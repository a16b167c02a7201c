//! What a host and a VM still cost, whatever qmpin does, and the command that fixes it. Pure: the facts are read
//! elsewhere.
//!
//! | check | costs where |
//! |---|---|
//! | `partition` | no isolated partition is to be had |
//! | `irqbalance` | one runs that cannot be configured to exclude the VMs' CPUs |
//! | `rt-throttling` | nothing keeps real-time threads from starving the kernel's own |
//! | `guest-cores` | the guest does not know which of its vCPUs share a core of the host |
//! | `config` | Proxmox's own configuration moves or throttles the VM |
//! | `channel` | QEMU is asked by visits of the socket that Proxmox needs, too |

pub mod args_line;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::check::doctor::args_line::{QemuOption, WhenThere};
use crate::cpuset::CpuSet;
use crate::discover::ProxmoxConfig;
use crate::guest::Guest;
use crate::ids::VmName;
use crate::knobs::host::places::Irqbalance;
use crate::scheduling::Throttling;
use crate::topology::Topology;
use crate::wording::counted;

/// Whether something is as it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// There is nothing to mend.
    Fine,
    /// It costs something.
    Costs,
}

/// One look, and what it has come to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Advice {
    /// Its short name.
    pub check: &'static str,
    /// How it is.
    pub health: Health,
    /// A sentence.
    pub reason: String,
    /// The command that fixes it, or what belongs in the VM's configuration. Where there is none, it
    /// is how the machine is.
    pub mend: Option<String>,
}

/// How QEMU is asked, as far as that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// Over a socket that is qmpin's alone.
    Alone,
    /// By visits of `<vmid>.qmp`.
    Visits,
}

/// What is known of the host.
#[derive(Debug)]
pub struct HostFacts<'a> {
    /// The machine.
    pub topology: &'a Topology,
    /// Whether a partition is to be had; why not.
    pub partition: Result<(), String>,
    /// Every irqbalance that runs.
    pub irqbalances: &'a [Irqbalance],
    /// Whether the kernel keeps some time for its own threads.
    pub throttling: Throttling,
}

/// What is known of a VM.
#[derive(Debug)]
pub struct VmFacts<'a> {
    /// Which.
    pub vm: &'a VmName,
    /// What it has.
    pub guest: Guest,
    /// How it is asked; `None`: it is not Proxmox's, and no other program needs its socket.
    pub asked: Option<Asked>,
    /// Its configuration, or why that cannot be read; `None`: it is not Proxmox's.
    pub config: Option<Result<ProxmoxConfig, String>>,
}

/// All advice, on the host first.
#[must_use]
pub fn advise(host: &HostFacts<'_>, vm: Option<&VmFacts<'_>>) -> Vec<Advice> {
    let mut advice = vec![partition(host), irqbalance(host), rt_throttling(host)];
    if let Some(vm) = vm {
        let (cores, smp) = guest_cores(host, vm);
        let (channel, socket) = vm.asked.map(|asked| channel(vm, asked)).unzip();
        let socket = socket.flatten();
        let options: Vec<&QemuOption> = smp.iter().chain(&socket).collect();
        advice.push(with_options(vm, cores, smp.as_ref(), &options));
        advice.extend(vm.config.iter().flat_map(|read| config(host, vm.vm, read)));
        advice.extend(channel.map(|it| with_options(vm, it, socket.as_ref(), &options)));
    }
    advice
}

/// Where an option of QEMU's would fix it: a line that has all options, and all that is there already.
fn with_options(
    vm: &VmFacts<'_>,
    mut advice: Advice,
    own: Option<&QemuOption>,
    all: &[&QemuOption],
) -> Advice {
    let Some(own) = own else { return advice };
    let Some(config) = &vm.config else {
        advice.mend = Some(format!("{} {}", own.name, own.value));
        return advice;
    };
    let path = format!("/etc/pve/qemu-server/{}.conf", vm.vm);
    let before = config.as_ref().ok().and_then(|config| config.args.as_deref()).unwrap_or_default();
    match args_line::merged(before, all) {
        Ok(line) if line == before => {
            advice
                .reason
                .push_str("; its line `args:` is right, and counts from its next start on");
            advice.mend = Some(format!("qm shutdown {0} && qm start {0}", vm.vm));
        }
        Ok(line) => {
            let how = match (config, before) {
                (Err(_), _) => "add this to its one line `args:`",
                (Ok(_), "") => "add this line",
                (Ok(_), _) => "this in place of its line `args:`",
            };
            advice.reason.push_str(&format!("; {path}: {how}, then start the VM anew"));
            advice.mend = Some(format!("args: {line}"));
        }
        Err(why) => {
            advice.reason.push_str(&format!("; the line `args:` in {path} cannot be read: {why}"));
        }
    }
    advice
}

fn fine(check: &'static str, reason: impl Into<String>) -> Advice {
    Advice { check, health: Health::Fine, reason: reason.into(), mend: None }
}

fn costs(check: &'static str, reason: impl Into<String>, mend: Option<String>) -> Advice {
    Advice { check, health: Health::Costs, reason: reason.into(), mend }
}

fn partition(host: &HostFacts<'_>) -> Advice {
    match &host.partition {
        Ok(()) => fine("partition", "an isolated partition keeps everybody off a VM's CPUs"),
        Err(why) => costs("partition", format!("not available: {why}"), None),
    }
}

fn irqbalance(host: &HostFacts<'_>) -> Advice {
    let deaf = host.irqbalances.iter().filter_map(|one| {
        let why = one.banned.as_ref().err()?;
        Some(format!("process {} cannot be configured: {why}", one.process.pid))
    });
    let deaf: Vec<String> = deaf.collect();
    if !deaf.is_empty() {
        let reason = format!("it may put interrupts on VMs' CPUs: {}", deaf.join("; "));
        return costs("irqbalance", reason, Some("systemctl restart irqbalance".to_owned()));
    }
    match host.irqbalances.len() {
        0 => fine("irqbalance", "none runs"),
        _ => fine("irqbalance", "it can be configured to exclude the VMs' CPUs"),
    }
}

fn rt_throttling(host: &HostFacts<'_>) -> Advice {
    match host.throttling {
        Throttling::On => fine("rt-throttling", "the kernel's own threads get their share"),
        Throttling::Off => costs(
            "rt-throttling",
            "kernel.sched_rt_runtime_us = -1: with sched = \"fifo:N\" a guest that computes starves the \
             kernel's own threads on its CPUs",
            Some("sysctl kernel.sched_rt_runtime_us=950000".to_owned()),
        ),
    }
}

fn guest_cores(host: &HostFacts<'_>, vm: &VmFacts<'_>) -> (Advice, Option<QemuOption>) {
    let check = "guest-cores";
    let number = vm.guest.vcpus.len();
    let has_smt = host.topology.cores.iter().any(|core| core.cpus.len() > 1);
    let threads: BTreeSet<u32> = vm.guest.vcpus.iter().filter_map(|vcpu| vcpu.thread).collect();
    if threads.len() > 1 {
        return (fine(check, "the guest knows which of its vCPUs share a core"), None);
    }
    if !has_smt || number < 2 {
        return (fine(check, "no two of its vCPUs share a core"), None);
    }
    let reason = format!(
        "the guest takes its {} for as many cores, and the host has two to a core",
        counted(number, "vCPU")
    );
    let sockets = vm.guest.vcpus.iter().filter_map(|vcpu| vcpu.socket);
    let sockets = sockets.collect::<BTreeSet<u32>>().len().max(1);
    if !number.is_multiple_of(2 * sockets) {
        return (costs(check, format!("{reason}; an even number could be paired"), None), None);
    }
    let cores = number / (2 * sockets);
    let value = format!("{number},sockets={sockets},cores={cores},threads=2,maxcpus={number}");
    let smp = QemuOption { name: "-smp", value, when_there: WhenThere::Replace };
    let reason = match vm.asked {
        Some(_) => format!("{reason} (not together with hotplug: cpu)"),
        None => reason,
    };
    (costs(check, reason, None), Some(smp))
}

fn config(host: &HostFacts<'_>, vm: &VmName, read: &Result<ProxmoxConfig, String>) -> Vec<Advice> {
    let check = "config";
    let config = match read {
        Ok(config) => config,
        Err(why) => return vec![fine(check, format!("not checked: {why}"))],
    };
    let affinity = config.affinity.as_ref().map(|cpus| affinity(host, vm, config, cpus));
    let cpulimit = config.cpulimit.as_ref().map(|limit| {
        let reason =
            format!("cpulimit: {limit} stops vCPUs for a part of each 100 ms that they use more");
        costs(check, reason, Some(format!("qm set {vm} --delete cpulimit")))
    });
    let found: Vec<Advice> = affinity.into_iter().chain(cpulimit).collect();
    if found.is_empty() {
        return vec![fine(check, "neither affinity nor cpulimit is set")];
    }
    found
}

/// An affinity costs nothing where it decides on which nodes the memory is at the start: hugepages, and all memory of
/// a VM with a passed-through device, are allocated then, and stay.
fn affinity(host: &HostFacts<'_>, vm: &VmName, config: &ProxmoxConfig, cpus: &str) -> Advice {
    let check = "config";
    let topology = host.topology;
    let mend = Some(format!("qm set {vm} --delete affinity"));
    let moved =
        format!("affinity: {cpus} has Proxmox start QEMU there; qmpin moves its threads then");
    if config.is_memory_bound {
        return costs(check, format!("{moved}, and memory is bound by numaN"), mend);
    }
    if topology.unknown.iter().any(|unknown| unknown.what == "the NUMA nodes") {
        return fine(
            check,
            format!("{moved}; it may keep its memory on a node, and nodes are not known"),
        );
    }
    let set = CpuSet::parse_cpulist(cpus).unwrap_or_default();
    let with_memory = topology.nodes.iter().filter(|node| node.memory_bytes != Some(0));
    let (inside, outside): (Vec<_>, Vec<_>) =
        with_memory.partition(|node| node.cpus.intersects(&set));
    if outside.is_empty() {
        return costs(check, moved, mend);
    }
    let names: Vec<String> = inside.iter().map(|node| node.node.to_string()).collect();
    let nodes = match names.as_slice() {
        [one] => format!("node {one}"),
        _ => format!("nodes {}", names.join(", ")),
    };
    fine(
        check,
        format!(
            "affinity: {cpus} has its memory on {nodes} from the start; it is lost without numaN with hostnodes="
        ),
    )
}

fn channel(vm: &VmFacts<'_>, asked: Asked) -> (Advice, Option<QemuOption>) {
    let name = vm.vm;
    if asked == Asked::Alone {
        let reason = "QEMU is queried over a socket that no other client needs";
        return (fine("channel", reason), None);
    }
    let reason = format!(
        "QEMU is asked by visits of {name}.qmp, a few ms each, which Proxmox needs, too (from QEMU 11.1 on there is \
         another way, once it is attached)"
    );
    let value = format!("unix:/run/qemu-server/{name}.qmpin,server=on,wait=off");
    let socket = QemuOption { name: "-qmp", value, when_there: WhenThere::Add };
    (costs("channel", reason, None), Some(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestVcpu;
    use crate::ids::{CoreId, CpuId, NodeId, Pid, StartTicks, VcpuIndex};
    use crate::threads::ProcessKey;
    use crate::topology::{Core, Node, Unknown};

    fn machine(threads: usize) -> Topology {
        let cpus = (0..threads).filter_map(CpuId::from_index).collect();
        let (llc, node, package, die, kind) = (None, None, None, None, None);
        let core = Core { id: CoreId(0), cpus, llc, node, package, die, kind };
        Topology { cores: vec![core], ..Topology::default() }
    }

    fn guest(number: u32, threads: u32, sockets: u32) -> Guest {
        let vcpu = |index: u32| GuestVcpu {
            index: VcpuIndex(index),
            node: None,
            socket: Some(index * sockets / number),
            die: None,
            cluster: None,
            core: Some(index / threads),
            thread: Some(index % threads),
        };
        Guest {
            vcpus: (0..number).map(vcpu).collect(),
            iothreads: Vec::new(),
            beyond: Vec::new(),
            memory: Vec::new(),
        }
    }

    fn host_of(topology: &Topology) -> HostFacts<'_> {
        HostFacts { topology, partition: Ok(()), irqbalances: &[], throttling: Throttling::On }
    }

    fn advice(host_threads: usize, guest: &Guest, asked: Option<Asked>) -> Vec<Advice> {
        let config = asked.map(|_| Ok(ProxmoxConfig::default()));
        advice_with(host_threads, guest, asked, config)
    }

    fn advice_with(
        host_threads: usize,
        guest: &Guest,
        asked: Option<Asked>,
        config: Option<Result<ProxmoxConfig, String>>,
    ) -> Vec<Advice> {
        let topology = machine(host_threads);
        let vm = &"100".parse().expect("a name");
        advise(&host_of(&topology), Some(&VmFacts { vm, guest: guest.clone(), asked, config }))
    }

    fn found<'a>(advice: &'a [Advice], check: &str) -> &'a Advice {
        advice.iter().find(|one| one.check == check).expect("looked at")
    }

    #[test]
    fn guest_without_smt_gets_the_line_that_adds_it() {
        for (number, sockets, line) in [
            (8, 1, "args: -smp 8,sockets=1,cores=4,threads=2,maxcpus=8"),
            (8, 2, "args: -smp 8,sockets=2,cores=2,threads=2,maxcpus=8"),
        ] {
            let all = advice(2, &guest(number, 1, sockets), Some(Asked::Visits));
            let cores = found(&all, "guest-cores");
            assert!(cores.mend.as_deref().is_some_and(|mend| mend.starts_with(line)), "{cores:?}");
        }
        let odd = advice(2, &guest(3, 1, 1), None);
        assert_eq!(found(&odd, "guest-cores").mend, None);
        assert_eq!(found(&odd, "guest-cores").health, Health::Costs);
        for (host_threads, guest) in [(1, guest(8, 1, 1)), (2, guest(8, 2, 1)), (2, guest(1, 1, 1))]
        {
            let all = advice(host_threads, &guest, None);
            assert_eq!(found(&all, "guest-cores").health, Health::Fine);
        }
    }

    #[test]
    fn options_are_added_to_the_one_line_that_is_there() {
        let args = "-cpu host,+topoext -fw_cfg 'name=a b'";
        let config = ProxmoxConfig { args: Some(args.to_owned()), ..ProxmoxConfig::default() };
        let smp = "-smp 8,sockets=1,cores=4,threads=2,maxcpus=8";
        let qmp = "-qmp unix:/run/qemu-server/100.qmpin,server=on,wait=off";
        let all = advice_with(2, &guest(8, 1, 1), Some(Asked::Visits), Some(Ok(config.clone())));
        for check in ["guest-cores", "channel"] {
            let line = format!("args: {args} {smp} {qmp}");
            assert_eq!(found(&all, check).mend, Some(line), "one line for both");
        }
        let all = advice_with(2, &guest(8, 2, 1), Some(Asked::Visits), Some(Ok(config)));
        assert_eq!(found(&all, "channel").mend, Some(format!("args: {args} {qmp}")));
        // What is there already counts from the next start on.
        let config =
            ProxmoxConfig { args: Some(format!("{qmp} {smp}")), ..ProxmoxConfig::default() };
        let all = advice_with(2, &guest(8, 1, 1), Some(Asked::Visits), Some(Ok(config)));
        assert_eq!(found(&all, "channel").mend.as_deref(), Some("qm shutdown 100 && qm start 100"));
        let config = ProxmoxConfig { args: Some("-k 'de".to_owned()), ..ProxmoxConfig::default() };
        let all = advice_with(2, &guest(8, 1, 1), Some(Asked::Visits), Some(Ok(config)));
        assert_eq!(found(&all, "channel").mend, None);
        assert!(found(&all, "channel").reason.contains("a quote in it is not closed"));
        let unread = Some(Err("it is not there".to_owned()));
        let all = advice_with(2, &guest(8, 2, 1), Some(Asked::Visits), unread);
        assert!(found(&all, "channel").reason.contains("add this to its one line"));
    }

    #[test]
    fn an_affinity_that_keeps_memory_local_is_not_to_be_deleted() {
        let node = |node: u32, cpus: &str, memory_bytes| Node {
            node: NodeId(node),
            cpus: cpus.parse().expect("a cpulist"),
            memory_bytes,
            distances: Vec::new(),
        };
        let two = Topology {
            nodes: vec![node(0, "0-11", Some(1)), node(1, "12-23", None)],
            ..Topology::default()
        };
        let one = Topology { nodes: vec![node(0, "0-23", Some(1))], ..Topology::default() };
        // A node without memory holds none.
        let half = Topology {
            nodes: vec![node(0, "0-11", Some(1)), node(1, "12-23", Some(0))],
            ..Topology::default()
        };
        let unknown = Unknown { what: "the NUMA nodes".to_owned(), reason: String::new() };
        let dark = Topology { unknown: vec![unknown], ..Topology::default() };
        let vm = &"100".parse().expect("a name");
        for (topology, cpus, is_memory_bound, health) in [
            (&two, "12-19", false, Health::Fine),
            (&two, "12-19", true, Health::Costs),
            (&two, "4-19", false, Health::Costs),
            (&one, "12-19", false, Health::Costs),
            (&half, "0-7", false, Health::Costs),
            (&dark, "12-19", false, Health::Fine),
        ] {
            let affinity = Some(cpus.to_owned());
            let read = ProxmoxConfig { affinity, is_memory_bound, ..ProxmoxConfig::default() };
            let found = config(&host_of(topology), vm, &Ok(read));
            assert_eq!(found[0].health, health, "{found:?}");
            assert_eq!(found[0].mend.is_some(), health == Health::Costs, "{found:?}");
        }
        let read = ProxmoxConfig { affinity: Some("12-19".to_owned()), ..ProxmoxConfig::default() };
        assert!(config(&host_of(&two), vm, &Ok(read))[0].reason.contains("memory on node 1"));
    }

    #[test]
    fn what_proxmox_does_to_the_same_cpus_is_named() {
        let vm = &"100".parse().expect("a name");
        let of = |affinity: Option<&str>, cpulimit: Option<&str>| {
            let [affinity, cpulimit] = [affinity, cpulimit].map(|one| one.map(str::to_owned));
            let read = ProxmoxConfig { affinity, cpulimit, ..ProxmoxConfig::default() };
            config(&host_of(&machine(2)), vm, &Ok(read))
        };
        let both = of(Some("0-5"), Some("2"));
        let mends: Vec<_> = both.iter().filter_map(|one| one.mend.as_deref()).collect();
        assert_eq!(mends, ["qm set 100 --delete affinity", "qm set 100 --delete cpulimit"]);
        let unread = config(&host_of(&machine(2)), vm, &Err("it is not there".to_owned()));
        for none in [of(None, None), unread] {
            assert!(none.len() == 1 && none[0].health == Health::Fine, "{none:?}");
        }
    }

    #[test]
    fn only_proxmox_needs_the_socket_that_is_visited() {
        let guest = guest(2, 2, 1);
        assert!(advice(2, &guest, None).iter().all(|one| one.check != "channel"));
        assert_eq!(found(&advice(2, &guest, Some(Asked::Alone)), "channel").health, Health::Fine);
        let visits = advice(2, &guest, Some(Asked::Visits));
        let mend = found(&visits, "channel").mend.as_deref().expect("a line");
        assert!(mend.contains("/run/qemu-server/100.qmpin,server=on"), "{mend}");
    }

    #[test]
    fn what_the_host_lacks_is_named_with_its_reason() {
        let topology = machine(2);
        let process = ProcessKey { pid: Pid(7), start: StartTicks(1) };
        let deaf = [Irqbalance { process, banned: Err("it is stopped".to_owned()) }];
        let host = HostFacts {
            topology: &topology,
            partition: Err("there is no cgroup v2 tree".to_owned()),
            irqbalances: &deaf,
            throttling: Throttling::Off,
        };
        let all = advise(&host, None);
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|one| one.health == Health::Costs), "{all:?}");
        assert!(found(&all, "partition").reason.contains("cgroup v2"));
        let irqbalance = found(&all, "irqbalance");
        assert!(irqbalance.reason.contains("process 7 cannot be configured: it is stopped"));
        assert_eq!(irqbalance.mend.as_deref(), Some("systemctl restart irqbalance"));
        assert!(
            found(&all, "rt-throttling")
                .mend
                .as_deref()
                .is_some_and(|mend| mend.contains("950000"))
        );
    }
}
