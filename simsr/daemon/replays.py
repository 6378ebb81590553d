"""Traces replayed on VDIs because somebody asked for it (not a scenario): each is a `Load` on an attachment of its own, so it meets the
scenario that is in force on the disk, and is recorded, as any client is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from scenarios.schema import Replay
from simsr.daemon.direct import Direct
from simsr.daemon.engine import Disk
from simsr.daemon.load import Load
from simsr.daemon.loads import make_workload
from simsr.daemon.trace_files import TraceFiles
from simsr.errors import NotFound, VdiInUse
from simsr.sr.vdi import FUSE_CACHED, Vdi

if TYPE_CHECKING:
    from simsr.daemon.host import Host

log = logging.getLogger("simsr.scenario")

__all__ = ["REPLAY", "Running", "Replays"]

REPLAY = "replay"
"""The kind of these attachments."""


@dataclass
class Running:
    number: int
    vdi: str
    load: Load


class Replays:
    """Those of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._numbers = count(1)
        self.running: dict[int, Running] = {}

    def attach(self, vdi: Vdi, who: str) -> Disk:
        """A disk for a load. Raises `VdiInUse`, `VdiReadOnly`."""
        host = self._host
        mounted = host.mounted[vdi.sr]
        key = object()
        gate = mounted.engine.gates.get(vdi.volume)
        rival = next((one for one in vdi.attachments.values() if one.kind == FUSE_CACHED), None)
        if rival or (gate is not None and gate.barred):
            raise VdiInUse(operation="replay on", uuid=vdi.uuid, by=rival.client if rival else "a revert")
        mounted.repository.attach(vdi, key, who, True, REPLAY)

        def on_detach() -> None:
            host.theatre.detach(disk)
            mounted.repository.detach(vdi, key, disk.in_order)

        disk = Disk(mounted.engine, vdi.volume, on_detach, on_write=partial(mounted.repository.written, vdi))
        host.theatre.attach(vdi, disk, who)
        return disk

    def reach(self, chosen: Callable[[tuple[str, ...]], bool], who: str) -> list[tuple[str, Disk]]:
        """`simsr.daemon.loads.Reach`"""
        disks: list[tuple[str, Disk]] = []
        try:
            for vdi in list(self._host.all_vdis()):
                if not vdi.is_a_snapshot and chosen((vdi.uuid, vdi.name)):
                    disks.append((vdi.uuid, self.attach(vdi, who)))
        except BaseException:
            for _, disk in disks:
                disk.detach()
            raise
        return disks

    async def start(self, vdi: Vdi, spec: Replay, in_use: bool, is_paced: bool, depth: int, seconds: float | None) -> Running:
        """Open the trace, attach and begin; ends by itself, or when its load is stopped.

        Raises `BadTrace`, `VdiInUse` if somebody uses the VDI and ``in_use`` does not allow that, `VdiReadOnly`."""
        files = TraceFiles(None)
        if vdi.attachments and not in_use:
            raise VdiInUse(operation="replay on", uuid=vdi.uuid, by=vdi.used_by)
        disk = self.attach(vdi, f"replay of {spec.trace.rpartition('/')[2]}")
        try:
            direct = Direct(disk)
            load = Load(
                lambda: make_workload(files, spec, vdi.size_bytes), lambda: disk.scripted or direct, self._host.theatre.alarm, is_paced,
                depth, seconds,
            )  # fmt: skip
            await load.prepare()
        except BaseException:
            disk.detach()
            raise
        running = Running(next(self._numbers), vdi.uuid, load)
        self.running[running.number] = running
        self._host._nursery.start_soon(self._run, running, disk)
        return running

    async def _run(self, running: Running, disk: Disk) -> None:
        try:
            await running.load.run()
        except Exception:
            log.exception("a replay on VDI %s was ended by a bug in simsr", running.vdi)
        finally:
            del self.running[running.number]
            disk.in_order = not running.load.in_flight
            disk.detach()

    def find(self, number: int) -> Running:
        """Raises `NotFound`."""
        if number not in self.running:
            raise NotFound(kind="replay", name=str(number))
        return self.running[number]
