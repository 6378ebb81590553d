"""``revert``: VM.revert of a VM with three disks, as a client of xapi sees it: natively, and by destroy and clone, in turns.

The model of xapi runs the plug-in as xapi does. Both SRs are in one daemon and have the same plug-in; one driver lacks VDI_REVERT. Times
are those of the XenAPI call: three runs of the plug-in natively, nine by cloning (delete, clone, update).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import fio
from bench.failure import BenchFailure
from bench.operations import PLUGIN, Finding, Scale, wait_until_detached
from bench.servers import PROJECT, running
from simsr.cli.client import Client
from simsr.cli.xe_client import XenApi

__all__ = ["vm_revert"]

DISKS = 3
DISK_BYTES = 16 << 20
WRITTEN_BYTES = 1 << 20
DRIVERS = {"native": "sim", "clone": "clone"}


def vm_revert(daemon: Client, scale: Scale, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Time both ways in turns; between two reverts the disks are written to."""
    with tempfile.TemporaryDirectory(prefix="sb-xapi-") as path:
        folder = Path(path)
        for name in ("SimSR", "CloneSR"):
            (folder / name).symlink_to(PLUGIN)
        (folder / "CloneSR.no-revert").touch()
        command = [sys.executable, "-m", "simsr.cli.main", "xapi", "serve", "--root", str(folder / "root"), "--sm-dir", path]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}

        def is_ready(log: Path) -> bool:
            return "simsr xapi: ready" in log.read_text(errors="replace")

        socket = str(folder / "root" / "xapi")
        with running("simsr xapi", command, folder, is_ready, environment), XenApi(socket) as api:
            config = {"socket": daemon.socket_path, "xapi_socket": socket}
            prepared = {way: _vm(api, config, kind) for way, kind in DRIVERS.items()}
            times: dict[str, list[float]] = {way: [] for way in DRIVERS}
            for repeat in range(max(3, min(7, scale.repeats))):
                for way, (sr, vm, snapshot) in prepared.items():
                    times[way].append(_revert(daemon, api, vm, snapshot, seed=repeat + 1))
                    _check(api, sr, way)
            _put_away(api, prepared)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    tell(f"revert of {DISKS} disks: " + "  ".join(f"{way} {taken:.0f} ms" for way, taken in medians.items()))
    yield Finding("revert", f"VM.revert of {DISKS} disks, native", medians["native"], "ms")
    yield Finding("revert", f"VM.revert of {DISKS} disks, by cloning", medians["clone"], "ms")
    yield Finding("revert", "VM.revert, by cloning against native", medians["clone"] / medians["native"], "x")


def _vm(api: XenApi, config: dict[str, str], kind: str) -> tuple[str, str, str]:
    """Return an SR, a halted VM with disks on it, and a snapshot of that."""
    host, template = api("host.get_all")[0], api("VM.get_by_name_label", "Other install media")[0]
    sr = api("SR.create", host, config, str(1 << 30), f"bench {kind}", "", kind, "user", False, {})
    vm = api("VM.clone", template, f"bench {kind}")
    api("VM.set_is_a_template", vm, False)
    for number in range(DISKS):
        disk = api("VDI.create", {"SR": sr, "name_label": f"disk {number}", "virtual_size": str(DISK_BYTES), "type": "user"})
        vbd = {"VM": vm, "VDI": disk, "userdevice": str(number), "mode": "RW", "type": "Disk", "empty": False, "bootable": False}
        api("VBD.create", {**vbd, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {}, "unpluggable": True})
    return sr, vm, api("VM.snapshot", vm, "bench")


def _revert(daemon: Client, api: XenApi, vm: str, snapshot: str, seed: int) -> float:
    """Write to the disks, revert, and return the milliseconds that took."""
    for uuid in _disks(api, vm):
        fio.fill_at_random(daemon.get(daemon.vdi_path(uuid))["nbd_uri"], DISK_BYTES, seed, WRITTEN_BYTES)
        wait_until_detached(daemon, uuid)
    before, begun = _disks(api, vm), time.perf_counter()
    api("VM.revert", snapshot)
    taken = (time.perf_counter() - begun) * 1e3
    if len(_disks(api, vm)) != len(before):
        raise BenchFailure(f"the VM had {len(before)} disks before VM.revert and has {len(_disks(api, vm))} now")
    return taken


def _disks(api: XenApi, vm: str) -> list[str]:
    return [api("VDI.get_uuid", api("VBD.get_VDI", vbd)) for vbd in api("VM.get_VBDs", vm)]


def _check(api: XenApi, sr: str, way: str) -> None:
    """Make sure that this was the way meant."""
    if ("vdi_revert" in api("SR.get_allowed_operations", sr)) != (way == "native"):
        raise BenchFailure(f"the SR for the {way} way has the allowed operations of the other")


def _put_away(api: XenApi, prepared: dict[str, tuple[str, str, str]]) -> None:
    for sr, *_ in prepared.values():
        disks = api("SR.get_VDIs", sr)
        for disk in sorted(disks, key=lambda disk: not api("VDI.get_is_a_snapshot", disk)):
            api("VDI.destroy", disk)
        for pbd in api("SR.get_PBDs", sr):
            api("PBD.unplug", pbd)
        api("SR.destroy", sr)
