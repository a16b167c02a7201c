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
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / "sysroot.tsv"
    host.run("capture-host", "--tsv", str(packed), limit_s=LIMIT_S)
    (folder / "lscpu-p.txt").write_text(lscpu.text())
    lstopo = host.run("lstopo-no-graphics", "--no-io", "--no-factorize", "--of", "console", limit_s=LIMIT_S)
    (folder / "lstopo.txt").write_text(lstopo.stdout)

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

    text = packed.read_text()
    secret = re.search(r"\b(serial|ppin|microcode|uuid)\b", text, re.IGNORECASE)
    assert secret is None, f"in the capture: {secret}"
    mac = re.search(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", text)
    assert mac is None, f"in the capture, a MAC address: {mac}"
    print(f"  {len(text.splitlines())} files, {len(text)} bytes")
