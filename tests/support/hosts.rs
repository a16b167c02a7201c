//! Machines with a name, and any machine for properties.

use proptest::prelude::*;
use qmpin::topology::CoreKind;

use super::fake_host::{Caches, Cores, FakeHost, LlcShape, Numbering, Shape, llc, node};

/// 12 cores in two CCDs, siblings at +12, one node.
pub(crate) fn ryzen_5900x() -> FakeHost {
    Shape::new(vec![node(0, 64, vec![llc(32, 6, 2), llc(32, 6, 2)])], Numbering::SiblingsLast)
        .build()
}

/// 6 cores behind one cache, siblings at +6.
pub(crate) fn core_i7_8700() -> FakeHost {
    Shape::new(vec![node(0, 32, vec![llc(12, 6, 2)])], Numbering::SiblingsLast).build()
}

/// The same as the 5900X with the firmware's "L3 as NUMA": a node for each CCD.
pub(crate) fn ryzen_5900x_l3_as_numa() -> FakeHost {
    let nodes = vec![node(0, 32, vec![llc(32, 6, 2)]), node(0, 32, vec![llc(32, 6, 2)])];
    Shape::new(nodes, Numbering::SiblingsLast).build()
}

/// 12 cores in four CCXs of three, as Zen 2 had them.
pub(crate) fn ryzen_3900x() -> FakeHost {
    Shape::new(vec![node(0, 32, vec![llc(16, 3, 2); 4])], Numbering::SiblingsLast).build()
}

/// 16 cores in two CCDs, of which one has the large cache.
pub(crate) fn ryzen_7950x3d() -> FakeHost {
    Shape::new(vec![node(0, 64, vec![llc(96, 8, 2), llc(32, 8, 2)])], Numbering::SiblingsLast)
        .build()
}

/// 64 cores: one socket as four nodes, with four LLC groups of four cores each.
pub(crate) fn epyc_4n_16l() -> FakeHost {
    Shape::new(vec![node(0, 64, vec![llc(32, 4, 2); 4]); 4], Numbering::SiblingsLast).build()
}

/// 128 cores: two sockets with eight LLC groups of eight cores each.
pub(crate) fn epyc_2s_256() -> FakeHost {
    let nodes = vec![node(0, 384, vec![llc(32, 8, 2); 8]), node(1, 384, vec![llc(32, 8, 2); 8])];
    Shape::new(nodes, Numbering::SiblingsLast).build()
}

/// Two sockets of 10 cores whose CPUs are numbered in turn.
pub(crate) fn xeon_2s_interleaved() -> FakeHost {
    let nodes = vec![node(0, 94, vec![llc(25, 10, 2)]), node(1, 94, vec![llc(25, 10, 2)])];
    Shape::new(nodes, Numbering::Interleaved).build()
}

/// One socket of 16 cores cut into two nodes below one L3.
pub(crate) fn xeon_snc2() -> FakeHost {
    let nodes = vec![node(0, 64, vec![llc(30, 8, 2)]), node(0, 64, vec![llc(30, 8, 2)])];
    Shape::new(nodes, Numbering::SiblingsLast).build().with_one_llc_per_package()
}

/// 8 performance cores with siblings next to each other and 16 efficiency cores, one L3.
pub(crate) fn i9_13900k() -> FakeHost {
    let performance = Cores { count: 8, threads: 2, kind: Some(CoreKind::Performance) };
    let efficiency = Cores { count: 16, threads: 1, kind: Some(CoreKind::Efficiency) };
    let l3 = LlcShape { size_kib: 36 << 10, cores: vec![performance, efficiency] };
    Shape::new(vec![node(0, 64, vec![l3])], Numbering::SiblingsAdjacent).build()
}

/// An Arm board: two clusters of different cores, an L2 each, no L3, no dies.
pub(crate) fn arm_clusters() -> FakeHost {
    let cluster = |size_mib: u64, kind| LlcShape {
        size_kib: size_mib << 10,
        cores: vec![Cores { count: 4, threads: 1, kind: Some(kind) }],
    };
    let llcs = vec![cluster(1, CoreKind::Efficiency), cluster(2, CoreKind::Performance)];
    let shape = Shape::new(vec![node(0, 8, llcs)], Numbering::SiblingsAdjacent);
    Shape { caches: Caches::L2, dies: false, arm: true, ..shape }.build()
}

/// An Arm server of 80 cores that shows no cache larger than each core's own L2.
pub(crate) fn arm_private_l2() -> FakeHost {
    let shape = Shape::new(vec![node(0, 256, vec![llc(1, 1, 1); 80])], Numbering::SiblingsAdjacent);
    Shape { caches: Caches::L2, dies: false, arm: true, ..shape }.build()
}

/// The smallest machine.
pub(crate) fn one_core() -> FakeHost {
    Shape::new(vec![node(0, 2, vec![llc(16, 1, 1)])], Numbering::SiblingsAdjacent).build()
}

/// Two CPUs without SMT, as small virtual machines have them.
pub(crate) fn two_cpus() -> FakeHost {
    Shape::new(vec![node(0, 6, vec![llc(32, 2, 1)])], Numbering::SiblingsAdjacent).build()
}

