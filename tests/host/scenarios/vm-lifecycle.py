"""A VM started as Proxmox does lives through resets, stop/cont, vCPU and iothread hotplug, and a SIGKILL of QEMU."""

import qmp
import threads
import vm as vms
from wait import wait_until

LIMIT_S = 300
NEEDS = ("kvm",)


def run(host):
    with host.vm(100, cpus=3, max_cpus=6, disks=2, guest="hotplug") as vm:
        vm.wait_guest()
        assert threads.cgroup(vm.pid) == "/qemu.slice/100.scope"
        assert host.read(f"/proc/{vm.pid}/comm") == "kvm"

        roles = check_roles(vm, vcpus=[0, 1, 2])
        names = {tid: threads.read(vm.pid, tid).comm for tid in roles.all_tids()}
        assert [names[roles.vcpus[index]] for index in range(3)] == ["CPU 0/KVM", "CPU 1/KVM", "CPU 2/KVM"]
        # The names of Proxmox's iothreads are too long for a thread: only QMP tells which they are.
        assert all(names[tid] == "kvm" for tid in roles.iothreads.values()), names

        for _ in range(2):
            vm.reset()
            assert vm.roles().vcpus == roles.vcpus, "a reset keeps the threads"
        vm.stop()
        assert vm.status() == "paused"
        vm.cont()
        assert vm.status() == "running"
        assert vm.roles().vcpus == roles.vcpus, "stop and cont keep the threads"

        first_tid = vm.hot_add(3)
        check_roles(vm, vcpus=[0, 1, 2, 3])
        vm.hot_remove(3)
        wait_until(lambda: first_tid not in vm.masks(), 30, "the thread of the unplugged vCPU to end")
        check_roles(vm, vcpus=[0, 1, 2])
        second_tid = vm.hot_add(3)
        assert second_tid != first_tid, "a vCPU that is plugged again has a new thread"
        check_roles(vm, vcpus=[0, 1, 2, 3])

        tid = vm.iothread_add("iothread-virtioscsi2")
        assert tid in vm.masks()
        vm.iothread_delete("iothread-virtioscsi2")
        check_roles(vm, vcpus=[0, 1, 2, 3])

        vm.kill()
        assert not vm.alive()

    # The same number again; threads without names; QEMU's own end.
    with host.vm(100, cpus=2, debug_threads=False) as vm:
        vm.wait_guest()
        roles = check_roles(vm, vcpus=[0, 1], disks=1)
        named = vms.qemu_version() >= (11, 0)
        comms = {threads.read(vm.pid, tid).comm for tid in roles.vcpus.values()}
        assert comms == ({"CPU 0/KVM", "CPU 1/KVM"} if named else {"kvm"}), comms
        vm.quit()

    # All vCPUs burn; a paused VM does not run; TCG works as well.
    with host.vm(100, cpus=2, guest="spin", paused=True) as vm:
        assert vm.status() == "prelaunch"
        vm.cont()
        vm.wait_guest()
        tids = vm.roles().vcpus.values()
        start = {tid: run_ns(tid) for tid in tids}
        wait_until(lambda: all(run_ns(tid) - start[tid] > 200e6 for tid in tids), 60, "both vCPUs to have run for 200 ms")
    # The guest reads its disk: worker threads come up beside the iothread.
    with host.vm(101, cpus=1, guest="read", accel="tcg") as vm:
        vm.wait_guest()
        wait_until(lambda: "worker" in vm.roles().others.values(), 60, "a worker thread", lambda: vm.roles().others)
    try:
        qmp.visit(vm.qmp_path, "query-status", limit_s=1)
    except qmp.QmpLost:
        pass
    else:
        raise AssertionError("the socket answers after the end of QEMU")


def check_roles(vm, vcpus, disks=2):
    """Every vCPU and iothread is a thread of QEMU, and no thread has two roles."""
    roles = vm.roles()
    assert sorted(roles.vcpus) == vcpus, roles
    assert sorted(roles.iothreads) == [f"iothread-virtioscsi{disk}" for disk in range(disks)], roles
    with_role = [roles.pid, *roles.vcpus.values(), *roles.iothreads.values()]
    assert len(set(with_role)) == len(with_role), roles
    assert set(with_role) <= set(vm.masks()), roles
    return roles


def run_ns(tid):
    with open(f"/proc/{tid}/schedstat") as schedstat:
        return int(schedstat.read().split()[0])
