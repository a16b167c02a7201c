"""Shapes: machines as data, and the QEMU arguments that make one."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "shapes"

# A CPU with SVM, so that the guest has KVM, and with the topology that the shape asks for:
# - TCG has no TOPOEXT. Without it Linux finds the L3's sharing only if CPUID leaf 4 is not empty, and the dies only in leaf
#   0x1f; x86 CPUs of AMD have both with x-vendor-cpuid-only=off. (Otherwise the whole package is one last-level cache, and
#   where there are NUMA nodes the kernel warns and cuts it along them.)
# - level=0x20: out-of-range leaves are answered from the highest one, and QEMU 10 aborts when leaf 0x1f is that
#   ("encode_topo_cpuid1f: Assertion `count <= CPU_TOPOLOGY_LEVEL_SOCKET' failed").
# - -cx16: some kernels oops in SLUB under multi-threaded TCG with it.
CPU_MODEL = "EPYC-Rome,-cx16,x-vendor-cpuid-only=off,level=0x20"


@dataclass(frozen=True)
class Shape:
    name: str
    data: dict

    @staticmethod
    def load(name: str) -> "Shape":
        path = FOLDER / f"{name}.toml"
        if not path.exists():
            raise LookupError(f"no shape {name!r}; there are: {', '.join(names())}")
        return Shape(name, tomllib.loads(path.read_text()))

    @property
    def boot_limit_s(self) -> float:
        """How long a boot may take until the job begins; QTEST_BOOT_LIMIT_S overrides it for a very busy machine."""
        return float(os.environ.get("QTEST_BOOT_LIMIT_S") or self.data["boot_limit_s"])

    def qemu_args(self) -> list[str]:
        memory_mib = self.data["memory_mib"]
        args = ["-machine", "q35,smp-cache.0.cache=l3,smp-cache.0.topology=die"]
        args += ["-cpu", CPU_MODEL, "-m", f"{memory_mib}M", "-smp", self.data["smp"]]
        nodes = self.data["nodes"]
        for node, cpus in enumerate(nodes):
            args += ["-object", f"memory-backend-ram,id=m{node},size={memory_mib // len(nodes)}M"]
            args += ["-numa", f"node,nodeid={node},cpus={cpus},memdev=m{node}"]
        for a in range(len(nodes)):
            for b in range(a + 1, len(nodes)):
                args += ["-numa", f"dist,src={a},dst={b},val={self.data['node_distance']}"]
        for device in self.data["devices"]:
            args += ["-device", device]
        return args


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))
