"""The CloudStack demonstration: what uuid-stable revert changes for a manager that keeps the uuids of disks.

One page. First VM.revert itself, by cloning and natively. Then CloudStack's own sequence of calls: on an SR without VDI_REVERT, where it was
made for; on one with it, where it destroys the disks that were just reverted (in a sandbox); and the two ways out. Everything is real: daemon,
plug-in processes, the XenAPI over a socket with the stock client, data over NBD compared by checksum, the volumes in SQLite.
The exit status is 0 only if everything was as this page says. Nothing stays behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd
import XenAPI
from cloudstack import Management, RevertFailed
from demo_kit import PLUG_IN, Failed, demand
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simsr.cli.child_daemon import ChildDaemon, short_temporary_directory
from simsr.errors import SimsrError

MIB = 2**20
DISK_BYTES = 8 * MIB
SR_BYTES = 1024 * MIB
READY = re.compile(r"simsr xapi: ready, socket (\S+)\n")
INTERRUPTED = 130
CLONING, NATIVE = "clone", "sim"
"""Types of SR: the same plug-in, the first without VDI_REVERT."""


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(DISK_BYTES)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Outcome:
    """What became of a VM whose snapshot was reverted."""

    old: list[str]
    paths: list[str] = field(default_factory=list)
    verdict: str = ""
    vm_disks: list[str] | None = None
    alive: list[bool] = field(default_factory=list)
    started: str = ""
    data: list[bool] = field(default_factory=list)
    snapshot_intact: bool = False


class Pool:
    """``simsr xapi serve`` with both drivers on one daemon, the stock client, and a CloudStack that manages it."""

    def __init__(self, directory: Path, daemon: ChildDaemon, *options: str) -> None:
        self.daemon, root = daemon, directory / "-".join(["pool", *options]).replace("--", "")
        drivers = directory / "sm"
        if not drivers.exists():
            drivers.mkdir()
            for name in ("SimSR", "CloneSR"):
                (drivers / name).symlink_to(PLUG_IN)
            (drivers / "CloneSR.no-revert").touch()
        self.log = open(directory / f"{root.name}.log", "ab")  # noqa: SIM115 - closed by close
        command = [sys.executable, "-m", "simsr.cli.main", "xapi", "serve", "--root", str(root), "--sm-dir", str(drivers), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True)
        try:
            ready = READY.fullmatch(self.process.stdout.readline())
            demand(ready, f"the model of xapi did not start, see {self.log.name}")
            self.socket = ready[1]
            self.session = XenAPI.Session("http://" + self.socket.replace("/", "_") + "/", transport=XenAPI.UDSTransport())
            self.session.login_with_password("root", "")
        except BaseException:
            self._stop()
            raise
        self.x: Any = self.session.xenapi
        self.cloud = Management(str(directory / f"{root.name}.db"), self.session, self.socket)

    def sr(self, kind: str, **device_config: str) -> str:
        config = {"socket": self.daemon.socket, "xapi_socket": self.socket, **device_config}
        return self.x.SR.create(self.x.host.get_all()[0], config, str(SR_BYTES), f"{kind} {len(config)}", "", kind, "user", False, {})

    def close(self) -> None:
        with contextlib.suppress(OSError, XenAPI.Failure):
            self.session.logout()
        self.session("close")()
        self.cloud.db.close()
        self._stop()

    def _stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()
        self.log.close()

    # Data.

    def _connect(self, uuid: str) -> nbd.NBD:
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{uuid}?socket={self.daemon.root}/nbd.sock")
        return handle

    def write(self, uuid: str, data: bytes) -> None:
        handle = self._connect(uuid)
        handle.pwrite(data, 0)
        handle.flush()
        handle.shutdown()

    def read(self, uuid: str) -> str:
        """Return the checksum of the whole disk."""
        handle = self._connect(uuid)
        data = handle.pread(DISK_BYTES, 0)
        handle.shutdown()
        return digest(bytes(data))

    def exists(self, uuid: str) -> bool:
        try:
            self.x.VDI.get_by_uuid(uuid)
        except XenAPI.Failure as error:
            demand(error.details[0] == "UUID_INVALID", str(error))
            return False
        return True

    # A VM with two disks, a snapshot of it, and other data since.

    def prepare(self, vm_id: int, sr: str) -> tuple[str, list[str]]:
        """Return the snapshot's name and what the disks held then."""
        self.cloud.deploy(vm_id, sr, [DISK_BYTES] * 2)
        then = []
        for volume in self.cloud.volumes(vm_id):
            data = content(vm_id * 10 + volume["device_id"])
            self.write(volume["path"], data)
            then.append(digest(data))
        name = self.cloud.snapshot(vm_id)
        for volume in self.cloud.volumes(vm_id):
            self.write(volume["path"], content(1000 + vm_id * 10 + volume["device_id"]))
        return name, then

    def snapshot_disks(self, name: str) -> list[str]:
        """Return the references of the snapshot's VDIs, by device."""
        [snapshot] = self.x.VM.get_by_name_label(name)
        vbds = [self.x.VBD.get_record(vbd) for vbd in self.x.VM.get_VBDs(snapshot)]
        return [vbd["VDI"] for vbd in sorted(vbds, key=lambda vbd: vbd["userdevice"])]


