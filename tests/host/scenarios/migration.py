"""A migration: the target is attached while it waits for its memory, by its own plan; the source is restored when it ends."""

from pathlib import Path

import cpulist
import package
import qmpin
import state
from vm import Vm
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin", "package")
SHAPES = ("5900x", "5900x-one-node")
# `mig/src/main`, or as older QEMUs call it.
MIGRATION_THREADS = ("mig/", "live_migration")
SOCKET = Path("/run/qtest/migration.sock")
# The same file for every node: it names needs, and no CPUs. Both VMs are one, on two nodes that are one host here.
POLICY = 'isolation = "exclusive"\ncores = "performance"\ncache = "large"'


def run(host):
    before = host.before()
    with package.Package(host) as installed, qmpin.Service(100) as source_unit, qmpin.Service(101) as target_unit:
        for vmid in (100, 101):
            installed.write_policy(vmid, POLICY, package.CLUSTER)
        moved(host, source_unit, target_unit, lambda: installed.install_hook())
        package.HOOK.unlink()
        # Without a hook script: the pid file is all that the path unit needs to see.
        moved(host, source_unit, target_unit, lambda: qmpin.systemctl("enable", "--now", source_unit.path_unit, target_unit.path_unit))
    state.check_same(before, state.capture(), ignore=[*package.IGNORE, "etc/systemd/system/*"])


def moved(host, source_unit, target_unit, prepare):
    """One migration, there by whatever PREPARE has set up."""
    prepare()
    source = Vm(100, cpus=4)
    target = Vm(101, cpus=4, extra=["-incoming", f"unix:{SOCKET}"])
    try:
        package.start(source)
        source.wait_guest()
        source_unit.wait_state("active")
        source_plan = source_unit.check(source, host)
        package.start(target)
        target_unit.wait_state("active")
        assert target.status() == "inmigrate", target.status()
        target_plan = target_unit.check(target, host)
        mine, its = (cpulist.parse(plan["exclusive"]) for plan in (source_plan, target_plan))
        assert not mine & its, f"both on {mine & its}"
        migrate(source, target, source_unit)
        # Threads of the migration have come and gone on both sides.
        assert target_unit.check(target, host) == target_plan
        # As Proxmox ends a source: without its hooks.
        source.quit()
        source_unit.wait_over()
        wait_until(lambda: not Path("/run/qmpin/100.lease").exists(), 30, "the source's lease to be gone")
        # It may use what the source had; its vCPUs stay where they are.
        assert target_unit.check(target, host)["vcpus"] == target_plan["vcpus"]
        package.stop(target)
        target_unit.wait_state("inactive")
        left = list(Path("/run/qmpin").iterdir())
        assert not left, left
    finally:
        source.kill()
        target.kill()
        SOCKET.unlink(missing_ok=True)


def migrate(source, target, source_unit):
    """QEMU's own migration, as Proxmox does it: the source sends, stays stopped, and the target is resumed."""
    # Slow at first, so that there is time to see where its threads are.
    bandwidth = lambda bytes_per_s: source.qmp("migrate-set-parameters", **{"max-bandwidth": bytes_per_s})
    bandwidth(4 << 10)
    source.qmp("migrate", uri=f"unix:{SOCKET}")
    threads = lambda: [tid for tid, comm in source.roles().others.items() if comm.startswith(MIGRATION_THREADS)]
    wait_until(threads, 30, "a thread of the migration", lambda: source.roles().others)
    plan = source_unit.plan()
    masks = lambda: {tid: source.masks().get(tid) for tid in threads()}
    wait_until(lambda: set(masks().values()) == {plan["emulator"]}, 30, f"its threads on {plan['emulator']}", masks)
    bandwidth(1 << 40)

    def done():
        status = source.qmp("query-migrate").get("status")
        assert status not in ("failed", "cancelled"), source.qmp("query-migrate")
        return status == "completed"

    wait_until(done, 120, "the migration to complete", lambda: source.qmp("query-migrate"))
    wait_until(lambda: target.status() in ("paused", "postmigrate", "running"), 30, "the target to have it all", target.status)
    target.cont()
    assert target.status() == "running", target.status()
