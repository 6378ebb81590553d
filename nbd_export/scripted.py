"""Requests to a disk that a scenario is in force on: each is a task of its own, because each may take its own time. Its answer is sent by
whoever carries the request out (`nbd_export.disk.Reply`), for it is to leave at its time.

The disk says when it is scripted (`Disk.scripted`); the connection then hands its requests over to here, and takes the fast path again
as soon as it is not. What is under way is bounded: so many requests and so many bytes, beyond which the connection reads no more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from nbd_export import constants as c
from nbd_export.channel import Channel
from nbd_export.disk import Disk, Dropped, is_answer
from nbd_export.replies import Replies
from nbd_export.transmission import Request

__all__ = ["ScriptedRequests"]

_REQUESTS_MAX = 1024
_BYTES_MAX = 64 << 20

_OPS = {c.NBD_CMD_WRITE: "write", c.NBD_CMD_WRITE_ZEROES: "zero", c.NBD_CMD_TRIM: "trim"}


class _Reply:
    """`nbd_export.disk.Reply` to one request."""

    __slots__ = ("taken_ns", "woken_ns", "_requests", "_request", "_answer")

    def __init__(self, requests: ScriptedRequests, request: Request, awake_ns: int | None) -> None:
        self.taken_ns = int(trio.current_time() * 1e9)
        self.woken_ns = None if awake_ns is None else self.taken_ns - awake_ns
        self._requests, self._request = requests, request
        self._answer: bytes | memoryview

    def prepare(self, data: bytearray | None) -> None:
        self._answer = self._requests.answer(self._request, data)

    def send(self) -> None:
        self._requests.post(self._answer)


class ScriptedRequests:
    """Those of one connection. ``channel``, ``post``, ``failure`` and ``status`` are the connection's own; ``hang_up`` ends it;
    ``each_write_durable`` says whether every write is answered only when it is durable. ``pieces``: while there are any, more of that write
    must come here.
    """

    def __init__(
        self,
        disk: Disk,
        replies: Replies,
        channel: Channel,
        post: Callable[[bytes | memoryview], None],
        failure: Callable[[Request, Exception], bytes],
        status: Callable[[Request], Awaitable[None]],
        hang_up: Callable[[str], None],
        each_write_durable: Callable[[], bool],
    ) -> None:
        self._disk, self._replies, self._channel, self.post = disk, replies, channel, post
        self._failure, self._status, self._hang_up = failure, status, hang_up
        self._each_write_durable = each_write_durable
        self._scripted = disk.scripted
        self.pieces: dict[int | bytes, tuple[int, bytearray]] = {}  # cookie -> (offset, what has come) of a write in pieces
        self._requests = self._bytes = 0
        self._less = trio.Event()

    @property
    def under_way(self) -> int:
        """How many requests are not answered yet."""
        return self._requests

    async def start(self, nursery: trio.Nursery, request: Request, is_first: bool) -> None:
        """Begin with one request that is in order; waits while too many are under way. ``is_first``: of those that were received together."""
        channel = self._channel
        self._scripted = self._disk.scripted or self._scripted  # a scenario that has just ended answers what it has begun
        payload = None
        if request.command == c.NBD_CMD_WRITE:
            offset, payload = self.pieces.pop(request.cookie, (request.offset, bytearray()))
            payload += request.payload
            if not request.final:
                self.pieces[request.cookie] = offset, payload
                return
            request = request._replace(offset=offset, length=len(payload), payload=None)
        held = request.length if request.command in (c.NBD_CMD_READ, c.NBD_CMD_WRITE) else 0
        while self._requests >= _REQUESTS_MAX or (self._bytes and self._bytes + held > _BYTES_MAX):
            self._less = trio.Event()
            await self._less.wait()
        self._requests += 1
        self._bytes += held
        reply = _Reply(self, request, channel.now_ns() - channel.woken_ns if is_first else None)
        nursery.start_soon(self._perform, request, payload, held, reply)

    async def _perform(self, request: Request, payload: bytearray | None, held: int, reply: _Reply) -> None:
        try:
            await self._carry_out(request, payload, reply)
            if self._channel.unsent:
                await self._channel.drained.wait()
        except Dropped as dropped:
            if dropped.error is not None:
                await self._channel.send(self._failure(request, dropped.error))
            self._hang_up(str(dropped))
        except ConnectionError as error:
            self._hang_up(f"gone before its answer: {error}")
        except Exception as error:
            if not is_answer(error):
                raise
            await self._channel.send(self._failure(request, error))
        finally:
            self._requests -= 1
            self._bytes -= held
            self._less.set()

    async def _carry_out(self, request: Request, payload: bytearray | None, reply: _Reply) -> None:
        scripted = self._scripted
        if request.command == c.NBD_CMD_BLOCK_STATUS:
            await scripted.meet("extents", request.offset, request.length)
            await self._status(request)
        elif request.command in (c.NBD_CMD_READ, c.NBD_CMD_CACHE):
            await scripted.read(request.offset, request.length, reply)
        elif request.command == c.NBD_CMD_FLUSH:
            await scripted.flush(reply)
        else:
            fua = bool(request.flags & c.NBD_CMD_FLAG_FUA) or self._each_write_durable()
            await scripted.write(_OPS[request.command], request.offset, request.length, payload, fua, reply)

    def answer(self, request: Request, data: bytearray | None) -> bytes | memoryview:
        """What to send to a client whose request has been carried out; ``data`` are those of a READ or CACHE."""
        if request.command != c.NBD_CMD_READ:
            return self._replies.done([request])[0]
        answer = memoryview(bytearray(self._replies.header_bytes + len(data)))
        ((_, view),) = self._replies.lay_out(answer, [(request, request.offset, len(data), True)])
        view[:] = data
        return answer
