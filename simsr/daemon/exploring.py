"""Crash states of disks: recording what is written, and making the disks that a crash could have left.

A recording begins with a snapshot of the disk, its *base*; from then on the scenario's side of the data path (`simsr.daemon.scripted`) tells a
log of each write and flush. A state is a clone of the base with some of the writes: a disk like any other, made in O(what is written).

    ROOT/crash/<uuid>.log    the log of the disk of that uuid; it stays until it is deleted, so states can be made again later
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import trio

from scenarios.crash_states import Contents, CrashState, enumerate_states, parse_state, pieces_of, sector_hashes, touched
from simsr.daemon import threads
from simsr.daemon.crash_log import CrashLog
from simsr.errors import BadRequest, CannotExplore, NotFound
from simsr.sr.vdi import Vdi
from simsr.store.store import Op, Reset, Resize

if TYPE_CHECKING:
    from simsr.daemon.engine import Disk
    from simsr.daemon.host import Host, Mounted

__all__ = ["Exploring"]

_PIECE_BYTES = 1 << 20
_TOUCHED_BYTES_MAX = 32 << 30


class Exploring:
    """The logs of one daemon."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._logs: dict[str, CrashLog] = {}

    def _path(self, vdi: Vdi) -> str:
        return os.path.join(self._host.root, "crash", f"{vdi.uuid}.log")

    # Recording.

    async def begin(self, mounted: Mounted, vdi: Vdi, each_write: bool) -> CrashLog:
        """Record a disk from now on, in a new log. ``each_write``: every write counts as stable when it is answered.

        Raises `BadRequest` for a snapshot, `CannotExplore` if it is recorded already or the file cannot be made.
        """
        if vdi.is_a_snapshot:
            raise BadRequest(what=f"recording {vdi.uuid}", reason="it is a snapshot, to which nobody writes")
        if vdi.uuid in self._logs:
            raise CannotExplore(what=f"VDI {vdi.uuid}", reason="its writes are recorded already")
        path, base = self._path(vdi), str(uuid4())
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            log = CrashLog.create(path, {"vdi": vdi.uuid, "base": base, "each_write": each_write})
        except OSError as error:
            raise CannotExplore(what=f"VDI {vdi.uuid}", reason=f"{path}: {error.strerror}") from None
        self._logs[vdi.uuid] = log
        try:
            await self._host.theatre.record(vdi, log)
            mounted.repository.snapshot(vdi, uuid=base, name=f"before the crash log of {vdi.uuid[:8]}")
            log.is_recording = True  # with nothing between it and the snapshot
            await mounted.engine.flush()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._host.theatre.record(vdi, None)
            self._forget(vdi.uuid)
            raise
        return log

    def find(self, vdi: Vdi) -> CrashLog:
        """The log of a disk, also one of an earlier daemon. Raises `NotFound`, `CannotExplore` if the file is damaged."""
        if (log := self._logs.get(vdi.uuid)) is not None:
            return log
        try:
            log = CrashLog.open(self._path(vdi))
        except FileNotFoundError:
            raise NotFound(kind="crash log of VDI", name=vdi.uuid) from None
        except (OSError, ValueError) as error:
            raise CannotExplore(what=f"VDI {vdi.uuid}", reason=f"{self._path(vdi)}: {error}") from None
        self._logs[vdi.uuid] = log
        return log

    async def end(self, vdi: Vdi) -> CrashLog:
        """Record no more; the log stays. Raises as `find`."""
        log = self.find(vdi)
        log.is_recording = False
        await self._host.theatre.record(vdi, None)
        return log

    async def delete(self, mounted: Mounted, vdi: Vdi) -> None:
        """Record no more, and forget log and base. Raises as `find`."""
        log = await self.end(vdi)
        with contextlib.suppress(NotFound):
            await self._host.delete_vdi(mounted, self._base(mounted, log))
        self._forget(vdi.uuid)

    def _forget(self, uuid: str) -> None:
        self._logs.pop(uuid).close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._host.root, "crash", f"{uuid}.log"))

    def committed(self, vdis: Mapping[str, Vdi], ops: list[Op]) -> None:
        """The store that has these VDIs has changed: what is no write would be missing in a log."""
        for uuid, log in self._logs.items():
            if not log.is_recording or (vdi := vdis.get(uuid)) is None:
                continue
            for op in ops:
                if isinstance(op, Reset | Resize) and op.ident == vdi.volume.ident:
                    log.failure = log.failure or f"the disk was {'reverted' if isinstance(op, Reset) else 'resized'} meanwhile"

    # States.

    def _base(self, mounted: Mounted, log: CrashLog) -> Vdi:
        base = mounted.repository.vdis.get(log.about["base"])
        if base is None:
            raise NotFound(kind="VDI", name=log.about["base"])
        return base

    def _whole(self, vdi: Vdi) -> CrashLog:
        log = self.find(vdi)
        if log.failure:
            raise CannotExplore(what=f"VDI {vdi.uuid}", reason=f"its log is not whole: {log.failure}")
        return log

    async def states(self, mounted: Mounted, vdi: Vdi, wanted: int, seed: int, sector_bytes: int) -> list[dict[str, Any]]:
        """States with different content, at most ``wanted``; ``sector_bytes`` are written whole or not at all. Raises `CannotExplore`, `NotFound`."""
        log = self._whole(vdi)
        entries = list(log.entries)
        ranges = touched(entries)
        if sum(end - start for start, end in ranges) > _TOUCHED_BYTES_MAX:
            raise CannotExplore(what=f"VDI {vdi.uuid}", reason=f"more than {_TOUCHED_BYTES_MAX >> 30} GiB of it were written or trimmed")
        disk = self._host.plain_disk(self._base(mounted, log))
        try:
            base = [await _hashes(disk, start, end) for start, end in ranges]
        finally:
            disk.detach()

        def enumerate_them() -> list[CrashState]:
            contents = Contents(entries, np.concatenate([np.zeros(0, np.uint64), *base]), log.data)
            return enumerate_states(entries, wanted, seed, contents.digest, sector_bytes)

        found = await threads.run_sync(enumerate_them)
        return [{"state": state.name, "cut": state.cut} for state in found]

    async def make(self, mounted: Mounted, vdi: Vdi, name: str, label: str) -> Vdi:
        """The disk that a crash in the state called ``name`` leaves. Raises `BadRequest`, `CannotExplore`, `NotFound`, `NoSpace`."""
        log, state = self._whole(vdi), parse_state(name)
        if state is None or state.cut > len(log.entries):
            raise BadRequest(what=f"crash state {name[:64]!r}", reason=f"it is no state of a log of {len(log.entries)} writes and flushes")
        pieces = await threads.run_sync(pieces_of, log.entries[: state.cut], state, log.data)
        made = mounted.repository.clone(self._base(mounted, log), name=label)
        self._host.added(made)
        disk = self._host.plain_disk(made)
        try:
            for offset, length, view in pieces:
                for at in range(0, length, _PIECE_BYTES):
                    size = min(_PIECE_BYTES, length - at)
                    batch = [(offset + at, size, None if view is None else view[at : at + size])]
                    if not disk.write(batch):
                        await disk.write_rest(batch, 0)
                    await trio.lowlevel.checkpoint()
            await mounted.engine.flush()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._host.delete_vdi(mounted, made)
            raise
        finally:
            disk.detach()
        return made


async def _hashes(disk: Disk, start: int, end: int) -> np.ndarray:
    """`sector_hashes` of a range."""
    parts = []
    for at in range(start, end, _PIECE_BYTES):
        part = bytearray(min(_PIECE_BYTES, end - at))
        if disk.read([(at, memoryview(part))]):
            (error,) = await disk.read_cold([(at, memoryview(part))])
            if error is not None:
                raise error
        parts.append(sector_hashes(part))
        await trio.lowlevel.checkpoint()
    return np.concatenate(parts)