# Part 1: VM.revert.


@dataclass
class Plain:
    """VM.revert of a VM whose record is there. ``links``: the VDIs that the snapshot's disks are snapshots of, before and after."""

    allowed: bool
    before: list[dict[str, Any]]
    after: list[str]
    alive: list[bool]
    links: tuple[list[str], list[str]]
    milliseconds: float
    data: list[bool]

    @property
    def same(self) -> bool:
        return [row["path"] for row in self.before] == self.after


def plain(pool: Pool, vm_id: int, sr: str) -> Plain:
    name, then = pool.prepare(vm_id, sr)
    x = pool.x
    [vm], [snapshot] = x.VM.get_by_name_label(pool.cloud.name_of(vm_id)), x.VM.get_by_name_label(name)
    x.VM.clean_shutdown(vm)
    allowed, before = "vdi_revert" in x.SR.get_allowed_operations(sr), pool.cloud.volumes(vm_id)

    def links() -> list[str]:
        return [x.VDI.get_uuid(x.VDI.get_snapshot_of(vdi)) for vdi in pool.snapshot_disks(name)]

    links_before, begun = links(), time.perf_counter()
    x.VM.revert(snapshot)
    took_ms = (time.perf_counter() - begun) * 1000
    vbds = sorted((x.VBD.get_record(vbd) for vbd in x.VM.get_VBDs(vm)), key=lambda vbd: vbd["userdevice"])
    after = [x.VDI.get_uuid(vbd["VDI"]) for vbd in vbds]
    alive = [pool.exists(row["path"]) for row in before]
    data = [pool.read(uuid) == was for uuid, was in zip(after, then, strict=True)]
    return Plain(allowed, before, after, alive, (links_before, links()), took_ms, data)


# Part 2: CloudStack.


def managed(pool: Pool, vm_id: int, sr: str, *, stock: bool) -> Outcome:
    name, then = pool.prepare(vm_id, sr)
    cloud, outcome = pool.cloud, Outcome([volume["path"] for volume in pool.cloud.volumes(vm_id)])
    cloud.stop(vm_id)

    def look() -> None:
        for vm in pool.x.VM.get_by_name_label(cloud.name_of(vm_id)):
            outcome.vm_disks = [pool.x.VDI.get_uuid(pool.x.VBD.get_VDI(vbd)) for vbd in pool.x.VM.get_VBDs(vm)]

    try:
        if stock:
            cloud.stock_revert(vm_id, name, look)
        else:
            cloud.plain_revert(vm_id, name)
        outcome.verdict = "done"
    except RevertFailed as failure:
        outcome.verdict = str(failure)
    outcome.paths = [volume["path"] for volume in cloud.volumes(vm_id)]
    outcome.alive = [pool.exists(uuid) for uuid in outcome.old]
    try:
        cloud.start(vm_id)
        outcome.started = "yes"
        outcome.data = [pool.read(path) == was for path, was in zip(outcome.paths, then, strict=True)]
    except XenAPI.Failure as failure:
        outcome.started = failure.details[0]
    held = [pool.read(pool.x.VDI.get_uuid(vdi)) for vdi in pool.snapshot_disks(name)]
    outcome.snapshot_intact = held == then
    return outcome


