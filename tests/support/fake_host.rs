//! A host made from a shape: its sysfs tree in a folder, for `--sysroot`, and the [`Topology`] that
//! reading it must give, for tests that need no files.
//!
//! ```text
//! Shape { nodes: [ NodeShape { llcs: [ LlcShape { cores: [6 × 2 threads] } ] } ], numbering, … }
//!    └─ build() ─→ FakeHost ─┬─ write(dir)   the files the kernel would show
//!                            └─ topology()   what they mean
//! ```
//!
//! Machines with a name are in [`super::hosts`].

use std::fs;
use std::io;
use std::path::Path;

use qmpin::cpuset::CpuSet;
use qmpin::ids::{CoreId, CpuId, LlcId, NodeId};
use qmpin::topology::{Core, CoreKind, Cpu, Llc, Node, Topology};

/// Some cores that are alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    pub(crate) count: usize,
    pub(crate) threads: usize,
    pub(crate) kind: Option<CoreKind>,
}

/// The cores below one last-level cache.
#[derive(Clone, Debug)]
pub(crate) struct LlcShape {
    pub(crate) size_kib: u64,
    pub(crate) cores: Vec<Cores>,
}

/// A NUMA node. Without LLC groups it is a node without CPUs.
#[derive(Clone, Debug)]
pub(crate) struct NodeShape {
    pub(crate) package: u32,
    pub(crate) memory_mib: u64,
    pub(crate) llcs: Vec<LlcShape>,
}

/// How the firmware numbers the threads of the cores.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Numbering {
    /// 0,1 2,3: core by core.
    SiblingsAdjacent,
    /// 0,12 1,13: all first threads, then all second ones.
    SiblingsLast,
    /// The same, taking a core of each package in turn.
    Interleaved,
}

/// Which caches the kernel describes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Caches {
    /// Private L1 and L2, and an L3 for each LLC group.
    L3,
    /// Private L1, and an L2 for each LLC group.
    L2,
    /// None at all.
    None,
}

/// A machine in a few words.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) nodes: Vec<NodeShape>,
    pub(crate) numbering: Numbering,
    /// The number of the first CPU.
    pub(crate) first_cpu: usize,
    /// The step from one CPU number to the next: 2 leaves a hole after each.
    pub(crate) cpu_step: usize,
    /// The step from one node number to the next.
    pub(crate) node_step: u32,
    pub(crate) caches: Caches,
    /// Whether there is a `node` folder, and `die_*` files.
    pub(crate) numa: bool,
    pub(crate) dies: bool,
    /// Arm tells kinds of cores by `cpu_capacity`, Intel by PMUs.
    pub(crate) arm: bool,
}

/// One CPU of a fake host. Its core and LLC are any numbers that its mates have too.
#[derive(Clone, Debug)]
pub(crate) struct FakeCpu {
    pub(crate) id: usize,
    pub(crate) online: bool,
    pub(crate) package: u32,
    pub(crate) node: u32,
    pub(crate) llc: usize,
    pub(crate) core: usize,
    pub(crate) kind: Option<CoreKind>,
}

/// A machine, CPU by CPU.
#[derive(Clone, Debug)]
pub(crate) struct FakeHost {
    pub(crate) cpus: Vec<FakeCpu>,
    nodes: Vec<(u32, NodeShape)>,
    llc_sizes_kib: Vec<u64>,
    shape: Shape,
}

/// `count` cores with that many threads, of no special kind.
pub(crate) fn llc(size_mib: u64, count: usize, threads: usize) -> LlcShape {
    LlcShape { size_kib: size_mib << 10, cores: vec![Cores { count, threads, kind: None }] }
}

pub(crate) fn node(package: u32, memory_gib: u64, llcs: Vec<LlcShape>) -> NodeShape {
    NodeShape { package, memory_mib: memory_gib << 10, llcs }
}

