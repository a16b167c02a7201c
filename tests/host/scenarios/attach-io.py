"""Worker threads under I/O, QEMU's own and io_uring's, run where the emulator does and nowhere else."""

import qmpin
import state
import threads
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    # The guest that reads needs TCG; the BIOS under emulated KVM takes minutes for a sector.
    with host.vm(100, cpus=1, guest="read", accel="tcg") as vm:
        vm.wait_guest()
        follow(host, vm, lambda: True, "worker")
    # Writes and flushes by hand: io_uring hands only what would block to threads of its own.
    with host.vm(100, cpus=1, aio="io_uring") as vm:
        vm.wait_guest()

        def write_and_flush():
            for words in ("write 512k 64k", "flush"):
                said = vm.qmp("human-monitor-command", command_line=f'qemu-io drive-scsi0 "{words}"')
                assert "rror" not in said, said
            return True

        follow(host, vm, write_and_flush, "iou-wrk-")
    state.check_same(before, state.capture())


def follow(host, vm, work, name):
    """Attaches while there is work; at least one worker has to be seen in its place."""
    with PvePoller(vm) as poller, qmpin.Attached(100) as attached:

        def workers():
            work()
            found = [thread for thread in threads.of_process(vm.pid).values() if thread.comm.startswith(name)]
            wrong = [worker for worker in found if worker.allowed != emulator]
            assert not wrong, f"workers that do not run on {emulator}: {wrong}"
            return found

        emulator = attached.check(vm, host)["emulator"]
        seen = set()

        def seen_enough():
            seen.update((worker.tid, worker.start) for worker in workers())
            return poller.so_far().tallies["gui"].visits >= 5 and seen

        wait_until(seen_enough, 60, f"a thread {name}...", lambda: (vm.roles().others, poller.so_far()))
        vm.reset()
        attached.check(vm, host)
        print(f"  {len(seen)} threads {name}...")
    assert attached.code == 0
    poller.report.check()
    masks = set(vm.masks().values())
    assert masks == {host.online()}, masks
