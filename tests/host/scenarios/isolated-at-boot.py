"""CPUs that the kernel command line isolates: vCPUs are on them, helpers are not, and what does not fit on them is said. No cpuset
is made, because the kernel would then let every process run on them.
"""

import subprocess

import cpulist
import qmpin
import state

LIMIT_S = 300
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x-isolcpus",)

ISOLATED = cpulist.parse("2-11")


def run(host):
    before = host.before()
    with host.vm(100, cpus=8) as vm:
        vm.wait_guest()
        with qmpin.Attached(100, isolation="exclusive") as attached:
            attached.settle(vm)
            plan = attached.plan()
            assert cpulist.parse(plan["exclusive"]) <= ISOLATED, plan
            helpers = cpulist.parse(plan["emulator"]) | {cpu for row in plan["iothreads"] for cpu in cpulist.parse(row["cpus"])}
            assert not helpers & ISOLATED, plan
            assert finding(plan)["verdict"] == "met", plan
            apart = finding(plan, "partition")
            assert apart["verdict"] == "met" and "since boot" in apart["reason"], apart
            others_keep_off()
            # What a service gets at boot is no promise to it.
            assert not any(row["rule"] == "promises" for row in plan["report"]), plan["report"]
        assert attached.code == 0, attached.log()
    with host.vm(101, cpus=12) as vm:
        vm.wait_guest()
        with qmpin.Attached(101, isolation="exclusive") as attached:
            attached.settle(vm)
            plan = attached.plan()
            assert finding(plan)["verdict"] == "degraded" and "10 in all" in finding(plan)["reason"], plan
            apart = finding(plan, "partition")
            assert apart["verdict"] == "degraded" and "isolcpus=" in apart["reason"], apart
            others_keep_off()
        assert attached.code == 0, attached.log()
    state.check_same(before, state.capture())


def others_keep_off():
    """A process that is started now gets the mask that the kernel gave the first one at boot."""
    mask = subprocess.run(["cat", "/proc/self/status"], check=True, capture_output=True, text=True).stdout
    mask = next(row.split()[1] for row in mask.splitlines() if row.startswith("Cpus_allowed_list:"))
    assert not cpulist.parse(mask) & ISOLATED, mask


def finding(plan, rule="isolated-at-boot"):
    return next(row for row in plan["report"] if row["rule"] == rule)