/// A kernel without NUMA in a machine that describes no caches.
pub(crate) fn no_numa_no_caches() -> FakeHost {
    let shape = Shape::new(vec![node(0, 4, vec![llc(0, 4, 2)])], Numbering::SiblingsAdjacent);
    Shape { caches: Caches::None, numa: false, ..shape }.build()
}

/// Holes in the numbers of CPUs and nodes, CPUs offline, a node without CPUs and one without memory.
pub(crate) fn sparse() -> FakeHost {
    let nodes = vec![
        node(0, 16, vec![llc(16, 4, 2)]),
        node(1, 0, vec![llc(16, 4, 2)]),
        node(1, 128, Vec::new()),
    ];
    let shape = Shape::new(nodes, Numbering::SiblingsLast);
    Shape { first_cpu: 4, cpu_step: 3, node_step: 2, ..shape }.build().with_offline(&[7, 31])
}

/// All of them, each with its name.
pub(crate) fn all() -> Vec<(&'static str, FakeHost)> {
    vec![
        ("ryzen_5900x", ryzen_5900x()),
        ("core_i7_8700", core_i7_8700()),
        ("ryzen_5900x_l3_as_numa", ryzen_5900x_l3_as_numa()),
        ("ryzen_3900x", ryzen_3900x()),
        ("ryzen_7950x3d", ryzen_7950x3d()),
        ("epyc_4n_16l", epyc_4n_16l()),
        ("epyc_2s_256", epyc_2s_256()),
        ("xeon_2s_interleaved", xeon_2s_interleaved()),
        ("xeon_snc2", xeon_snc2()),
        ("i9_13900k", i9_13900k()),
        ("arm_clusters", arm_clusters()),
        ("arm_private_l2", arm_private_l2()),
        ("one_core", one_core()),
        ("two_cpus", two_cpus()),
        ("no_numa_no_caches", no_numa_no_caches()),
        ("sparse", sparse()),
    ]
}

/// Any small machine: up to two packages of two nodes, unequal LLC groups, holes, offline CPUs.
pub(crate) fn any_host() -> impl Strategy<Value = FakeHost> {
    any_shape().prop_map(|(shape, offline)| with_some_offline(shape.build(), &offline))
}

/// The same machine twice, all CPUs online, its CPUs numbered in two ways.
pub(crate) fn any_host_twice(
    numberings: &'static [Numbering],
) -> impl Strategy<Value = (FakeHost, FakeHost)> {
    let numbering = || (prop::sample::select(numberings), 0..4usize, 1..4usize);
    (any_shape(), numbering(), numbering()).prop_map(|((shape, _), one, other)| {
        let renumbered = |(numbering, first_cpu, cpu_step)| {
            Shape { numbering, first_cpu, cpu_step, ..shape.clone() }.build()
        };
        (renumbered(one), renumbered(other))
    })
}

fn with_some_offline(host: FakeHost, offline: &[prop::sample::Index]) -> FakeHost {
    let boot = host.cpus[0].id;
    let offline: Vec<usize> = offline
        .iter()
        .map(|at| host.cpus[at.index(host.cpus.len())].id)
        .filter(|id| *id != boot)
        .collect();
    host.with_offline(&offline)
}

fn any_shape() -> impl Strategy<Value = (Shape, Vec<prop::sample::Index>)> {
    let an_llc = (1..=64u64, 1..=5usize, 1..=4usize, any::<bool>());
    let a_node = (0..2u32, 0..=512u64, prop::collection::vec(an_llc, 0..=3));
    let numbering = prop_oneof![
        Just(Numbering::SiblingsAdjacent),
        Just(Numbering::SiblingsLast),
        Just(Numbering::Interleaved),
    ];
    let caches = prop_oneof![4 => Just(Caches::L3), 2 => Just(Caches::L2), 1 => Just(Caches::None)];
    (
        prop::collection::vec(a_node, 1..=4),
        (numbering, caches),
        (0..4usize, 1..4usize, 1..3u32),
        (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        prop::collection::vec(any::<prop::sample::Index>(), 0..4),
    )
        .prop_map(|(nodes, (numbering, caches), steps, flags, offline)| {
            let (numa, dies, arm, hybrid) = flags;
            let kind = |large| match (hybrid, large) {
                (false, _) => None,
                (true, true) => Some(CoreKind::Performance),
                (true, false) => Some(CoreKind::Efficiency),
            };
            let mut nodes: Vec<_> = nodes
                .into_iter()
                .map(|(package, memory_gib, llcs)| {
                    let llcs = llcs.into_iter().map(|(mib, count, threads, large)| LlcShape {
                        size_kib: mib << 10,
                        cores: vec![Cores { count, threads, kind: kind(large) }],
                    });
                    node(package, memory_gib, llcs.collect())
                })
                .collect();
            // One core of each kind at least, and so a machine that has a CPU to boot from.
            for large in [true, false] {
                let cores = vec![Cores { count: 1, threads: 1, kind: kind(large) }];
                nodes[0].llcs.push(LlcShape { size_kib: 512, cores });
            }
            let shape = Shape::new(nodes, numbering);
            let (first_cpu, cpu_step, node_step) = steps;
            let shape = Shape { first_cpu, cpu_step, node_step, caches, numa, dies, arm, ..shape };
            (shape, offline)
        })
}
