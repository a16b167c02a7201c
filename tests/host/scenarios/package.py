"""The administrator's road, by the README's own commands: the package, one line of policy, the path unit, a VM's whole life at the
default level, an upgrade, and `apt purge` with two VMs attached. Proxmox's stand-in asks all the while."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import cpulist
import package
import qmpin
import state
import threads
from pve_poller import PvePoller
from vm import Vm
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin", "package")
# systemd's own words for how much a service may do; 10 is anything.
EXPOSURE_MAX = 3.2
RSS_MAX_KIB = 8 * 1024
QMPIN = "/usr/bin/qmpin"
COMMANDS = ("attach", "detach", "threads", "plan", "status", "verify", "doctor", "config", "topology")


def run(host):
    before = host.before()
    with package.Package(host, install=False) as installed, qmpin.Service(100) as service:
        with tempfile.TemporaryDirectory() as folder:
            by_the_readme(host, service, Path(folder))
        vm = Vm(100, **life(host), disks=2, guest="hotplug")
        try:
            package.start(vm)
            followed(host, vm, service)
            lives(host, vm, service)
            again(host, vm, service, installed)
            alone = stays_stopped(host, vm, service)
            strict(host, vm, service, installed)
            upgraded(host, vm, service)
            swept(host, vm, service)
            purged(host, vm, service, installed, alone)
        finally:
            vm.kill()
    state.check_same(before, state.capture(), ignore=package.IGNORE)


def life(host):
    """Room for a vCPU more."""
    return {"cpus": 1, "max_cpus": 2} if host.shape["name"] == "tiny" else {"cpus": 3, "max_cpus": 4}


def by_the_readme(host, service, folder):
    """The commands as they stand there, and one line of policy. After them it can be forgotten."""
    install, _plan, enable, _verify, purge = package.readme(folder)[:5]
    policy = "echo 'isolation = \"exclusive\"' >/etc/qmpin/100.toml"
    assert purge == "apt purge qmpin", purge
    name = shlex.split(install)[-1]
    shutil.copy(package.PACKAGE, folder / name)
    listed = subprocess.run(["dpkg-deb", "-f", package.PACKAGE, "Package", "Version"], capture_output=True, text=True).stdout
    version = re.search(r"^Version: (.*)$", listed, re.MULTILINE).group(1)
    assert name == f"qmpin_{version}_amd64.deb", f"the README says {name}, and it is {version}"
    host.run("sh", "-c", f"cd {folder} && {install}")
    fresh(host, service)
    host.run("sh", "-c", policy)
    assert Path("/etc/qmpin/100.toml").exists()
    print(host.run(QMPIN, "config", "check").stdout)
    host.run("sh", "-c", enable)
    # There is no VM yet: nothing starts, and that is no failure.
    service.start()
    assert (service.show("ActiveState"), service.show("Result")) == ("inactive", "success"), service.states()


def fresh(host, service):
    """Units are there and not enabled; pages, completions and examples where they belong; how much the services may do."""
    assert package.is_enabled(service.path_unit) in ("disabled", "indirect"), package.is_enabled(service.path_unit)
    assert package.is_enabled("qmpin-sweep.service") == "disabled"
    # Images of small machines leave out manual pages when they unpack.
    listed = host.run("dpkg", "-L", "qmpin").stdout.splitlines()
    pages = ["man5/qmpin.toml.5.gz", "man1/qmpin.1.gz", *(f"man1/qmpin-{command}.1.gz" for command in COMMANDS)]
    wanted = [f"man/{page}" for page in pages]
    wanted += ["bash-completion/completions/qmpin", "zsh/vendor-completions/_qmpin", "fish/vendor_completions.d/qmpin.fish"]
    wanted += ["doc/qmpin/README.md", "doc/qmpin/proxmox.md", "qmpin/qmpin-hook"]
    missing = [path for path in wanted if f"/usr/share/{path}" not in listed]
    assert not missing, f"not in the package: {missing}"
    examples = [path for path in listed if path.startswith("/usr/share/doc/qmpin/examples/")]
    assert examples, listed
    helped = host.run(QMPIN, "help").stdout
    assert all(re.search(rf"^  {command} ", helped, re.MULTILINE) for command in COMMANDS), helped
    units = [f"/lib/systemd/system/{name}" for name in ("qmpin@.service", "qmpin@.path", "qmpin-sweep.service")]
    said = host.run("systemd-analyze", "verify", "--man=no", *units, check=False)
    wrong = [line for line in (said.stdout + said.stderr).splitlines() if "qmpin" in line]
    assert not wrong, wrong
    for unit in (service.name, "qmpin-sweep.service"):
        said = host.run("systemd-analyze", "security", "--no-pager", unit, check=False).stdout
        print(said)
        exposure = float(re.search(r"Overall exposure level for .*: ([0-9.]+)", said).group(1))
        host.note(f"systemd-analyze security {unit}: exposure {exposure}")
        assert exposure <= EXPOSURE_MAX, said


def followed(host, vm, service):
    """The path unit has seen the start: every thread is in its place, and qmpin itself is nowhere near."""
    service.wait_state("active")
    vm.wait_guest()
    plan = service.check(vm, host)
    exclusive = cpulist.parse(plan["exclusive"])
    own = threads.of_process(service.main_pid())
    wrong = [thread for thread in own.values() if cpulist.parse(thread.allowed) & exclusive]
    assert not wrong, f"qmpin may run on the VM's CPUs {exclusive}: {wrong}"
    picture = host.run(QMPIN, "topology").stdout
    assert re.search(rf"^ A +VM 100 +{plan['exclusive']}$", picture, re.MULTILINE), picture
    cpus = json.loads(host.run(QMPIN, "topology", "--json").stdout)["cpus"]
    assert {cpu["cpu"] for cpu in cpus if cpu["owner"] == "100"} == exclusive, cpus


def lives(host, vm, service):
    """All that happens to a VM, with Proxmox asking, in a partition, under the service as it is shipped."""
    pid = service.main_pid()
    most = vm.max_cpus
    with PvePoller(vm) as poller:
        for _ in range(2):
            vm.reset()
            service.check(vm, host)
        vm.stop()
        service.check(vm, host)
        vm.cont()
        service.check(vm, host)
        first = vm.hot_add(most - 1)
        assert len(service.check(vm, host)["vcpus"]) == most
        vm.hot_remove(most - 1)
        wait_until(lambda: first not in vm.masks(), 30, "the thread of the unplugged vCPU to end")
        service.check(vm, host)
        assert vm.hot_add(most - 1) != first
        service.check(vm, host)
        vm.iothread_add("iothread-virtioscsi9")
        service.check(vm, host)
        vm.iothread_delete("iothread-virtioscsi9")
        service.check(vm, host)
        drifts(host, vm, service)
        for command in ("write 512k 64k", "flush"):
            vm.qmp("human-monitor-command", command_line=f'qemu-io drive-scsi0 "{command}"')
        service.check(vm, host)
        for command in ("daemon-reload", "daemon-reexec"):
            qmpin.systemctl(command)
            service.check(vm, host)
        assert service.main_pid() == pid, "it was restarted"
        peak_kib = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))
        host.note(f"peak memory of the service: {peak_kib} KiB")
        assert peak_kib < RSS_MAX_KIB
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: service.main_pid() not in (0, pid), 60, "another qmpin", service.states)
        service.wait_state("active")
        service.check(vm, host)
    print(poller.report)
    poller.report.check()


def drifts(host, vm, service):
    """Another program's `taskset` within the partition, which the kernel lets through."""
    plan = service.plan()
    if len(plan["vcpus"]) < 2:
        return
    tid = vm.roles().vcpus[0]
    os.sched_setaffinity(tid, cpulist.parse(plan["vcpus"][1]["cpus"]))
    service.check(vm, host)


