"""A gate in front of a disk: while it is closed, requests wait in front of it, or fail, whoever they come from.

What lets one swap a disk's content below clients that stay: close the gate, wait until what was under way has ended, swap, open it. Open,
it costs the fast path nothing: a `Disk` whose gate is closed has other methods in place of the fast ones, and they come here.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from simsr.daemon.engine import Disk

__all__ = ["Gate", "Gated"]


class Gate:
    """One closing of the gates of some disks. ``failing``: requests fail with EIO instead of waiting; ``barred``: nobody may attach.

    A gate that fails stays closed for disks that were `spoil`ed: what their clients have cached is wrong, so they have to open anew.
    """

    def __init__(self, failing: bool = False, barred: bool = False) -> None:
        self.failing, self.barred = failing, barred
        self._open = trio.Event()
        self._disks: list[Disk] = []
        self._flushes: list[tuple[Disk, Callable[[Exception | None], None]]] = []

    def close(self, disks: Iterable[Disk]) -> None:
        for disk in disks:
            self._disks.append(disk)
            disk.close_gate(self)

    def spoil(self, disks: Iterable[Disk]) -> None:
        """Their requests fail for good, also when it is open again."""
        for disk in disks:
            disk.is_spoiled = True

    def open(self) -> None:
        """Let everybody go on."""
        self._open.set()
        for disk in self._disks:
            if not disk.is_spoiled:
                disk.open_gate()
        for disk, done in self._flushes:
            disk.flush_soon(done)

    async def emptied(self) -> None:
        """Wait until nothing that came before the gate was closed is under way."""
        while any(disk.under_way for disk in self._disks):
            await trio.sleep(0.001)

    @staticmethod
    def error() -> OSError:
        return OSError(errno.EIO, "the disk was reverted below this client, and fails until it is opened anew, because that was asked for")

    async def passed(self) -> None:
        """Wait until it is open. Raises OSError if it fails instead."""
        if self.failing:
            raise self.error()
        await self._open.wait()

    def flush(self, disk: Disk, done: Callable[[Exception | None], None]) -> None:
        """`Disk.flush_soon` while it is closed."""
        if self.failing:
            done(self.error())
        else:
            self._flushes.append((disk, done))


class Gated:
    """The part of a `Disk` that has to do with its gate. Slow paths go through `_passing`."""

    _FAST = ("read", "lend", "write", "flush_soon", "is_durable", "allocation")

    def __init__(self) -> None:
        self.under_way = 0  # requests on a slow path
        self.is_spoiled = False
        self._gate: Gate | None = None
        self._behind: dict[str, object] = {}  # what the closed gate has replaced in this object

    def close_gate(self, gate: Gate) -> None:
        self._gate = gate
        self._behind = {name: vars(self)[name] for name in self._FAST if name in vars(self)}
        self.read = lambda batch: list(range(len(batch)))  # all of it has to wait: so it comes through `_passing`
        self.lend = lambda offset, length: None
        self.write = lambda batch: 0
        self.flush_soon = lambda done: gate.flush(self, done)
        self.is_durable = lambda: False
        self.allocation = lambda offset, length, extents_max: []

    def open_gate(self) -> None:
        self._gate = None
        for name in self._FAST:
            vars(self).pop(name, None)
        vars(self).update(self._behind)

    async def passed(self) -> None:
        """Wait until no gate is closed. Raises OSError if one fails instead."""
        while self._gate is not None:
            await self._gate.passed()

    @asynccontextmanager
    async def _passing(self) -> AsyncIterator[None]:
        await self.passed()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
