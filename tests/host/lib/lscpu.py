"""What lscpu says of this host: the reference that qmpin's own topology is checked against."""

import subprocess
from typing import NamedTuple

COLUMNS = "CPU,CORE,SOCKET,NODE,CACHE"


class Cpu(NamedTuple):
    cpu: int
    core: int
    socket: int
    node: int
    llc: int


def text(*options: str) -> str:
    """`lscpu -p=CPU,CORE,SOCKET,NODE,CACHE`; options as `--sysroot`, `DIR`."""
    command = ["lscpu", *options, f"-p={COLUMNS}"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def read(*options: str) -> list[Cpu]:
    cpus = []
    for line in text(*options).splitlines():
        if not line.startswith("#"):
            cpu, core, socket, node, caches = line.split(",", 4)
            # Caches are joined by colons, the last level at the end. An absent node is empty: there is but one.
            cpus.append(Cpu(int(cpu), int(core), int(socket), int(node or 0), int(caches.replace(",", ":").split(":")[-1])))
    return cpus


def groups(cpus: list[Cpu], what: str) -> list[set[int]]:
    """The CPUs of each core, socket, node or llc, in the order of their first CPU."""
    found: dict[int, set[int]] = {}
    for cpu in cpus:
        found.setdefault(getattr(cpu, what), set()).add(cpu.cpu)
    return sorted(found.values(), key=min)
