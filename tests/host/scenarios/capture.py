"""capture-host: what it captured says the same as the host itself, and names nothing that is unique to the machine.

Hands back hosts/SHAPE/ with the capture and what lscpu and lstopo say of the same host; `run --shape SHAPE --results tests
capture` puts them into the repository.
"""

import re
from pathlib import Path

import lscpu

LIMIT_S = 180


def run(host):
    folder = host.results / "hosts" / host.shape["name"]
    host.run("capture-host", "--entry", str(folder), limit_s=LIMIT_S)
    packed = folder / "sysroot.tsv"
    assert (folder / "lscpu-p.txt").read_text() == lscpu.text()
    assert "Core" in (folder / "lstopo.txt").read_text()

    unpacked, direct = Path("/tmp/unpacked"), Path("/tmp/direct")
    host.run("capture-host", "--unpack", str(packed), str(unpacked), limit_s=LIMIT_S)
    host.run("capture-host", str(direct), limit_s=LIMIT_S)
    host.run("diff", "-r", str(unpacked), str(direct), limit_s=LIMIT_S)
    for path in ("sys/devices/system/cpu/cpu1/topology/core_id", "sys/devices/system/node/node0/distance"):
        assert (unpacked / path).read_bytes() == Path("/", path).read_bytes(), path
    seen, host_says = lscpu.read("--sysroot", str(unpacked)), lscpu.read()
    assert seen == host_says, f"lscpu sees {seen} in the capture, {host_says} on the host"

    if host.lacks("qmpin") is None:
        there = host.run("qmpin", "topology", "--json", "--sysroot", str(unpacked)).stdout
        assert there == host.run("qmpin", "topology", "--json").stdout, f"qmpin sees in the capture: {there}"

    # The entry in the repository, for the tests on machines of every shape, says what this machine is today.
    kept = Path("/job/hosts", host.shape["name"], "sysroot.tsv")
    if kept.exists():
        differ = {path for path, content in topology_of(packed) ^ topology_of(kept)}
        assert not differ, f"tests/hosts/{host.shape['name']} is of another machine, capture it anew: {sorted(differ)}"

    text = packed.read_text()
    secret = re.search(r"\b(serial|ppin|microcode|uuid)\b", text, re.IGNORECASE)
    assert secret is None, f"in the capture: {secret}"
    mac = re.search(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", text)
    assert mac is None, f"in the capture, a MAC address: {mac}"
    print(f"  {len(text.splitlines())} files, {len(text)} bytes")


def topology_of(packed):
    """Lines that say how the machine is built, without memory, which kernels count differently, and frequencies."""
    wanted = re.compile(r"sys/devices/system/(cpu/cpu\d+/(topology|cache)/|node/node\d+/(cpulist|distance))")
    return {tuple(line.split("\t", 1)) for line in packed.read_text().splitlines() if wanted.match(line)}