impl Shape {
    pub(crate) fn new(nodes: Vec<NodeShape>, numbering: Numbering) -> Shape {
        Shape {
            nodes,
            numbering,
            first_cpu: 0,
            cpu_step: 1,
            node_step: 1,
            caches: Caches::L3,
            numa: true,
            dies: true,
            arm: false,
        }
    }

    pub(crate) fn build(self) -> FakeHost {
        let mut cores: Vec<(usize, FakeCpu)> = Vec::new();
        let mut llc_sizes_kib = Vec::new();
        let nodes: Vec<(u32, NodeShape)> =
            (0..).step_by(self.node_step as usize).zip(self.nodes.iter().cloned()).collect();
        for (number, node) in &nodes {
            for shape in &node.llcs {
                for some in &shape.cores {
                    for _ in 0..some.count {
                        let cpu = FakeCpu {
                            id: 0,
                            online: true,
                            package: node.package,
                            node: *number,
                            llc: llc_sizes_kib.len(),
                            core: cores.len(),
                            kind: some.kind,
                        };
                        cores.push((some.threads, cpu));
                    }
                }
                llc_sizes_kib.push(shape.size_kib);
            }
        }
        let mut cpus: Vec<(usize, FakeCpu)> = Vec::new();
        for (threads, cpu) in &cores {
            cpus.extend((0..*threads).map(|thread| (thread, cpu.clone())));
        }
        let place = |cpu: &FakeCpu| {
            let alike = |other: &&(usize, FakeCpu)| other.1.package == cpu.package;
            cores.iter().filter(alike).position(|(_, other)| other.core == cpu.core)
        };
        match self.numbering {
            Numbering::SiblingsAdjacent => {}
            Numbering::SiblingsLast => cpus.sort_by_key(|(thread, cpu)| (*thread, cpu.core)),
            Numbering::Interleaved => {
                cpus.sort_by_key(|(thread, cpu)| (*thread, place(cpu), cpu.package));
            }
        }
        let numbered = cpus
            .into_iter()
            .enumerate()
            .map(|(at, (_, cpu))| FakeCpu { id: self.first_cpu + at * self.cpu_step, ..cpu });
        FakeHost { cpus: numbered.collect(), nodes, llc_sizes_kib, shape: self }
    }
}

impl FakeHost {
    /// The same machine with some CPUs offline.
    pub(crate) fn with_offline(mut self, ids: &[usize]) -> FakeHost {
        for cpu in &mut self.cpus {
            cpu.online &= !ids.contains(&cpu.id);
        }
        self
    }

    /// The same machine with one LLC per package, whatever its nodes: sub-NUMA clustering.
    pub(crate) fn with_one_llc_per_package(mut self) -> FakeHost {
        for cpu in &mut self.cpus {
            cpu.llc = cpu.package as usize;
        }
        self
    }

    /// The CPUs for which `pick` holds.
    pub(crate) fn set(&self, pick: impl Fn(&FakeCpu) -> bool) -> CpuSet {
        let picked = self.cpus.iter().filter(|cpu| pick(cpu));
        picked.filter_map(|cpu| CpuId::from_index(cpu.id)).collect()
    }

    fn online(&self, pick: impl Fn(&FakeCpu) -> bool) -> CpuSet {
        self.set(|cpu| cpu.online && pick(cpu))
    }

    /// 10 to itself, 12 within a package, 32 beyond.
    fn distances(&self, from: &(u32, NodeShape)) -> Vec<u32> {
        let distance = |to: &(u32, NodeShape)| match to {
            (number, _) if *number == from.0 => 10,
            (_, shape) if shape.package == from.1.package => 12,
            _ => 32,
        };
        self.nodes.iter().map(distance).collect()
    }

    /// The disjoint sets of online CPUs that have the same key, by first CPU.
    fn groups(&self, key: impl Fn(&FakeCpu) -> usize) -> Vec<(usize, CpuSet)> {
        let mut groups: Vec<(usize, CpuSet)> = Vec::new();
        let mut by_id: Vec<&FakeCpu> = self.cpus.iter().filter(|cpu| cpu.online).collect();
        by_id.sort_by_key(|cpu| cpu.id);
        for cpu in by_id {
            let key_here = key(cpu);
            if !groups.iter().any(|(known, _)| *known == key_here) {
                groups.push((key_here, self.online(|other| key(other) == key_here)));
            }
        }
        groups
    }