def again(host, vm, service, installed):
    """`qm reboot`, and QEMU killed: the process is a new one, and is followed as the first was; also where it comes while the
    other's end is still put right. With the hook script as well, which does no harm."""
    for end in (package.stop, Vm.kill):
        end(vm)
        service.wait_over()
        left = list(Path("/run/qmpin").iterdir())
        assert not left, left
        package.start(vm)
        service.wait_state("active")
        service.check(vm, host)
        installed.install_hook()
    # A QEMU that is killed while Proxmox's own clean-up does not come leaves its pid file; the next start writes over it.
    vm.leave_files()
    service.wait_state("inactive")
    vm.start()
    service.wait_state("active")
    service.check(vm, host)
    # The new one is there before the service has noticed that the old one has ended, and systemd does not start what runs.
    pid = service.main_pid()
    os.kill(pid, signal.SIGSTOP)
    vm.quit()
    vm.start()
    service.start()
    os.kill(pid, signal.SIGCONT)
    service.wait_log("has been started anew")
    # The unit was active all the time, so its state does not show when the new process is attached.
    holds = lambda: host.run("qmpin", "verify", "100", check=False).returncode == 0
    wait_until(holds, 60, "all checks to hold for the restarted VM", service.log)
    service.check(vm, host)
    assert service.main_pid() == pid, service.states()


