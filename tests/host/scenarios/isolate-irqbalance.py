"""irqbalance keeps interrupts off a VM's CPUs itself, is configured again when it is restarted, and is restored at the end."""

import os
import signal
import subprocess
from pathlib import Path

import cpulist
import qmpin
import state
from irqbalance import PLACED, SOCKETS, Irqbalance
from wait import wait_until

LIMIT_S = 500
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    with Irqbalance(host) as irqbalance:
        was = irqbalance.banned()
        with host.vm(100, **host.fitting()) as vm:
            vm.wait_guest()
            alone = state.capture()
            with attached() as follower:
                mine = cpulist.parse(follower.plan()["exclusive"])
                irqbalance.wait_banned(was | mine)
                verify = host.run("qmpin", "verify", "100").stdout
                print(verify)
                host.note(next(line for line in verify.splitlines() if line.startswith("irqbalance")))
                by_itself(host, follower, irqbalance, mine)
                irqbalance.restart()
                irqbalance.wait_banned(was | mine)
            put_back(follower, irqbalance, was, alone)
            killed(host, irqbalance, was, mine, alone)
            hung(host, irqbalance, was, alone)
            with attached() as last:
                irqbalance.wait_banned(was | mine)
                vm.kill()
                assert last.wait() == 0, "its QEMU was killed"
            assert irqbalance.banned() == was, irqbalance.setup()
    by_hand(host)
    state.check_same(before, state.capture(), ignore=PLACED)


def attached():
    return qmpin.Attached(100, isolation="exclusive", check_interval_s=1)


def put_back(follower, irqbalance, was, alone):
    assert follower.code == 0, follower.log()
    assert irqbalance.banned() == was, f"{irqbalance.setup()}: not as before when qmpin had ended"
    state.check_same(alone, state.capture(), ignore=PLACED)


def by_itself(host, follower, irqbalance, mine):
    """While qmpin is stopped, and another program has put every interrupt onto the VM's CPUs, irqbalance takes them off."""
    os.kill(follower.process.pid, signal.SIGSTOP)
    onto = cpulist.write(mine)
    movable = [irq for irq in irqs() if moves(irq, onto)]
    assert movable, "no interrupt can be moved"
    # It tries all of them anew after any request.
    irqbalance.say("settings ban irqs NONE")
    wait_until(
        lambda: any(not on(irq) & mine for irq in movable), 60, "irqbalance to take one off", lambda: {str(irq): on(irq) for irq in movable}
    )
    irqbalance.wait_passes(3)
    taken = [irq for irq in movable if not on(irq) & mine]
    irqbalance.wait_passes(3)
    back = [irq for irq in taken if on(irq) & mine]
    assert not back, f"{back} are on {mine} again"
    host.note(f"while qmpin was stopped irqbalance took {len(taken)} of {len(movable)} interrupts off {cpulist.write(mine)}")
    os.kill(follower.process.pid, signal.SIGCONT)
    # irqbalance leaves the rest alone, whichever program put them there.
    wait_until(lambda: not any(on(irq) & mine for irq in movable), 60, "qmpin to take the rest off")
    places = {irq: on(irq) for irq in taken}
    irqbalance.wait_passes(5)
    moved = [irq for irq, place in places.items() if on(irq) & mine]
    assert not moved, f"{moved} are on {mine}"


def killed(host, irqbalance, was, mine, alone):
    """SIGKILL of qmpin, before irqbalance can have taken the request, and after."""
    for wait in (False, True):
        with attached() as follower:
            if wait:
                irqbalance.wait_banned(was | mine)
            follower.stop(signal.SIGKILL)
        print(host.run("qmpin", "detach", "100").stdout)
        irqbalance.wait_passes(3)
        assert irqbalance.banned() == was, irqbalance.setup()
        state.check_same(alone, state.capture(), ignore=PLACED)


def by_hand(host):
    """Started by hand it has no folder for its socket, and none that it could make."""
    with ByHand(host) as irqbalance, host.vm(100, **host.fitting()) as vm:
        vm.wait_guest()
        with attached() as follower:
            irqbalance.wait_banned(cpulist.parse(follower.plan()["exclusive"]))
        assert follower.code == 0, follower.log()
        assert irqbalance.banned() == set(), irqbalance.setup()


def hung(host, irqbalance, was, alone):
    """One that does not answer is named, and the rest goes on."""
    os.kill(irqbalance.pid, signal.SIGSTOP)
    with attached() as follower:
        mine = cpulist.parse(follower.plan()["exclusive"])
        assert "cannot be configured" in follower.log(), follower.log()
        doctor = host.run("qmpin", "doctor", check=False)
        assert doctor.returncode == 1 and "cannot be configured" in doctor.stdout, doctor
        default = int(host.read("/proc/irq/default_smp_affinity").replace(",", ""), 16)
        assert not any(default >> cpu & 1 for cpu in mine), f"{default:x}"
        verify = host.run("qmpin", "verify", "100").stdout
        host.note(next(line for line in verify.splitlines() if line.startswith("irqbalance")))
    os.kill(irqbalance.pid, signal.SIGCONT)
    put_back(follower, irqbalance, was, alone)


class ByHand(Irqbalance):
    def __enter__(self):
        assert not SOCKETS.exists()
        self.process = subprocess.Popen(["/usr/sbin/irqbalance", "--foreground", "-t", "1"])
        self.pid = self.process.pid
        # In the abstract namespace, and the whole of its name is zeros.
        self.address = bytes(108)
        self.wait_passes(2)
        return self

    def __exit__(self, *_exc):
        self.process.terminate()
        self.process.wait(60)


def irqs():
    return sorted(Path("/proc/irq").glob("*/smp_affinity_list"))


def moves(irq, onto):
    try:
        irq.write_text(onto)
    except OSError:
        return False
    return True


def on(irq):
    return cpulist.parse(irq.read_text())
