"""Recording what is asked of a disk: every request with its time, length, latency, depth and client, as a trace in our own format.

A disk that is recorded is scripted: its requests come by here (`Tap`) and go on to the scenario, if one is in force, or to the disk. What
was recorded waits in memory for whoever fetches it (`Recording.chunks`), up to `WAITING_MAX_BYTES`; what comes while that is full is counted, and
the trace says where it is missing.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import trio

from nbd_export.disk import Dropped, Reply, Scripted
from scenarios.traces import Info, Record
from scenarios.traces.own import Encoder
from simsr.daemon.alarm import current_ns
from simsr.daemon.direct import Direct

if TYPE_CHECKING:
    from simsr.daemon.engine import Disk

__all__ = ["Recording", "Tap", "WAITING_MAX_BYTES", "script"]

WAITING_MAX_BYTES = 32 << 20
"""800 000 requests, seconds of them, for a client that is slow for a moment."""

_FETCH_S = 0.2


class Recording:
    """One recording of one VDI, with all its clients. It ends by `end`, or after ``seconds``. ``place``: (SR, volume)."""

    def __init__(self, vdi: str, place: tuple[str, int], size_bytes: int, seconds: float | None = None) -> None:
        self.vdi, self.place = vdi, place
        self._encoder = Encoder(Info(device_bytes=size_bytes), vdi)
        self._waiting = bytearray(self._encoder.head)
        self._under_way: dict[_Noted, None] = {}
        self._began_ns = current_ns()
        self._until_s = None if seconds is None else trio.current_time() + seconds
        self._over = trio.Event()
        self._lost_since_ns = self._lost_now = 0
        self.requests = self.lost = 0

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def noting(self, op: str, offset: int, length: int, fua: bool, client: str) -> _Noted:
        """A context in which the request is carried out."""
        return _Noted(self, op, offset, length, fua, client)

    def end(self) -> None:
        """Take no more; what is under way is recorded as not answered."""
        if not self.is_over:
            for noted in self._under_way:
                self._add(noted.record(None, 0))
            self._say_lost()
            self._over.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The trace as it comes, to its end."""
        while True:
            if self._until_s is not None and trio.current_time() >= self._until_s:
                self.end()
            if self._waiting:
                waiting, self._waiting = self._waiting, bytearray()
                yield bytes(waiting)
            elif self.is_over:
                return
            until = trio.current_time() + _FETCH_S
            with trio.move_on_at(until if self._until_s is None else min(until, self._until_s)):
                await self._over.wait()

    def _add(self, record: Record) -> None:
        self.requests += 1
        if len(self._waiting) > WAITING_MAX_BYTES:
            self._lost_since_ns = self._lost_since_ns if self._lost_now else record.issue_ns
            self._lost_now += 1
            self.lost += 1
            return
        self._say_lost()
        self._waiting += self._encoder.encode(record)

    def _say_lost(self) -> None:
        if self._lost_now:
            self._waiting += self._encoder.lost(self._lost_since_ns, self._lost_now)
            self._lost_now = 0

    def statistics(self) -> dict[str, Any]:
        return {
            "vdi": self.vdi, "requests": self.requests, "lost": self.lost, "waiting_bytes": len(self._waiting),
            "age_s": (current_ns() - self._began_ns) / 1e9,
        }  # fmt: skip


class _Noted:
    """One request under way."""

    __slots__ = ("_recording", "_what", "_issue_ns", "_depth", "_client", "_fua")

    def __init__(self, recording: Recording, op: str, offset: int, length: int, fua: bool, client: str) -> None:
        self._recording, self._what, self._fua, self._client = recording, (op, offset, length), fua, client
        self._depth = len(recording._under_way)
        self._issue_ns = current_ns()

    def __enter__(self) -> None:
        self._recording._under_way[self] = None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        recording = self._recording
        del recording._under_way[self]
        if recording.is_over:
            return
        number = _errno_of(error)
        recording._add(self.record(None if number is None else current_ns() - self._issue_ns, number or 0))

    def record(self, latency_ns: int | None, error: int) -> Record:
        op, offset, length = self._what
        issue_ns = self._issue_ns - self._recording._began_ns
        return Record(issue_ns, op, offset, length, latency_ns, error, self._fua, self._depth, client=self._client)


def _errno_of(error: BaseException | None) -> int | None:
    """What the client was told: 0 for success, None if nothing."""
    if error is None:
        return 0
    if isinstance(error, Dropped):
        return None if error.error is None else _errno_of(error.error)
    number = getattr(error, "nbd_errno", None) or getattr(error, "errno", None)
    return number or (errno.EIO if isinstance(error, OSError) else None)


class Tap:
    """`nbd_export.disk.Scripted` of one attachment that is recorded. ``staged``: what the scenario has for it."""

    def __init__(self, recording: Recording, disk: Disk, client: str) -> None:
        self._recording, self._client = recording, client
        self._direct = Direct(disk)
        self.staged: Scripted | None = disk.scripted

    @property
    def _next(self) -> Scripted:
        return self.staged or self._direct

    async def read(self, offset: int, length: int, reply: Reply | None = None) -> bytearray:
        with self._recording.noting("read", offset, length, False, self._client):
            return await self._next.read(offset, length, reply)

    async def write(
        self, op: str, offset: int, length: int, payload: bytes | bytearray | None, fua: bool, reply: Reply | None = None
    ) -> None:
        with self._recording.noting(op, offset, length, fua, self._client):
            await self._next.write(op, offset, length, payload, fua, reply)

    async def flush(self, reply: Reply | None = None) -> None:
        with self._recording.noting("flush", 0, 0, False, self._client):
            await self._next.flush(reply)

    async def meet(self, op: str, offset: int = 0, length: int = 0) -> None:
        await self._next.meet(op, offset, length)

    # Coming and going.

    @staticmethod
    def put(recording: Recording, disk: Disk, client: str) -> None:
        disk.tap = disk.scripted = Tap(recording, disk, client)

    @staticmethod
    def take_away(disk: Disk) -> None:
        if disk.tap is not None:
            disk.scripted, disk.tap = disk.tap.staged, None


def script(disk: Disk, staged: Scripted | None) -> None:
    """Have a scenario in force on a disk, or (None) not any more; behind its tap if it is recorded."""
    if disk.tap is not None:
        disk.tap.staged = staged
    else:
        disk.scripted = staged
