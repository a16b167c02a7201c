"""Where a VM can have no partition, containers in Proxmox's `lxc` group, which systemd does not know, leave its CPUs too: also one
that has no others, and while another program rewrites its CPUs as pvestatd does.
"""

import contextlib
import os
import subprocess
from pathlib import Path

import cpulist
import qmpin
import state
import threads
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)

CGROUPS = Path("/sys/fs/cgroup")
LXC = CGROUPS / "lxc"
VCPUS = "12-19"
MINE = cpulist.parse(VCPUS)


def run(host):
    with host.vm(100, cpus=8) as vm, contextlib.ExitStack() as stack:
        vm.wait_guest()
        (CGROUPS / "cgroup.subtree_control").write_text("+cpuset")
        inside = stack.enter_context(container(105, "12-13"))
        partly = stack.enter_context(container(106, "11-12"))
        free = stack.enter_context(container(107, ""))
        if (CGROUPS / "qemu.slice/cpuset.cpus.exclusive").exists() or (LXC / "cpuset.cpus.exclusive").exists():
            stranger = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(stranger.kill)
            (vm.cgroup / "cgroup.procs").write_text(str(stranger.pid))
        for limit in ("", "0-15"):
            (LXC / "cpuset.cpus").write_text(f"{limit or host.online()}\n")
            alone = state.capture()
            with qmpin.Attached(100, "--vcpus", VCPUS, isolation="exclusive", check_interval_s=1) as attached:
                attached.settle(vm)

                def kept_off():
                    for one in (inside, partly, free):
                        on = cpulist.parse(threads.allowed(one.pid))
                        assert on and not on & MINE, f"{one.args} may run on {on}"

                wait_for(kept_off, attached)
                assert cpulist.parse(threads.allowed(partly.pid)) == {11}, threads.allowed(partly.pid)
                # pvestatd hands out CPUs again and again.
                for cpus in ("14-15", "18", "12-13"):
                    (LXC / "105/cpuset.cpus").write_text(cpus)
                    kept_off()
                verified = host.run("qmpin", "verify", "100", check=False)
                for one in (inside, partly, free):
                    assert f"({one.pid})" not in verified.stdout, verified.stdout
                assert "cpuset.cpus is" not in verified.stdout, verified.stdout
                # Another program lifts the limit of all containers.
                (LXC / "cpuset.cpus").write_text(host.online())
                wait_for(kept_off, attached)
            assert attached.code == 0, attached.log()
            # What was written last is what comes back.
            assert host.read(LXC / "cpuset.cpus") == host.online(), host.read(LXC / "cpuset.cpus")
            (LXC / "cpuset.cpus").write_text(f"{limit or host.online()}\n")
            # systemd leaves a limit that is lifted in the cgroup.
            state.check_same(alone, state.capture(), ignore=["sys/fs/cgroup/*/cpuset.cpus", "sys/fs/cgroup/*/*/cpuset.cpus"])

        # Killed, and restored from the journal alone.
        with qmpin.Attached(100, "--vcpus", VCPUS, isolation="exclusive", check_interval_s=1) as attached:
            attached.settle(vm)
            wait_for(lambda: kept_off(), attached)
            attached.stop(9)
        host.run("qmpin", "detach", "100")
        assert host.read(LXC / "cpuset.cpus") == "0-15", host.read(LXC / "cpuset.cpus")
        host.note(f"Linux {os.uname().release}")
    assert not os.listdir("/run/qmpin"), os.listdir("/run/qmpin")


@contextlib.contextmanager
def container(number, cpus):
    """A process in lxc/NUMBER, with these CPUs."""
    group = LXC / str(number)
    group.mkdir(parents=True)
    (LXC / "cgroup.subtree_control").write_text("+cpuset")
    if cpus:
        (group / "cpuset.cpus").write_text(cpus)
    with subprocess.Popen(["sleep", "600"]) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            wait_until(lambda: not (group / "cgroup.procs").read_text(), 20, f"{group} to be empty")
            group.rmdir()
            with contextlib.suppress(OSError):
                LXC.rmdir()


def wait_for(check, attached):
    """Waits until a check passes; its last words are the error."""

    def passes():
        try:
            check()
        except AssertionError as error:
            passes.error = error
            return False
        return True

    wait_until(passes, 60, "the containers to be elsewhere", lambda: f"{passes.error}; {attached.log()}")
