//! All checks together: what they share is one line `args:`.

use super::fixture::{self, Tree, World};
use super::*;
use crate::discover::ProxmoxConfig;
use crate::guest::Guest;
use crate::ids::{Pid, StartTicks};
use crate::knobs::host::places::Irqbalance;
use crate::scheduling::Throttling;
use crate::threads::ProcessKey;

const SMP: &str = "-smp 8,sockets=1,cores=4,threads=2,maxcpus=8";
const QMP: &str = "-qmp unix:/run/qemu-server/100.qmpin,server=on,wait=off";

/// Six cores of two threads behind a cache, of which five are left to VMs; eight vCPUs share some.
fn world() -> World {
    World::new(1, 6, 2)
}

fn advice_on(
    tree: &Tree,
    guest: &Guest,
    asked: Option<Asked>,
    config: Option<Result<&str, String>>,
) -> Vec<Advice> {
    let world = world();
    let host = HostFacts {
        root: &tree.root(),
        topology: &world.topology,
        partition: Ok(()),
        irqbalances: &[],
        throttling: Throttling::On,
    };
    world.vm_of(guest, None, |vm| {
        vm.asked = asked;
        vm.config = config.map(|read| read.map(ProxmoxConfig::of_text));
        advise(&host, Some(vm))
    })
}

fn advice(
    guest: &Guest,
    asked: Option<Asked>,
    config: Option<Result<&str, String>>,
) -> Vec<Advice> {
    advice_on(&Tree::new(&[]), guest, asked, config)
}

fn found<'a>(advice: &'a [Advice], check: &str) -> &'a Advice {
    advice.iter().find(|one| one.check == check).expect("looked at")
}

fn flat() -> Guest {
    fixture::guest(1, 1, 8, 1)
}

fn paired() -> Guest {
    fixture::guest(1, 1, 4, 2)
}

#[test]
fn options_are_added_to_the_one_line_that_is_there() {
    let args = "-cpu host,+topoext -fw_cfg 'name=a b'";
    let config = format!("args: {args}\n");
    let all = advice(&flat(), Some(Asked::Visits), Some(Ok(&config)));
    for check in ["guest-cores", "channel"] {
        let line = format!("args: {args} {SMP} {QMP}");
        assert_eq!(found(&all, check).mend, Some(line), "one line for both");
    }
    let all = advice(&paired(), Some(Asked::Visits), Some(Ok(&config)));
    assert_eq!(found(&all, "channel").mend, Some(format!("args: {args} {QMP}")));
    // What is there already counts from the next start on.
    let right = format!("args: {QMP} {SMP}\n");
    let all = advice(&flat(), Some(Asked::Visits), Some(Ok(&right)));
    assert_eq!(found(&all, "channel").mend.as_deref(), Some("qm shutdown 100 && qm start 100"));
    let all = advice(&flat(), Some(Asked::Visits), Some(Ok("args: -k 'de\n")));
    assert_eq!(found(&all, "channel").mend, None);
    assert!(found(&all, "channel").reason.contains("a quote in it is not closed"));
    let unread = || Some(Err("it is not there".to_owned()));
    let all = advice(&paired(), Some(Asked::Visits), unread());
    assert!(found(&all, "channel").reason.contains("add this to its one line"));
}

#[test]
fn every_option_that_is_missing_is_in_the_same_line() {
    let amd = Tree::new(&[("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t: fpu\n")]);
    let config = "cpu: host\nargs: -k de -cpu host,l3-cache=off\n";
    let all = advice_on(&amd, &flat(), Some(Asked::Visits), Some(Ok(config)));
    let line = format!("args: -k de -cpu host {SMP} -global x86_64-cpu.topoext=on {QMP}");
    let with: Vec<&str> = all
        .iter()
        .filter(|one| one.mend.as_deref().is_some_and(|mend| mend.starts_with("args: ")))
        .map(|one| {
            assert_eq!(one.mend.as_deref(), Some(line.as_str()), "{one:?}");
            one.check
        })
        .collect();
    assert_eq!(with, ["guest-cores", "guest-caches", "cpu-flags", "channel"]);
    // A VM that is not Proxmox's has a command line.
    let plain = advice(&flat(), None, None);
    assert_eq!(found(&plain, "guest-cores").mend.as_deref(), Some(SMP));
    assert!(plain.iter().all(|one| one.check != "channel" && one.check != "storage"));
}

#[test]
fn with_cpu_hotplug_the_line_has_no_cores() {
    let config = "hotplug: disk,cpu\n";
    let all = advice(&flat(), Some(Asked::Visits), Some(Ok(config)));
    let cores = found(&all, "guest-cores");
    assert_eq!((cores.severity, &cores.mend), (Severity::Costs, &None));
    assert!(cores.reason.contains("qm set 100 --hotplug disk loses adding vCPUs"), "{cores:?}");
    assert_eq!(found(&all, "channel").mend, Some(format!("args: {QMP}")));
}

#[test]
fn only_proxmox_needs_the_socket_that_is_visited() {
    let none = || Some(Ok(""));
    let alone = advice(&paired(), Some(Asked::Alone), none());
    assert_eq!(found(&alone, "channel").severity, Severity::Fine);
    let visits = advice(&paired(), Some(Asked::Visits), none());
    let mend = found(&visits, "channel").mend.as_deref().expect("a line");
    assert!(mend.contains("/run/qemu-server/100.qmpin,server=on"), "{mend}");
}

#[test]
fn what_the_host_lacks_is_named_with_its_reason() {
    let world = World::flat(2);
    let process = ProcessKey { pid: Pid(7), start: StartTicks(1) };
    let deaf = [Irqbalance { process, banned: Err("it is stopped".to_owned()) }];
    let host = HostFacts {
        root: &Tree::new(&[]).root(),
        topology: &world.topology,
        partition: Err("there is no cgroup v2 tree".to_owned()),
        irqbalances: &deaf,
        throttling: Throttling::Off,
    };
    let all = advise(&host, None);
    for check in ["partition", "irqbalance", "rt-throttling"] {
        assert_eq!(found(&all, check).severity, Severity::Costs, "{all:?}");
    }
    assert!(found(&all, "partition").reason.contains("cgroup v2"));
    let irqbalance = found(&all, "irqbalance");
    assert!(irqbalance.reason.contains("process 7 cannot be configured: it is stopped"));
    assert_eq!(irqbalance.mend.as_deref(), Some("systemctl restart irqbalance"));
    let throttling = found(&all, "rt-throttling").mend.as_deref();
    assert!(throttling.is_some_and(|mend| mend.contains("950000")));
    // Nothing is read there, so nothing is good or bad.
    let others = all.iter().filter(|one| one.severity != Severity::Costs);
    for one in others {
        assert_eq!((one.severity, &one.mend), (Severity::Unknown, &None), "{one:?}");
    }
}
