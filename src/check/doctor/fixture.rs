//! Machines, guests and trees of files for the tests of the checks.

use std::collections::BTreeMap;
use std::fs;

use super::facts::{Planner, VmFacts};
use crate::cpuset::CpuSet;
use crate::discover::ProxmoxConfig;
use crate::guest::{Guest, GuestVcpu};
use crate::ids::{CoreId, CpuId, LlcId, NodeId, Pid, VcpuIndex};
use crate::plan::{Machine, Neighbours, Plan, Request, Stay, plan};
use crate::policy::Policy;
use crate::promises::Surroundings;
use crate::sysroot::SysRoot;
use crate::topology::{Core, Cpu, Llc, Node, Topology};

/// A folder that looks like a machine.
pub(super) struct Tree(tempfile::TempDir);

impl Tree {
    pub(super) fn new(files: &[(&str, &str)]) -> Tree {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        Tree(dir)
    }

    pub(super) fn root(&self) -> SysRoot {
        SysRoot::at(self.0.path())
    }
}

pub(super) fn node(node: u32, cpus: &str, memory_bytes: Option<u64>) -> Node {
    let cpus = cpus.parse().expect("a cpulist");
    Node { node: NodeId(node), cpus, memory_bytes, distances: Vec::new() }
}

/// A guest with that shape.
pub(super) fn guest(sockets: u32, dies: u32, cores: u32, threads: u32) -> Guest {
    let vcpu = |index: u32| GuestVcpu {
        index: VcpuIndex(index),
        node: None,
        socket: Some(index / (dies * cores * threads)),
        die: (dies > 1).then_some(index / (cores * threads) % dies),
        cluster: None,
        core: Some(index / threads % cores),
        thread: Some(index % threads),
    };
    Guest { vcpus: (0..sockets * dies * cores * threads).map(vcpu).collect(), ..Guest::default() }
}

/// A machine on which VM 100 is planned. The planner leaves its first core to the host.
pub(super) struct World {
    pub(super) topology: Topology,
}

impl World {
    /// So many caches, each with so many cores of so many threads; siblings have numbers side by side.
    pub(super) fn new(caches: usize, cores: usize, threads: usize) -> World {
        let mut topology = Topology::default();
        for cache in 0..caches {
            let llc = Some(LlcId(u32::try_from(cache).expect("few")));
            let mut behind = CpuSet::EMPTY;
            for core in cache * cores..(cache + 1) * cores {
                let id = CoreId(u32::try_from(core).expect("few"));
                let cpus: CpuSet =
                    (core * threads..(core + 1) * threads).filter_map(CpuId::from_index).collect();
                for cpu in cpus.iter() {
                    topology.cpus.push(Cpu {
                        id: cpu,
                        online: true,
                        package: Some(0),
                        die: Some(0),
                        node: Some(NodeId(0)),
                        llc,
                        core: Some(id),
                        siblings: cpus,
                        kind: None,
                    });
                }
                behind |= cpus;
                let (node, package, die) = (Some(NodeId(0)), Some(0), Some(0));
                topology.cores.push(Core {
                    id,
                    cpus,
                    llc,
                    node,
                    package,
                    die,
                    kind: None,
                    rank: None,
                });
            }
            let size_bytes = Some(32 << 20);
            topology.llcs.push(Llc {
                llc: LlcId(u32::try_from(cache).expect("few")),
                cpus: behind,
                size_bytes,
            });
        }
        let cpus = topology.online();
        topology.nodes.push(Node {
            node: NodeId(0),
            cpus,
            memory_bytes: Some(64 << 30),
            distances: vec![10],
        });
        World { topology }
    }

    /// One cache, and cores without siblings.
    pub(super) fn flat(cores: usize) -> World {
        World::new(1, cores + 1, 1)
    }

    /// The same with a node of 32 GiB for each cache.
    pub(super) fn with_nodes(mut self) -> World {
        let of = |llc: &Llc| {
            let far = |other: &Llc| if other.llc == llc.llc { 10 } else { 20 };
            Node {
                node: NodeId(llc.llc.0),
                cpus: llc.cpus,
                memory_bytes: Some(32 << 30),
                distances: self.topology.llcs.iter().map(far).collect(),
            }
        };
        let nodes = self.topology.llcs.iter().map(of).collect();
        self.topology.nodes = nodes;
        for cpu in &mut self.topology.cpus {
            cpu.node = cpu.llc.map(|llc| NodeId(llc.0));
        }
        for core in &mut self.topology.cores {
            core.node = core.llc.map(|llc| NodeId(llc.0));
        }
        self
    }

    pub(super) fn plan(&self, guest: &Guest, policy: &Policy) -> Result<Plan, String> {
        let request = Request {
            vm: &"100".parse().expect("a name"),
            machine: &Machine::of(&self.topology),
            guest,
            policy,
            neighbours: &Neighbours::default(),
            surroundings: &Surroundings::default(),
            held: &BTreeMap::new(),
            stay: Stay::Always,
        };
        plan(&request).map_err(|error| error.to_string())
    }

    /// VM 100, process 500, with so many vCPUs on as many cores. Without a configuration it is not Proxmox's.
    pub(super) fn vm<T>(
        &self,
        vcpus: u32,
        config: Option<&str>,
        act: impl FnOnce(&mut VmFacts<'_>) -> T,
    ) -> T {
        self.vm_of(&guest(1, 1, vcpus, 1), config, act)
    }

    /// The same with another guest.
    pub(super) fn vm_of<T>(
        &self,
        guest: &Guest,
        config: Option<&str>,
        act: impl FnOnce(&mut VmFacts<'_>) -> T,
    ) -> T {
        let plans = |guest: &Guest| self.plan(guest, &Policy::default());
        self.vm_planned_by(&plans, guest, config, act)
    }

    /// The same where other guests are planned in another way.
    pub(super) fn vm_planned_by<T>(
        &self,
        plans: &Planner<'_>,
        guest: &Guest,
        config: Option<&str>,
        act: impl FnOnce(&mut VmFacts<'_>) -> T,
    ) -> T {
        act(&mut VmFacts {
            vm: &"100".parse().expect("a name"),
            process: Pid(500),
            guest: guest.clone(),
            asked: None,
            config: config.map(|text| Ok(ProxmoxConfig::of_text(text))),
            plan: self.plan(guest, &Policy::default()),
            plans,
            huge: None,
        })
    }
}
