"""Cpulists, the kernel's way to write a set of CPUs: `0-3,8`."""

from collections.abc import Iterable


def parse(text: str) -> set[int]:
    """The CPUs of a cpulist. Raises ValueError on what the kernel would not write."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"cpulist {text!r}: {part!r} runs backwards")
        cpus.update(range(low, high + 1))
    return cpus


def write(cpus: Iterable[int]) -> str:
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def hex_mask(cpus: Iterable[int]) -> str:
    """The kernel's other way to write a set of CPUs: hex words of 32 bits, `ff,00f00000`."""
    mask = sum(1 << cpu for cpu in set(cpus))
    words = []
    while mask or not words:
        words.insert(0, f"{mask & 0xFFFFFFFF:08x}")
        mask >>= 32
    return ",".join(words)