def stays_stopped(host, vm, service):
    """Stopped by hand it stays stopped, for as long as the VM runs; what the host is like without it."""
    service.stop()
    alone = state.capture()
    assert service.show("ActiveState") == "inactive", service.states()
    assert not list(Path("/run/qmpin").iterdir())
    service.start()
    service.check(vm, host)
    return alone


def strict(host, vm, service, installed):
    """Another line of policy, taken at a restart; nothing that it wants is kept from a service that may do so little."""
    installed.write_policy(100, 'isolation = "strict"\nsched = "fifo:1"')
    qmpin.systemctl("restart", service.name)
    service.check(vm, host)
    said = host.run(QMPIN, "status", "100").stdout
    print(said)
    for error in (errno.EPERM, errno.EROFS, errno.EACCES):
        assert os.strerror(error) not in said, said


def upgraded(host, vm, service):
    """An upgrade leaves the VM to the qmpin that has it: no thread moves while it is under way, nor after."""
    was = service.main_pid(), service.show("NRestarts")
    with tempfile.TemporaryDirectory() as folder:
        newer = package.newer(Path(folder), "9.9.9-1")
        process = subprocess.Popen(["dpkg", "-i", newer], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            assert not service.misplaced(vm), service.misplaced(vm)
        assert process.returncode == 0
    assert "9.9.9-1" in host.run("dpkg-query", "-W", "qmpin").stdout
    assert (service.main_pid(), service.show("NRestarts")) == was, service.states()
    assert Path("/etc/qmpin/100.toml").exists(), "the administrator's file is his"
    service.check(vm, host)


def by_hand(vmid):
    """`qmpin attach` in another program's shell."""
    process = subprocess.Popen([QMPIN, "attach", str(vmid)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lease = Path(f"/run/qmpin/{vmid}.lease")
    wait_until(lambda: lease.exists() and process.poll() is None, 60, f"VM {vmid} to be attached")
    return process


def swept(host, vm, service):
    """What a killed qmpin has left is restored by the sweep, and a running one is left alone."""
    if host.shape["name"] == "tiny":
        return
    with host.vm(101, cpus=2) as two:
        two.wait_guest()
        alone = state.capture()
        process = by_hand(101)
        wait_until(lambda: (two.cgroup / "vcpus").exists(), 60, "its partition")
        process.kill()
        process.wait()
        qmpin.systemctl("start", "qmpin-sweep.service")
        # Of VM 100 there may be something new. Beside its partition the kernel lets no process empty a unit's cpuset: all CPUs, no limit.
        limit = f"{str(two.cgroup).removeprefix('/')}/cpuset.cpus"
        rest = [*package.IGNORE, "run/qmpin/*100*", "run/qmpin/.host.journal", limit]
        state.check_same(alone, state.capture(), ignore=rest)
        assert host.read(two.cgroup / "cpuset.cpus") in ("", host.online())
        service.check(vm, host)


def purged(host, vm, service, installed, alone):
    """`apt purge` while the VM is attached, and another by hand: everything is restored, and nothing is left."""
    story(service)
    if host.shape["name"] == "tiny":
        installed.purge()
    else:
        with host.vm(101, cpus=2) as two:
            two.wait_guest()
            process = by_hand(101)
            installed.purge()
            assert process.wait(60) == 0
            assert two.alive() and set(two.masks().values()) == {host.online()}, two.masks()
    assert vm.alive()
    wait_until(lambda: not Path("/run/qmpin").exists(), 30, "/run/qmpin to be gone")
    # The unit's link is gone, too.
    state.check_same(alone, state.capture(), ignore=[*package.IGNORE, "etc/systemd/system/*"])
    for path in ("/etc/qmpin", "/var/lib/qmpin", QMPIN, "/etc/systemd/system/multi-user.target.wants/qmpin@100.path"):
        assert not Path(path).exists() and not Path(path).is_symlink(), path


def story(service):
    """`journalctl -u` tells what happened in plain words."""
    log = service.log()
    for words in (
        "VM 100: vCPUs on",
        "vCPU 0 (tid",
        "new: iothread iothread-virtioscsi9",
        "gone: iothread iothread-virtioscsi9",
        "affinity changed externally",
        "QEMU has ended",
        "stopping: restoring everything",
    ):
        if words == "affinity changed externally" and "vCPU 1 (tid" not in log:
            continue
        assert words in log, f"no {words!r} in the log:\n{log}"
    assert "error:" not in log and "bug:" not in log and "Permission denied" not in log, log
