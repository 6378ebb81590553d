"""A client of the simulation that has a disk open as a file: it calls the handlers of the FUSE face as the kernel would, without a kernel.

In direct mode, so each read and write of a program is one of these calls. What pyfuse3 does between the kernel and the handlers is not played.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import outcome
import pyfuse3
import trio
from nbd_wire import FLUSH, FUA, READ, WRITE, Reply
from sim_client import Gone, Session
from sim_machine import Failure
from sim_model import SECTOR

from fs_layout.nodes import ROOT_NUMBER
from fs_layout.operations import Operations

if TYPE_CHECKING:
    from simsr.daemon.host import Host

__all__ = ["FuseSession", "Mount"]

_CONTEXT = SimpleNamespace(pid=1)


class _Turns:
    """`fs_layout.turns.Turns` where every request is a task of its own."""

    def __init__(self) -> None:
        self.ended = trio.Event()

    def pass_on(self) -> None:
        pass


class Mount:
    """What a mount of that host would serve. Its handlers are called in tasks of the daemon, as those of mounts are: they end before it closes
    its stores."""

    def __init__(self, host: Host) -> None:
        self._operations, self._nursery = Operations(host.mounts, _Turns(), writeback=False, shared=False), host._nursery
        self.tree = self._operations.tree

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return partial(self._call, getattr(self._operations, name))

    async def _call(self, handler: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
        ended, results, scope = trio.Event(), [], trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    result = await handler(*arguments)
                    # A buffer may be used again as soon as the handler has returned.
                    results.append(outcome.Value(bytes(result) if isinstance(result, memoryview) else result))
            except Exception as error:
                results.append(outcome.Error(error))
            finally:
                ended.set()

        self._nursery.start_soon(run)
        try:
            await ended.wait()
        finally:  # who is gone asks for nothing any more
            scope.cancel()
            with trio.CancelScope(shield=True):
                await ended.wait()
        return results[0].unwrap()


class FuseSession(Session):
    """One open file."""

    commands = (READ, WRITE, FLUSH)
    _handle: int | None = None

    async def open(self) -> None:
        self.style = "fuse"
        self._operations = operations = self.world.files
        writable = self.disk.of is None and self._rng.random() < 0.7
        self._is_synchronous = writable and self._rng.random() < 0.2
        if not writable:
            self.commands = (READ, FLUSH)
        try:
            number = await self._find(operations)
            flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_SYNC if self._is_synchronous else 0)
            self._handle = (await operations.open(number, flags, _CONTEXT)).fh
            self.sectors = (await operations.getattr(number, _CONTEXT)).st_size // SECTOR
        except pyfuse3.FUSEError as error:
            await self.world.if_up()
            raise Gone(errno.errorcode.get(error.errno, str(error.errno))) from None

    async def _find(self, operations: Mount) -> int:
        """Walk down to the file, as a program that opens its path."""
        folder = operations.tree.folder_name(self.disk.sr) or "gone"
        names = [folder, *(["snapshots"] if self.disk.of is not None else []), f"{self.disk.uuid}.raw"]
        number = ROOT_NUMBER
        for name in names:
            number = (await operations.lookup(number, name.encode(), _CONTEXT)).st_ino
        return number

    async def close(self, in_order: bool) -> None:
        if in_order and self._rng.random() < 0.8:
            await self._one(FLUSH, 0, 0)
        handle, self._handle = self._handle, None
        issue = self.world.tick()
        if handle is not None:
            try:
                await self._operations.release(handle)
            except pyfuse3.FUSEError as error:
                if not self.world.is_excused(self.disk, issue):
                    raise Failure(f"{self.name}: {self.disk.uuid} cannot be closed: {error}") from error
        await self.world.if_up()
        self.lost()

    async def work_once(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(self._rng.choice((1, 1, 2, 4))):
                command, first, count, _ = self.random_request()
                nursery.start_soon(self._one, command, first, count)

    async def _one(self, command: int, first: int, count: int) -> None:
        flags = FUA if self._is_synchronous and command == WRITE else 0
        cookie, data = self.ask(command, first, count, flags)
        reply = Reply(cookie, 0)
        operations = self._operations
        try:
            if command == READ:
                reply.data = await operations.read(self._handle, first * SECTOR, count * SECTOR)
            elif command == WRITE:
                if await operations.write(self._handle, first * SECTOR, data) != len(data):
                    raise Failure(f"{self.name}: a part of a write to {self.disk.uuid} was left out")
            else:
                await operations.fsync(self._handle, True)
        except pyfuse3.FUSEError as error:
            reply.error = error.errno
        await self.world.if_up()
        self.judge(reply)

    def _may_end_at(self, sector: int) -> bool:
        """A revert may have made it smaller below somebody who only reads."""
        return WRITE not in self.commands and sector >= min(self.disk.sectors, self.sectors)
