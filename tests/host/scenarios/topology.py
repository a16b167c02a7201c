"""`qmpin topology` and `qmpin threads` say of this host what lscpu, lstopo, the kernel and QEMU say."""

import json
import xml.etree.ElementTree
from pathlib import Path

import cpulist
import lscpu
import threads

LIMIT_S = 180
NEEDS = ("kvm", "qmpin")
ORDER = ("vcpu", "iothread", "emulator", "worker", "vhost", "kernel")


def run(host):
    check_topology(host)
    last = host.shape["cpus"] - 1
    switch = Path(f"/sys/devices/system/cpu/cpu{last}/online")
    switch.write_text("0")
    try:
        check_topology(host)
    finally:
        switch.write_text("1")
    check_topology(host)
    with host.vm(100, **host.fitting(), disks=2) as vm:
        vm.wait_guest()
        check_threads(host, vm)
    with host.vm(100, cpus=2, disks=0, debug_threads=False) as vm:
        vm.wait_guest()
        check_threads(host, vm)


def check_topology(host):
    said = json.loads(host.run("qmpin", "topology", "--json").stdout)
    assert said["schema"] == "qmpin.topology/1"
    online = [cpu for cpu in said["cpus"] if cpu["online"]]
    assert cpulist.write(cpu["cpu"] for cpu in online) == host.online()
    assert [cpu["cpu"] for cpu in said["cpus"]] == list(range(host.shape["cpus"]))

    reference = lscpu.read()
    for ours, theirs in (("core", "core"), ("package", "socket"), ("node", "node"), ("llc", "llc")):
        groups = grouped(online, ours)
        assert groups == lscpu.groups(reference, theirs), f"{ours}: {groups}, lscpu: {lscpu.groups(reference, theirs)}"
    # Numbers of our own are dense, in the order of the first CPU.
    for ours in ("core", "llc"):
        numbers = [cpu[ours] for cpu in online]
        assert [number for at, number in enumerate(numbers) if number not in numbers[:at]] == list(range(max(numbers) + 1))
    cores = {cpu: core for core in lscpu.groups(reference, "core") for cpu in core}
    for cpu in online:
        assert cpulist.parse(cpu["siblings"]) == cores[cpu["cpu"]], cpu

    shown = lstopo(host)
    assert grouped(online, "core") == shown["Core"], shown["Core"]
    assert grouped(online, "package") == shown["Package"], shown["Package"]
    assert sets(said["llcs"]) == shown["L3Cache"] == grouped(online, "llc"), (said["llcs"], shown["L3Cache"])
    assert sets(said["nodes"]) == shown["NUMANode"] == grouped(online, "node"), (said["nodes"], shown["NUMANode"])
    assert [llc["size_bytes"] for llc in said["llcs"]] == shown["cache sizes"], (said["llcs"], shown["cache sizes"])
    distances = [
        [int(word) for word in host.read(f"/sys/devices/system/node/node{node['node']}/distance").split()]
        for node in said["nodes"]
    ]
    assert [node["distances"] for node in said["nodes"]] == distances, said["nodes"]


def grouped(cpus, what):
    found = {}
    for cpu in cpus:
        found.setdefault(cpu[what], set()).add(cpu["cpu"])
    return sorted(found.values(), key=min)


def sets(rows):
    return sorted((cpulist.parse(row["cpus"]) for row in rows), key=min)


def lstopo(host):
    """The CPUs of each core, package, L3 and node, in the order of their first CPU, and the sizes of the L3s."""
    text = host.run("lstopo-no-graphics", "--no-io", "--of", "xml", limit_s=LIMIT_S).stdout
    found = {"Core": [], "Package": [], "L3Cache": [], "NUMANode": []}
    sizes = []
    for one in xml.etree.ElementTree.fromstring(text).iter("object"):
        if one.get("type") in found:
            cpus = from_mask(one.get("cpuset"))
            found[one.get("type")].append(cpus)
            if one.get("type") == "L3Cache":
                sizes.append((min(cpus), int(one.get("cache_size"))))
    shown = {kind: sorted(groups, key=min) for kind, groups in found.items()}
    return {**shown, "cache sizes": [size for _, size in sorted(sizes)]}


def from_mask(text):
    """hwloc's masks: words of 32 bits, the highest first; an empty word is 0."""
    number = 0
    for word in text.split(","):
        number = number << 32 | int(word or "0", 16)
    return {cpu for cpu in range(number.bit_length()) if number >> cpu & 1}


def check_threads(host, vm):
    said = json.loads(host.run("qmpin", "threads", "100", "--json").stdout)
    assert (said["schema"], said["vm"], said["pid"]) == ("qmpin.threads/1", "100", vm.pid), said
    rows = said["threads"]
    roles, masks = vm.roles(), vm.masks()
    by_role = {role: {row["tid"]: row for row in rows if row["role"] == role} for role in ORDER}
    assert [row["role"] for row in rows] == sorted((row["role"] for row in rows), key=ORDER.index), rows

    assert {row["vcpu"]: tid for tid, row in by_role["vcpu"].items()} == roles.vcpus
    assert {row["iothread"]: tid for tid, row in by_role["iothread"].items()} == roles.iothreads
    slots = {cpu["cpu-index"]: cpu["props"] for cpu in vm.qmp("query-cpus-fast")}
    for row in by_role["vcpu"].values():
        props = slots[row["vcpu"]]
        want = {name: props.get(f"{name}-id") for name in ("socket", "die", "core", "thread", "node")}
        assert row["guest"] == want, (row, props)

    # Workers come and go: a thread that is in both is compared.
    inside = {tid: row for role in ORDER if role != "kernel" for tid, row in by_role[role].items()}
    for tid, mask in masks.items():
        if tid not in inside:
            missing = threads.read(vm.pid, tid)
            assert missing is None or missing.comm == "worker", f"{missing} is missing: {rows}"
            continue
        assert inside[tid]["allowed_cpus"] == mask, (inside[tid], mask)
        assert inside[tid]["last_cpu"] in cpulist.parse(mask), inside[tid]
        thread = threads.read(vm.pid, tid)
        assert thread is None or thread.comm == inside[tid]["comm"], (thread, inside[tid])
    assert vm.pid in by_role["emulator"]
    kernel = {thread.tid for thread in threads.of_host() if thread.kernel and thread.comm == f"kvm-pit/{vm.pid}"}
    assert kernel and kernel <= set(by_role["kernel"]), (kernel, by_role["kernel"])
