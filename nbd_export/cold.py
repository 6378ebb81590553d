"""Reads that have to wait for a disk. A batch of them is one job, however many requests are in it, and mostly no task: to start one and to
wake it again would take longer than everything else that is done for a read here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from nbd_export import constants as c
from nbd_export.channel import Channel
from nbd_export.disk import Disk
from nbd_export.replies import Replies
from nbd_export.transmission import PIECE_BYTES, Request

__all__ = ["ColdReader", "Waiting"]

_TOGETHER_MAX = 8  # a block that a dying disk does not give back keeps so many others waiting


class Waiting:
    """Reads, or the ends of reads, that wait together: up to `PIECE_BYTES` of them, which bounds the memory they take."""

    def __init__(self) -> None:
        self.requests: list[tuple[Request, int, int]] = []  # (request, offset, length)
        self._bytes = 0

    def add(self, request: Request, offset: int, length: int) -> None:
        self.requests.append((request, offset, length))
        self._bytes += length

    def ends(self) -> list[bool]:
        """Whether each is, or ends with, the end of its request."""
        return [offset + length == request.offset + request.length for request, offset, length in self.requests]

    def is_full_with(self, length: int) -> bool:
        return self._bytes + length > PIECE_BYTES or len(self.requests) == _TOGETHER_MAX


class ColdReader:
    """Reads and answers for one connection."""

    def __init__(
        self, disk: Disk, replies: Replies, channel: Channel, post: Callable[[bytes | memoryview], None],
        failure: Callable[[Request, Exception], bytes],
    ) -> None:  # fmt: skip
        self._disk, self._replies, self._channel, self._post, self._failure = disk, replies, channel, post, failure
        self._whole = trio.Lock()  # reads too long to be cut into pieces: one at a time, for their memory
        self.under_way = 0  # jobs for which no task waits
        self._ended = trio.Event()

    def read_soon(self, waiting: Waiting) -> bool:
        """`read` without a task. False: it needs one, which waits for a client that takes nothing."""
        if self._channel.unsent:
            return False
        answers, batch = self._prepare(waiting.requests)
        if not self._disk.read_soon(batch, partial(self._have_read, waiting, answers)):
            return False
        self.under_way += 1
        return True

    def _have_read(self, waiting: Waiting, answers: list[memoryview], errors: list[Exception | None]) -> None:
        self.under_way -= 1
        self._ended.set()
        self._post(self._answer(waiting.requests, waiting.ends(), answers, errors))

    async def settled(self) -> None:
        """Wait until no job is under way for which no task waits."""
        while self.under_way:
            self._ended = trio.Event()
            await self._ended.wait()

    async def read(self, waiting: Waiting) -> None:
        """Read what waits and send all answers at once."""
        await self._read(waiting.requests, waiting.ends())

    async def read_long(self, request: Request, offset: int, length: int) -> None:
        """Read piece by piece; whole, where the client cannot take pieces."""
        if not self._replies.in_pieces or request.flags & c.NBD_CMD_FLAG_DF:
            async with self._whole:
                await self._read([(request, offset, length)], [True])
            return
        end, going_on = offset + length, True
        while going_on and offset < end:
            part = min(PIECE_BYTES, end - offset)
            going_on = await self._read([(request, offset, part)], [offset + part == end])
            offset += part

    async def _read(self, wanted: list[tuple[Request, int, int]], ends: list[bool]) -> bool:
        """Read and send; False when something failed, which was answered then."""
        answers, batch = self._prepare(wanted)
        errors = await self._disk.read_cold(batch)
        await self._channel.send(self._answer(wanted, ends, answers, errors))
        return not any(errors)

    def _prepare(self, wanted: list[tuple[Request, int, int]]) -> tuple[list[memoryview], list[tuple[int, memoryview]]]:
        """(room for the answers, (offset, where its data go) of each)"""
        header_bytes = self._replies.header_bytes
        answers = [memoryview(bytearray(header_bytes + length)) for _, _, length in wanted]
        return answers, [(offset, answer[header_bytes:]) for (_, offset, _), answer in zip(wanted, answers)]

    def _answer(
        self, wanted: list[tuple[Request, int, int]], ends: list[bool], answers: list[memoryview], errors: list[Exception | None]
    ) -> bytes | memoryview:
        sent: list[bytes | memoryview] = []
        for (request, offset, length), end, answer, error in zip(wanted, ends, answers, errors):
            if error is not None:
                sent.append(self._failure(request, error))
                continue
            self._replies.lay_out(answer, [(request, offset, length, end)])
            sent.append(answer)
        return sent[0] if len(sent) == 1 else b"".join(sent)