# The page.


def short(uuid: str) -> str:
    return uuid[:8]


def good(text: str) -> Text:
    return Text(text, style="green")


def bad(text: str) -> Text:
    return Text(text, style="bold red")


def grid(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, style="bold" if number == 0 else "", overflow="fold")
    return table


def plain_table(both: tuple[Plain, Plain]) -> Table:
    table = grid("VM.revert, two disks", "SR without VDI_REVERT", "SR with VDI_REVERT")
    table.add_row("vdi_revert allowed", *("yes" if each.allowed else "no" for each in both))
    for device, name in enumerate(("ROOT", "DATA")):
        changes = [(each.before[device]["path"], each.after[device]) for each in both]
        cells = [good(f"{short(old)}, the same") if old == new else Text(f"{short(old)} -> {short(new)}") for old, new in changes]
        table.add_row(f"VDI of {name}", *cells)
    table.add_row("the old VDIs", *(good("are the disks") if all(each.alive) else Text("destroyed") for each in both))
    table.add_row("volumes.path", *(good("still right") if all(each.alive) else bad("dangles") for each in both))
    table.add_row("snapshot_of", *(good("untouched") if each.links[0] == each.links[1] else Text("re-pointed") for each in both))
    table.add_row("sha256 of the data", *(good("the snapshot's") if all(each.data) else bad("WRONG") for each in both))
    table.add_row("time of VM.revert", *(f"{each.milliseconds:.0f} ms" for each in both))
    return table


CASES = {
    "today": ("no VDI_REVERT", "stock script"),
    "the trap": ("VDI_REVERT", "stock script"),
    "way out 1": ("revert-compat", "stock script"),
    "way out 2": ("VDI_REVERT", "VM.revert"),
}
"""The SR, and what is called."""


def managed_table(found: list[Outcome]) -> Table:
    table = grid("CloudStack", *CASES)
    table.add_row("the SR has", *(sr for sr, _ in CASES.values()))
    table.add_row("CloudStack runs", *(calls for _, calls in CASES.values()))
    table.add_row("its disks then", *(_disks(each) for each in found))
    table.add_row("the old VDIs", *(_old(each) for each in found))
    table.add_row("CloudStack says", *(good("done") if each.verdict == "done" else bad(each.verdict.partition(":")[0]) for each in found))
    table.add_row("volumes.path", *(_path(each) for each in found))
    table.add_row("the VM starts", *(good("yes") if each.started == "yes" else bad(each.started) for each in found))
    table.add_row("sha256 of its data", *(good("snapshot's") if each.data and all(each.data) else bad("LOST") for each in found))
    table.add_row("the snapshot", *(good("intact") if each.snapshot_intact else bad("DAMAGED") for each in found))
    return table


def _disks(outcome: Outcome) -> Text | str:
    if outcome.vm_disks is None:
        return "no script"
    if not outcome.vm_disks:
        return bad("none")
    return f"{len(outcome.vm_disks)} others" if set(outcome.vm_disks).isdisjoint(outcome.old) else f"{len(outcome.vm_disks)} the same"


def _old(outcome: Outcome) -> Text | str:
    if all(outcome.alive):
        return good("the disks")
    return "destroyed" if set(outcome.paths).isdisjoint(outcome.old) else bad("DESTROYED")


def _path(outcome: Outcome) -> Text | str:
    if outcome.paths != outcome.old:
        return "rewritten"
    return good("untouched") if all(outcome.alive) else bad("dangles")


def volumes_table(pool: Pool, rows: list[tuple[str, list[str], int]]) -> Table:
    """CloudStack's table as it is now, beside the paths that it had before."""
    table = grid("volumes", "", "path before", "path now", "update_count", "has a VDI")
    for how, old, vm_id in rows:
        for row, before in zip(pool.cloud.volumes(vm_id), old, strict=True):
            there = good("yes") if pool.exists(row["path"]) else bad("NO")
            table.add_row(row["name"], how, short(before), short(row["path"]), str(row["update_count"]), there)
    return table


