"""Where a VM's memory is decides where its vCPUs go: bound, also guest node by guest node and crosswise, or lying where the kernel
has put it. CPUs given by hand away from it are taken, with the numbers.
"""

import json

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)

NODES = [cpulist.parse("0-11"), cpulist.parse("12-23")]
# Seconds for the kernel to move a guest's memory, on an emulator.
MOVED_S = 60


def run(host):
    before = host.before()
    for on in (0, 1):
        with host.vm(100, cpus=4, extra=bound(64, [on])) as vm:
            vm.wait_guest()
            one_node(host, vm, on)
            if on == 0:
                by_hand(host, vm)
    for on in ([0, 1], [1, 0]):
        with host.vm(100, cpus=4, extra=bound(32, on)) as vm:
            vm.wait_guest()
            two_nodes(host, vm, on)
    with host.vm(100, cpus=4, memory_mib=256, extra=["-object", "memory-backend-ram,id=all,size=256M,prealloc=on", "-machine", "memory-backend=all"]) as vm:
        vm.wait_guest()
        where_it_lies(host, vm)
    state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/*/cpuset.mems", "sys/fs/cgroup/*/*/cpuset.mems"])


def bound(mib, on):
    """Guest node after guest node, as Proxmox configures `numaN: ...,hostnodes=N,policy=bind`."""
    args, each = [], 4 // len(on)
    for node, host_node in enumerate(on):
        args += ["-object", f"memory-backend-ram,id=ram-node{node},size={mib}M,host-nodes={host_node},policy=bind"]
        args += ["-numa", f"node,nodeid={node},cpus={node * each}-{node * each + each - 1},memdev=ram-node{node}"]
    return args


def one_node(host, vm, on):
    with qmpin.Attached(100, isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        assert all(cpulist.parse(row["cpus"]) <= NODES[on] for row in plan["vcpus"]), plan
        assert plan["memory"] == {"nodes": str(on), "bound": True, "local_mib": 64, "remote_mib": 0}, plan["memory"]
        assert finding(plan)["verdict"] == "met", plan
        verified = host.run("qmpin", "verify", "100").stdout
        assert "memory: 64 MiB of guest memory local, 0 MiB remote" in verified, verified
    assert attached.code == 0, attached.log()


def by_hand(host, vm):
    with qmpin.Attached(100, "--vcpus", "12-15", isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        assert plan["memory"] == {"nodes": "0", "bound": True, "local_mib": 0, "remote_mib": 64}, plan["memory"]
        said = finding(plan)
        assert said["verdict"] == "degraded" and "64 MiB remote" in said["reason"] and "given by hand" in said["reason"], said
        assert said["reason"] in attached.log(), attached.log()
        document = json.loads(host.run("qmpin", "verify", "100", "--json", check=False).stdout)
        assert said in document["findings"], document
        assert document["memory"] == plan["memory"], document
    assert attached.code == 0, attached.log()


def two_nodes(host, vm, on):
    with qmpin.Attached(100, isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        for row in plan["vcpus"]:
            assert cpulist.parse(row["cpus"]) <= NODES[on[row["vcpu"] // 2]], (on, plan)
        assert (plan["memory"]["local_mib"], plan["memory"]["remote_mib"]) == (64, 0), plan["memory"]
    assert attached.code == 0, attached.log()


def where_it_lies(host, vm):
    """Memory that is not bound, on one node and then on the other."""
    for on in (0, 1):
        host.run("systemctl", "set-property", "--runtime", vm.scope, f"AllowedMemoryNodes={on}")
        plan = lambda: json.loads(host.run("qmpin", "plan", "100", "--json").stdout)
        there = lambda: plan()["memory"] is not None and plan()["memory"]["local_mib"] > 200
        wait_until(there, MOVED_S, f"the memory to be on node {on}", lambda: str(plan()))
        found = plan()
        assert not found["memory"]["bound"] and found["memory"]["remote_mib"] < 40, found["memory"]
        assert all(cpulist.parse(row["cpus"]) <= NODES[on] for row in found["vcpus"]), found
    host.run("systemctl", "set-property", "--runtime", vm.scope, "AllowedMemoryNodes=")


def finding(plan):
    return next(row for row in plan["report"] if row["rule"] == "memory")
