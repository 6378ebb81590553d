"""Answering READ: what is in memory here and now, in large batches; the rest when the disk has it (`nbd_export.cold`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from nbd_export import constants as c
from nbd_export.channel import Channel
from nbd_export.cold import ColdReader, Waiting
from nbd_export.disk import Disk, is_answer
from nbd_export.replies import Piece, Replies
from nbd_export.transmission import PIECE_BYTES, Request, lazy_buffer

__all__ = ["LEND_MIN_BYTES", "Reader"]

_OUT_BYTES = PIECE_BYTES + 4096
LEND_MIN_BYTES = 32 << 10
"""Smaller reads are copied: that costs less than to send them in parts."""
_LONG_TURN_MAX_NS = 2_000_000  # between the pieces of long reads

Later = Callable[..., Awaitable[None]]
"""``await later(work, *arguments)``: run ``work`` in a task of its own, when not too many are under way."""


class Reader:
    """The reads of one connection. It has one buffer, so only the connection's own task may call it."""

    def __init__(
        self, disk: Disk, replies: Replies, channel: Channel, later: Later, post: Callable[[bytes | memoryview], None],
        failure: Callable[[Request, Exception], bytes],
    ) -> None:  # fmt: skip
        self._disk, self._replies, self._channel, self._later = disk, replies, channel, later
        self.cold = ColdReader(disk, replies, channel, post, failure)
        self._out = lazy_buffer(_OUT_BYTES)

    async def read(self, requests: list[Request]) -> None:
        """Answer ``requests``, as many as fit into the buffer with each send."""
        header_bytes = self._replies.header_bytes
        pieces: list[Piece] = []
        used = 0
        given_away: set[int] = set()  # cookies of requests that will be finished later
        for request in requests:
            length = request.length
            if length > PIECE_BYTES:
                await self._send_pieces(pieces, used, given_away)
                pieces, used = [], 0
                await self._read_large(request, header_bytes, given_away)
                continue
            if used + header_bytes + length > len(self._out):
                await self._send_pieces(pieces, used, given_away)
                pieces, used = [], 0
            pieces.append((request, request.offset, length, True))
            used += header_bytes + length
        await self._send_pieces(pieces, used, given_away)

    async def _read_large(self, request: Request, header_bytes: int, given_away: set[int]) -> None:
        """Answer one read piece by piece; whole, in a larger buffer, where the client cannot take pieces."""
        if not self._replies.in_pieces or request.flags & c.NBD_CMD_FLAG_DF:
            small, self._out = self._out, lazy_buffer(header_bytes + request.length)
            try:
                piece = (request, request.offset, request.length, True)
                await self._send_pieces([piece], header_bytes + request.length, given_away)
            finally:
                self._out = small
            return
        offset, left = request.offset, request.length
        while left and request.cookie not in given_away:
            if self._channel.now_ns() - self._channel.turn_began_ns > _LONG_TURN_MAX_NS:
                await trio.lowlevel.checkpoint()
                self._channel.turn_began_ns = self._channel.now_ns()
            length = min(left, PIECE_BYTES)
            left -= length
            await self._send_pieces([(request, offset, length, not left)], header_bytes + length, given_away)
            offset += length

    async def _send_pieces(self, pieces: list[Piece], used: int, given_away: set[int]) -> None:
        if not pieces:
            return
        batch = self._replies.lay_out(self._out, pieces)
        if used >= LEND_MIN_BYTES * len(pieces) and await self._send_lent(batch, used):
            return
        try:
            cold = self._disk.read(batch)
        except Exception as error:
            if not is_answer(error):
                raise
            cold = list(range(len(pieces)))  # repeated one by one below, so that each gets its own answer
        if not cold:
            await self._channel.send(self._out[:used])
            return
        await self._send_around(pieces, set(cold), given_away)

    async def _send_lent(self, batch: list[tuple[int, memoryview]], used: int) -> bool:
        """Send without a copy what the disk lends, if it lends anything and has the rest in memory; whether that was so."""
        disk, out, header_bytes = self._disk, self._out, self._replies.header_bytes
        parts: list[memoryview] = []
        missing: list[tuple[int, memoryview]] = []
        begin = at = 0  # what lies in `out` between them is to be sent from there
        for offset, view in batch:
            lent = disk.lend(offset, len(view))
            at += header_bytes
            if lent is None:
                missing.append((offset, view))
            else:
                parts += (out[begin:at], *lent)
                begin = at + len(view)
            at += len(view)
        if not parts:
            return False
        if begin < used:
            parts.append(out[begin:used])
        try:
            if missing and disk.read(missing):
                return False
        except Exception as error:
            if not is_answer(error):
                raise
            return False
        await self._channel.send_parts(parts)
        return True

    async def _send_around(self, pieces: list[Piece], cold: set[int], given_away: set[int]) -> None:
        """Send the pieces that are there; from the first cold piece of a request on, leave it to those who wait for disks."""
        at, ready, header_bytes = 0, [], self._replies.header_bytes
        waiting = Waiting()
        for index, (request, offset, length, _) in enumerate(pieces):
            end = at + header_bytes + length
            if request.cookie in given_away:
                pass
            elif index in cold:
                given_away.add(request.cookie)
                rest = request.offset + request.length - offset
                if rest > PIECE_BYTES:
                    await self._later(self.cold.read_long, request, offset, rest)
                else:
                    if waiting.is_full_with(rest):
                        await self._wait(waiting)
                        waiting = Waiting()
                    waiting.add(request, offset, rest)
            else:
                ready.append(bytes(self._out[at:end]))
            at = end
        if waiting.requests:
            await self._wait(waiting)
        if ready:
            await self._channel.send(b"".join(ready))

    async def _wait(self, waiting: Waiting) -> None:
        if not self.cold.read_soon(waiting):
            await self._later(self.cold.read, waiting)