def run(console: Console, directory: Path, stack: contextlib.ExitStack) -> None:
    """Do everything, show it, and stop at the first thing that is not as it should be."""
    begun = time.monotonic()
    daemon = stack.enter_context(ChildDaemon(str(directory / "store")))
    pool = Pool(directory, daemon)
    stack.callback(pool.close)
    with console.status("reverting ..."):
        cloning, native = pool.sr(CLONING), pool.sr(NATIVE)
        compatible = pool.sr(NATIVE, **{"revert-compat": "cloudstack"})
        first, second = plain(pool, 3, cloning), plain(pool, 4, native)
    console.print(plain_table((first, second)))
    demand(not first.allowed and not first.same and not any(first.alive), "cloning gives other VDIs, and the old ones are gone")
    demand(first.links == ([row["path"] for row in first.before], first.after), "cloning re-points the snapshot's links")
    demand(second.allowed and second.same and all(second.alive), "a native revert keeps the VDIs")
    demand(second.links == (second.after, second.after), "a native revert leaves the snapshot's links alone")
    demand(all(first.data + second.data), "the data of the snapshot is back")
    with console.status("reverting as CloudStack does ..."):
        outcomes = [
            managed(pool, 5, cloning, stock=True),
            managed(pool, 6, native, stock=True),
            managed(pool, 7, compatible, stock=True),
            managed(pool, 8, native, stock=False),
        ]
        fixed = Pool(directory, daemon, "--fidelity", "fixed")
        stack.callback(fixed.close)
        in_fixed = managed(fixed, 6, fixed.sr(NATIVE), stock=True)
    console.print(managed_table(outcomes))
    console.print(volumes_table(pool, [(how, each.old, number) for number, (how, each) in enumerate(zip(CASES, outcomes, strict=True), 5)]))
    check(*outcomes, in_fixed)
    console.print(EXPLANATION)
    ratio, took_s = first.milliseconds / second.milliseconds, time.monotonic() - begun
    console.print(f"The native revert took 1/{ratio:.1f} of the time. Everything was as said. {took_s:.0f} s.")


EXPLANATION = """\
The stock script destroys, by uuid, the disks that the VM had before. On an SR with VDI_REVERT these are the ones just reverted; only the \
snapshot survives. Ways out: 1. device_config:revert-compat=cloudstack, with which the SR clones where a disk has no VM; 2. VM.revert instead of \
the script. No way out, tried as well: an xapi that gives the VM its disks back (--fidelity fixed).
"""


def check(today: Outcome, trap: Outcome, valve: Outcome, instead: Outcome, in_fixed: Outcome) -> None:
    """Stop the demonstration unless everything was as the page says."""
    for name, each in (("without VDI_REVERT", today), ("with revert-compat", valve)):
        demand(each.verdict == "done" and each.started == "yes" and all(each.data), f"{name}: the sequence works ({each.verdict})")
        demand(not any(each.alive) and set(each.paths).isdisjoint(each.old), f"{name}: the old disks are gone, the paths are new")
    for name, each in (("upstream", trap), ("fixed", in_fixed)):
        demand(each.verdict.startswith("null pointer"), f"{name}: CloudStack fails ({each.verdict})")
        demand(not any(each.alive), f"{name}: the reverted disks are destroyed")
        demand(each.paths == each.old and each.started == "UUID_INVALID", f"{name}: the paths dangle and the VM cannot start")
    demand(instead.verdict == "done" and all(instead.alive) and instead.paths == instead.old, "VM.revert instead: nothing changes")
    demand(instead.started == "yes" and all(instead.data), "VM.revert instead: the VM starts with the snapshot's data")
    demand(all(each.snapshot_intact for each in (today, trap, valve, instead, in_fixed)), "no snapshot is damaged")


def main() -> int:
    """Run the demonstration and return the exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUG_IN.parents[2]), os.environ.get("PYTHONPATH")]))
    console = Console(highlight=False)
    directory = Path(short_temporary_directory("simsr-cs-"))
    while "_" in directory.name:  # the stock client makes a slash of it
        directory.rmdir()
        directory = Path(short_temporary_directory("simsr-cs-"))
    try:
        with contextlib.ExitStack() as stack:
            run(console, directory, stack)
        return 0
    except (Failed, OSError, SimsrError, XenAPI.Failure, nbd.Error, sqlite3.Error) as error:
        console.print(Text(f"This did not hold: {error}", style="bold red"))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
