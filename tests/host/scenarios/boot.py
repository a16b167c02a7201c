"""The host is the shape that was asked for, with systemd on a pure cgroup v2 tree and nothing failed."""

import cpulist
import lscpu


def run(host):
    shape = host.shape
    cpus = lscpu.read()
    assert len(cpus) == shape["cpus"], f"{len(cpus)} CPUs, not {shape['cpus']}"
    assert {cpu.socket for cpu in cpus} == set(range(shape["sockets"]))

    cores = lscpu.groups(cpus, "core")
    assert all(len(core) == shape["threads_per_core"] for core in cores), f"cores are {cores}"
    # Siblings are adjacent here, as QEMU numbers them.
    assert all(cpulist.parse(f"{min(core)}-{max(core)}") == core for core in cores), f"cores are {cores}"

    llcs = [cpulist.write(llc) for llc in lscpu.groups(cpus, "llc")]
    assert llcs == shape["llcs"], f"last-level caches are {llcs}"
    nodes = [cpulist.write(node) for node in lscpu.groups(cpus, "node")]
    assert nodes == (shape["nodes"] or [host.online()]), f"nodes are {nodes}"

    # A warning here was once the kernel's, of a topology that contradicts itself.
    assert host.read("/proc/sys/kernel/tainted") == "0", host.run("dmesg", "-l", "warn,err").stdout
    assert host.read("/sys/fs/cgroup/cgroup.controllers").split().count("cpuset") == 1, "no cpuset controller in cgroup v2"
    assert host.read("/proc/1/comm") == "systemd"
    state = host.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
    failed = host.run("systemctl", "--failed", "--plain", "--no-legend").stdout.strip()
    assert state == "running", f"systemd says {state}: {failed}"
    print(host.run("uname", "-r").stdout.strip(), "systemd", host.run("systemctl", "--version").stdout.split()[1])
