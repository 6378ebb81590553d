"""A disk that is asked request by request, whoever asks and with no rules in the way: what carries out the requests of replayed loads, of
recorded disks and of those under a scenario.
"""

from __future__ import annotations

import trio

from nbd_export.constants import CLEAR_AT_ONCE_BYTES
from nbd_export.disk import Disk, Reply

__all__ = ["Direct", "answer", "flush", "read", "write"]


async def read(disk: Disk, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    if length and disk.read([(offset, view)]):
        (error,) = await disk.read_cold([(offset, view)])
        if error is not None:
            raise error
    return data


async def write(disk: Disk, offset: int, length: int, view: memoryview | None) -> None:
    """Write; zeros if there is no view, those of a long range in pieces."""
    while view is None and length > CLEAR_AT_ONCE_BYTES:
        await _write(disk, offset, CLEAR_AT_ONCE_BYTES, None)
        await trio.lowlevel.checkpoint()
        offset, length = offset + CLEAR_AT_ONCE_BYTES, length - CLEAR_AT_ONCE_BYTES
    await _write(disk, offset, length, view)


async def _write(disk: Disk, offset: int, length: int, view: memoryview | None) -> None:
    batch = [(offset, length, view)]
    if not disk.write(batch):
        await disk.write_rest(batch, 0)


async def flush(disk: Disk) -> None:
    if disk.is_durable():
        return
    ended, errors = trio.Event(), []

    def done(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    disk.flush_soon(done)
    await ended.wait()
    if errors[0] is not None:
        raise errors[0]


def answer(reply: Reply | None, data: bytearray | None = None) -> None:
    """Send a reply now, if there is one."""
    if reply is not None:
        reply.prepare(data)
        reply.send()


class Direct:
    """`nbd_export.disk.Scripted` for a disk that nothing is in force on."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def read(self, offset: int, length: int, reply: Reply | None = None) -> bytearray:
        data = await read(self._disk, offset, length)
        answer(reply, data)
        return data

    async def write(
        self, op: str, offset: int, length: int, payload: bytes | bytearray | None, fua: bool, reply: Reply | None = None
    ) -> None:
        if op == "trim":
            start, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
            offset, length = start, max(0, end - start)
        if length:
            await write(self._disk, offset, length, None if payload is None else memoryview(payload))
        if fua:
            await flush(self._disk)
        answer(reply)

    async def flush(self, reply: Reply | None = None) -> None:
        await flush(self._disk)
        answer(reply)

    async def meet(self, op: str, offset: int = 0, length: int = 0) -> None:
        pass