    /// What reading the tree must give, apart from the reasons in `unknown`.
    pub(crate) fn topology(&self) -> Topology {
        let cores = self.groups(|cpu| cpu.core);
        let llcs = match self.shape.caches {
            Caches::None => Vec::new(),
            _ => self.groups(|cpu| cpu.llc),
        };
        let dense = |groups: &[(usize, CpuSet)], key| {
            groups.iter().position(|(known, _)| *known == key).and_then(|at| u32::try_from(at).ok())
        };
        let mut kinds = self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.kind);
        let first_kind = kinds.next();
        // Intel names the kinds, so one of them alone is still a kind; capacities only differ.
        let kinds_known = !self.shape.arm || kinds.any(|kind| Some(kind) != first_kind);
        let describe = |cpu: &FakeCpu, id| Cpu {
            id,
            online: cpu.online,
            package: cpu.online.then_some(cpu.package),
            die: (cpu.online && self.shape.dies).then_some(0),
            node: (cpu.online && self.shape.numa).then_some(NodeId(cpu.node)),
            llc: if cpu.online { dense(&llcs, cpu.llc).map(LlcId) } else { None },
            core: if cpu.online { dense(&cores, cpu.core).map(CoreId) } else { None },
            siblings: if cpu.online {
                self.online(|other| other.core == cpu.core)
            } else {
                CpuSet::EMPTY
            },
            kind: cpu.kind.filter(|_| cpu.online && kinds_known),
        };
        let mut cpus: Vec<Cpu> = self
            .cpus
            .iter()
            .filter_map(|cpu| CpuId::from_index(cpu.id).map(|id| describe(cpu, id)))
            .collect();
        cpus.sort_by_key(|cpu| cpu.id);
        let core = |(id, (_, members)): (u32, &(usize, CpuSet))| {
            let first = cpus.iter().find(|cpu| members.contains(cpu.id))?;
            let Cpu { llc, node, package, die, kind, .. } = *first;
            Some(Core { id: CoreId(id), cpus: *members, llc, node, package, die, kind, rank: None })
        };
        Topology {
            cores: (0..).zip(&cores).filter_map(core).collect(),
            llcs: (0..)
                .zip(&llcs)
                .map(|(id, (key, cpus))| Llc {
                    llc: LlcId(id),
                    cpus: *cpus,
                    size_bytes: self.llc_sizes_kib.get(*key).map(|kib| kib << 10),
                })
                .collect(),
            nodes: self
                .nodes
                .iter()
                .filter(|_| self.shape.numa)
                .map(|node| Node {
                    node: NodeId(node.0),
                    cpus: self.online(|cpu| cpu.node == node.0),
                    memory_bytes: Some(node.1.memory_mib << 20),
                    distances: self.distances(node),
                })
                .collect(),
            cpus,
            unknown: Vec::new(),
        }
    }

    /// The files in a temporary folder that goes when the value does.
    pub(crate) fn tree(&self) -> io::Result<tempfile::TempDir> {
        let dir = empty_tree()?;
        self.write(dir.path())?;
        Ok(dir)
    }

    /// Writes the files that the kernel would show below `root`.
    pub(crate) fn write(&self, root: &Path) -> io::Result<()> {
        let put = |path: String, text: String| {
            let path = root.join("sys/devices").join(path);
            fs::create_dir_all(path.parent().unwrap_or(root))?;
            fs::write(path, text + "\n")
        };
        put("system/cpu/present".to_owned(), self.set(|_| true).to_string())?;
        put("system/cpu/possible".to_owned(), self.set(|_| true).to_string())?;
        put("system/cpu/online".to_owned(), self.online(|_| true).to_string())?;
        for cpu in &self.cpus {
            let of_cpu = format!("system/cpu/cpu{}", cpu.id);
            put(format!("{of_cpu}/online"), u8::from(cpu.online).to_string())?;
            if cpu.online {
                self.write_cpu(cpu, &|name, text| put(format!("{of_cpu}/{name}"), text))?;
            }
        }
        if self.shape.numa {
            let numbers: Vec<String> = self.nodes.iter().map(|node| node.0.to_string()).collect();
            put("system/node/online".to_owned(), numbers.join(","))?;
            for (number, shape) in &self.nodes {
                let of_node = format!("system/node/node{number}");
                let distances = self.distances(&(*number, shape.clone()));
                let distances: Vec<String> = distances.iter().map(ToString::to_string).collect();
                let kib = shape.memory_mib << 10;
                put(
                    format!("{of_node}/cpulist"),
                    self.online(|cpu| cpu.node == *number).to_string(),
                )?;
                put(format!("{of_node}/distance"), distances.join(" "))?;
                put(
                    format!("{of_node}/meminfo"),
                    format!(
                        "Node {number} MemTotal:       {kib} kB\nNode {number} MemFree: 1024 kB"
                    ),
                )?;
            }
        }
        if !self.shape.arm && self.cpus.iter().all(|cpu| cpu.kind.is_none()) {
            put("cpu/rdpmc".to_owned(), "1".to_owned())?;
        }
        let kinds = [("core", CoreKind::Performance), ("atom", CoreKind::Efficiency)];
        for (name, kind) in kinds {
            let cpus = self.online(|cpu| cpu.kind == Some(kind));
            if !self.shape.arm && self.cpus.iter().any(|cpu| cpu.kind.is_some()) {
                put(format!("cpu_{name}/cpus"), cpus.to_string())?;
            }
        }
        Ok(())
    }

    fn write_cpu(
        &self,
        cpu: &FakeCpu,
        put: &dyn Fn(String, String) -> io::Result<()>,
    ) -> io::Result<()> {
        let core = self.online(|other| other.core == cpu.core).to_string();
        let package = self.online(|other| other.package == cpu.package).to_string();
        let llc = self.online(|other| other.llc == cpu.llc).to_string();
        let topology = |name: &str, text: &str| put(format!("topology/{name}"), text.to_owned());
        topology("core_cpus_list", &core)?;
        topology("thread_siblings_list", &core)?;
        topology("core_id", &cpu.core.to_string())?;
        topology("package_cpus_list", &package)?;
        topology("core_siblings_list", &package)?;
        topology("physical_package_id", &cpu.package.to_string())?;
        if self.shape.dies {
            topology("die_cpus_list", &package)?;
            topology("die_id", "0")?;
        }
        let capacity = if cpu.kind == Some(CoreKind::Efficiency) { "512" } else { "1024" };
        put("cpu_capacity".to_owned(), capacity.to_owned())?;

        let kib = format!("{}K", self.llc_sizes_kib.get(cpu.llc).copied().unwrap_or_default());
        let private = |index, level, kind, size| (index, level, kind, size, &core);
        let mut caches = vec![
            private(0, "1", "Data", "32K"),
            private(1, "1", "Instruction", "32K"),
            private(2, "2", "Unified", "1024K"),
        ];
        match self.shape.caches {
            Caches::L3 => caches.push((3, "3", "Unified", &kib, &llc)),
            Caches::L2 => caches[2] = (2, "2", "Unified", &kib, &llc),
            Caches::None => caches.clear(),
        }
        for (index, level, kind, size, shared) in caches {
            let cache =
                |name: &str, text: &str| put(format!("cache/index{index}/{name}"), text.to_owned());
            cache("level", level)?;
            cache("type", kind)?;
            cache("size", size)?;
            cache("shared_cpu_list", shared)?;
        }
        Ok(())
    }
}

/// A temporary folder for a machine's files. They are a thousand and more, so memory is preferred to a
/// disk.
pub(crate) fn empty_tree() -> io::Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}
