"""What the firmware of a machine tells of its CPUs' power, as an ACPI table beside those of QEMU, which tells nothing of it.

Linux then has cpufreq (the module acpi-cpufreq) and cpuidle (`POLL` and `C1`, by `hlt`). Nothing comes of a frequency that
is asked for: the port behind it has no device.
"""

import subprocess
from pathlib import Path

from . import cache

# Not QEMU's (`info mtree -f`): what is written there goes nowhere.
PORT = 0x0A80
# MHz, mW.
STATES = [(3700, 105000), (2800, 70000), (2200, 45000)]
LATENCY_US = 10
# QEMU's own name of a CPU's device (`hw/acpi/cpu.c`).
DEVICE = "\\_SB.CPUS.C{:03X}"


def power_table(cpus: int) -> Path:
    """The table for so many CPUs, compiled (ACPI 6.5, 8.4.5: performance states; 8.4.1: processor power states)."""
    source = _source(cpus)
    key = cache.key(source)
    return cache.built(f"firmware-{cpus}-{key}.aml", lambda path: _compile(source, path))


def _source(cpus: int) -> str:
    register = f"ResourceTemplate () {{ Register (SystemIO, 8, 0, 0x{PORT:04X}) }}"
    states = ", ".join(
        f"Package () {{ {mhz}, {mw}, {LATENCY_US}, {LATENCY_US}, {at}, {at} }}" for at, (mhz, mw) in enumerate(STATES)
    )
    c1 = "Package () { ResourceTemplate () { Register (FFixedHW, 0, 0, 0) }, 1, 1, 1000 }"
    scopes = []
    for cpu in range(cpus):
        device = DEVICE.format(cpu)
        scopes.append(
            f"External ({device}, DeviceObj)\n"
            f"Scope ({device}) {{\n"
            f"Name (_PCT, Package () {{ {register}, {register} }})\n"
            f"Name (_PSS, Package () {{ {states} }})\n"
            "Name (_PPC, 0)\n"
            f"Name (_CST, Package () {{ 1, {c1} }})\n"
            "}\n"
        )
    return 'DefinitionBlock ("", "SSDT", 2, "QMPIN", "POWER", 1) {\n' + "".join(scopes) + "}\n"


def _compile(source: str, target: Path) -> None:
    text = target.with_suffix(".dsl")
    text.write_text(source)
    done = subprocess.run(
        ["iasl", "-p", str(target.with_suffix("")), str(text)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"iasl: {done.stdout}")
    target.with_suffix(".aml").rename(target)
