"""Interrupts of a device that is passed through go where the policy says, also those that the guest turns on later, and come back."""

import subprocess
import tempfile
from pathlib import Path

import cpulist
import qmpin
import state
from kills import ATTACH, DETACH, Series, expect
from wait import wait_until

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x-iommu",)
PCI = Path("/sys/bus/pci/devices")
# QEMU's device for teaching: it has a line, MSI, and no driver.
EDU = ("0x1234", "0x11e8")
MSI_CAPABILITY = 0x05


def run(host):
    device = bind(host)
    before = host.before()
    extra = ["-device", f"vfio-pci,host={device.name},addr=0x10"]
    with host.vm(100, guest="msi", extra=extra, **host.fitting()) as vm:
        vm.wait_guest()
        irq = msi(device)
        print(f"{device.name}: {irq}, {host.read(f'/sys/kernel/irq/{irq}/actions')}, on {on(host, irq)}")
        alone = state.capture()
        for choice in ("iothreads", "vcpus", "leave"):
            was = on(host, irq)
            with attached(choice) as follower:
                plan = follower.plan()
                want = {
                    "iothreads": cpulist.parse(plan["iothreads"][0]["cpus"]),
                    "vcpus": set().union(*(cpulist.parse(row["cpus"]) for row in plan["vcpus"])),
                    "leave": was,
                }[choice]
                wait_until(lambda: on(host, irq) == want, 60, f"interrupt {irq} to be on {want}", lambda: on(host, irq))
                verify = host.run("qmpin", "verify", "100").stdout
                print(verify)
                host.note(next(line for line in verify.splitlines() if line.startswith("vfio-irqs")))
                assert f'vfio_irqs = "{choice}": {device.name}' in verify, verify
            assert follower.code == 0
            state.check_same(alone, state.capture())
        reborn(host, vm, device)
        killed(host)
    with host.vm(100, guest="idle", extra=extra, **host.fitting()) as vm:
        vm.wait_guest()
        on_the_line(host, device)
    state.check_same(before, state.capture())


def attached(choice):
    return qmpin.Attached(100, isolation="exclusive", check_interval_s=1, policy=f'vfio_irqs = "{choice}"')


def reborn(host, vm, device):
    """A reset turns MSI off and the guest turns it on again: another interrupt, created with the mask that new ones have now."""
    before = on(host, msi(device))
    with attached("vcpus") as follower:
        mine = cpulist.parse(follower.plan()["exclusive"])
        vm.reset()
        wait_until(lambda: on(host, msi(device)) == mine, 60, f"the new interrupt to be on {mine}", lambda: on(host, msi(device)))
    assert follower.code == 0
    assert on(host, msi(device)) == before, f"{on(host, msi(device))}, before {before}"


def killed(host):
    """SIGKILL of qmpin at every position, and `detach`: the device's interrupt is back where it was, too."""
    with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        series = Series(host, Path(folder))
        series.policy(isolation="pinned", irqs=True, vfio_irqs="vcpus")
        expect(series.everywhere("attach, and its own end", ATTACH, ends=True), 15, ".host.journal intent")
        expect(series.everywhere("detach", DETACH, attached=True), 4, "unlink .host.journal")
        series.check()


def on_the_line(host, device):
    """A guest that does not know MSI: its interrupt is the device's line, which the host may have a part in."""
    irq = int(host.read(device / "irq"))
    actions = host.read(f"/sys/kernel/irq/{irq}/actions")
    alone = actions == f"vfio-intx({device.name})"
    before = on(host, irq)
    with attached("vcpus") as follower:
        mine = cpulist.parse(follower.plan()["exclusive"])
        want = mine if alone else before - mine
        wait_until(lambda: on(host, irq) == want, 60, f"line {irq} ({actions}) to be on {want}", lambda: on(host, irq))
    assert follower.code == 0
    assert on(host, irq) == before
    host.note(f"line {irq} is asked for by {actions}")


def bind(host):
    """Gives the device to vfio."""
    device = next(path for path in sorted(PCI.iterdir()) if (host.read(path / "vendor"), host.read(path / "device")) == EDU)
    capability = (device / "config").read_bytes()[0x40]
    assert capability == MSI_CAPABILITY, f"{capability:#x}: the guest looks for MSI at 0x40"
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    (device / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(device.name)
    assert (device / "driver").resolve().name == "vfio-pci"
    return device


def msi(device):
    """The device's interrupt, once the guest has turned MSI on."""
    folder = device / "msi_irqs"
    return wait_until(
        lambda: next((int(path.name) for path in folder.glob("*")), None), 60, "the guest to turn MSI on", lambda: list(folder.glob("*"))
    )


def on(host, irq):
    try:
        return cpulist.parse(host.read(f"/proc/irq/{irq}/smp_affinity_list"))
    except FileNotFoundError:
        return set()
