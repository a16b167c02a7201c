"""CPUs that the kernel command line isolates: vCPUs are on them, helpers are not, and what does not fit on them is said."""

import json

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
            # What a service gets at boot is no promise to it.
            assert not any(row["rule"] == "promises" for row in plan["report"]), plan["report"]
        assert attached.code == 0, attached.log()
    with host.vm(101, cpus=12) as vm:
        vm.wait_guest()
        plan = json.loads(host.run("qmpin", "plan", "101", "--json").stdout)
        assert finding(plan)["verdict"] == "degraded" and "10 in all" in finding(plan)["reason"], plan
    state.check_same(before, state.capture())


def finding(plan):
    return next(row for row in plan["report"] if row["rule"] == "isolated-at-boot")
