"""One NBD connection: a trio task that moves bytes between a socket and a disk, in batches.

It takes all requests that have arrived with one receive, hands all writes and then all reads
of that batch to the disk, and sends all replies with one send. It never waits for a disk: what is not in memory, and every
flush, becomes a task of its own whose reply follows later. So one slow request delays nothing, and one slow client only
itself: its task waits in ``send`` with at most one buffer of replies, and reads no more requests.

At depth one the cost of a request is the wake-up, not the work. After a reply the task therefore looks for the next
request for a few microseconds before it goes to sleep (as qemu's event loop does, which calls this adaptive polling), but
only while that pays off, while it is the only busy connection, and never so long that other tasks notice.

Errors of one connection end that connection, and nothing else.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter_ns
from typing import Protocol

import trio

from nbd_export import constants as c
from nbd_export.cold import ColdReader, Waiting
from nbd_export.disk import Disk, Disks, Write
from nbd_export.handshake import Handshake, Negotiated
from nbd_export.transmission import (
    CHUNK,
    DATA_CHUNK,
    PIECE_BYTES,
    SIMPLE_REPLY,
    Request,
    RequestParser,
    lazy_buffer,
    pack_block_status,
    pack_error_chunk,
)

__all__ = ["Connection"]

log = logging.getLogger("simsr.nbd")

HANDSHAKE_TIMEOUT_S = 30

_OUT_BYTES = PIECE_BYTES + 4096
_SLOW_MAX = 16  # requests of one connection that wait for a disk at one time
_FLUSHES_MAX = 1024  # requests of one connection that wait for the next flush, and stop it from taking more
_STATUS_EXTENTS_MAX = 1 << 15
_SPIN_MAX_NS = 60_000
_SPIN_MIN_NS = 4_000
_TURN_MAX_NS = 500_000
_LONG_TURN_MAX_NS = 2_000_000  # between the pieces of long reads

_Piece = tuple[Request, int, int, bool]
"""(request, offset in bytes, length in bytes, whether it is the last of its request)"""

_CHANGES = (c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_TRIM)


class Owner(Protocol):
    """The server, as far as a connection knows it."""

    requests_total: int

    def may_spin(self, connection: Connection, now_ns: int) -> bool:
        """Whether ``connection`` is the only busy one."""


def _is_answer(error: Exception) -> bool:
    """Whether an exception is one to answer a request with, and not a bug."""
    return isinstance(error, OSError) or hasattr(error, "nbd_errno")


class Connection:
    """One client. `run` is its task."""

    def __init__(self, server: Owner, sock: socket.socket, client: str) -> None:
        self._server = server
        self.sock = sock
        self._client = client
        self._out = lazy_buffer(_OUT_BYTES)
        self._unsent: deque[bytes | memoryview] = deque()  # not empty: some task is in `_drain`
        self._drained = trio.Event()
        self._slow = trio.Semaphore(_SLOW_MAX)
        self._spin_ns = _SPIN_MIN_NS
        self._turn_began_ns = 0
        self._flushes = 0  # requests that wait for a flush
        self._flush_ended = trio.Event()
        self._failed: dict[int, Exception] = {}  # cookies of writes in pieces of which one failed
        self._leftover = b""
        self._parser: RequestParser
        self._disk: Disk
        self._negotiated: Negotiated
        self._nursery: trio.Nursery

    async def run(self, disks: Disks, fixed_export: str | None) -> None:
        negotiated = None
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
            negotiated = await self._shake_hands(disks, fixed_export)
        if negotiated is None:
            return
        self._negotiated = negotiated
        self._size_bytes = negotiated.export.size_bytes
        self._writable_bytes = 0 if negotiated.export.read_only else self._size_bytes
        self._parser = RequestParser(self._writable_bytes)
        self._parser.feed(self._leftover)
        self._structured = negotiated.structured_replies
        self._disk = disks.attach(negotiated.export.name, self._client)
        self._cold_reader = ColdReader(self._disk, self._structured, self._send, self._failure)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._transmit()
                await self._until_flushes(0)
        finally:
            self._disk.detach()

    async def _shake_hands(self, disks: Disks, fixed_export: str | None) -> Negotiated | None:
        handshake = Handshake(disks, fixed_export=fixed_export)
        await self._send(handshake.greeting())
        while handshake.result is None:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                continue
            if not data:
                return None
            answer = handshake.receive(data)
            if answer:
                await self._send(answer)
            if handshake.closed:
                return None
        self._leftover = handshake.leftover
        return handshake.result

    # The loop.

    async def _transmit(self) -> None:
        parser, server = self._parser, self._server
        self._turn_began_ns = perf_counter_ns()
        while True:
            batch = parser.requests()
            if batch:
                server.requests_total += len(batch)
                if not await self._handle(batch):
                    return
                if self._unsent:  # answers of flushes: take nothing more until the client has taken them
                    await self._drained.wait()
                if parser.has_request:
                    await trio.lowlevel.checkpoint()
                    continue
            if not await self._receive():
                return

    async def _receive(self) -> bool:
        """Get more bytes into the parser; False when the client is gone."""
        space = self._parser.space()
        now = perf_counter_ns()
        if now - self._turn_began_ns > _TURN_MAX_NS:
            await trio.lowlevel.checkpoint()
            self._turn_began_ns = now = perf_counter_ns()
        may_spin = self._server.may_spin(self, now) and not self._flushes  # whose end would go unnoticed meanwhile
        deadline = now + self._spin_ns if may_spin else 0
        while True:
            try:
                count = self.sock.recv_into(space)
            except BlockingIOError:
                if deadline:
                    if perf_counter_ns() < deadline:
                        continue
                    deadline = 0
                    self._spin_ns = max(_SPIN_MIN_NS, self._spin_ns // 2)
                slept = perf_counter_ns()
                await trio.lowlevel.wait_readable(self.sock)
                self._turn_began_ns = perf_counter_ns()
                if self._turn_began_ns - slept < _SPIN_MAX_NS:
                    self._spin_ns = min(_SPIN_MAX_NS, self._spin_ns * 4)
                continue
            self._parser.received(count)
            return count > 0

    async def _send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``, not mixed with what others send; waits until the client has taken it."""
        if self._unsent:
            self._unsent.append(data)
            await self._drained.wait()
        elif rest := self._send_now(data):
            self._unsent.append(rest)
            await self._drain()

    def _send_now(self, data: bytes | memoryview) -> bytes | memoryview:
        """Send what can be sent without waiting; returns the rest."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return data
        return b"" if sent == len(data) else memoryview(data)[sent:]

    def _post(self, data: bytes) -> None:
        """`_send` for callers that cannot wait. Never raises: if the client is gone, its task will notice."""
        try:
            if self._unsent:
                self._unsent.append(data)
            elif rest := self._send_now(data):
                self._unsent.append(rest)
                self._nursery.start_soon(self._slow_task, self._drain)
        except OSError as error:
            log.info("%s: gone before its answer: %s", self._client, error)

    async def _drain(self) -> None:
        """Send what waits. Only one task does, the one that found the queue empty."""
        unsent = self._unsent
        try:
            while unsent:
                await trio.lowlevel.wait_writable(self.sock)
                if rest := self._send_now(unsent[0]):
                    unsent[0] = rest
                else:
                    unsent.popleft()
        finally:
            unsent.clear()
            self._drained.set()
            self._drained = trio.Event()

    # Requests.

    async def _handle(self, batch: list[Request]) -> bool:
        """Answer one batch; False after DISC."""
        reads: list[Request] = []
        writes: list[Write] = []
        written: list[Request] = []
        flushes: list[Request] = []
        answers: list[bytes] = []
        size, writable, going_on = self._size_bytes, self._writable_bytes, True
        for request in batch:
            command, flags, _, offset, length, payload, _ = request
            if command == c.NBD_CMD_READ and not flags and 0 < length <= c.MAX_REQUEST_BYTES and offset + length <= size:
                reads.append(request)
            elif command == c.NBD_CMD_WRITE and not flags and offset + length <= writable:
                writes.append((offset, length, payload))
                written.append(request)
            elif command == c.NBD_CMD_FLUSH and not flags:
                flushes.append(request)
            elif command == c.NBD_CMD_DISC:
                going_on = False
                break
            elif problem := self._problem(request):
                if request.final:
                    answers.append(self._error(request, *problem))
            elif command == c.NBD_CMD_READ and not length:
                answers.append(self._nothing(request))
            elif command == c.NBD_CMD_READ:
                reads.append(request)
            elif command == c.NBD_CMD_WRITE:
                writes.append((offset, length, payload))
                written.append(request)
            elif command == c.NBD_CMD_WRITE_ZEROES:
                writes.append((offset, length, None))
                written.append(request)
            elif command == c.NBD_CMD_TRIM:
                start, end = -offset % 4096 + offset, (offset + length) & -4096
                writes.append((start, max(0, end - start), None))
                written.append(request)
            elif command == c.NBD_CMD_FLUSH:
                flushes.append(request)
            elif command == c.NBD_CMD_CACHE:
                await self._later(self._prefetch_and_answer, request)
            elif answer := self._block_status(request):
                answers.append(answer)
            else:
                await self._later(self._status_and_answer, request)
        if written:
            await self._write(writes, written, answers, flushes)
        if flushes:
            self._flush(flushes, answers)
        if answers:
            await self._send(answers[0] if len(answers) == 1 else b"".join(answers))
        if reads:
            await self._read(reads)
        if self._flushes > _FLUSHES_MAX:
            await self._until_flushes(_FLUSHES_MAX)
        return going_on

    def _problem(self, request: Request) -> tuple[int, str] | None:
        """Why a request cannot be carried out: (NBD error, text); None if it can."""
        command, flags, _, offset, length, _, _ = request
        if command not in _FLAGS_ALLOWED:
            return c.NBD_EINVAL, f"unknown command {command}"
        if flags & ~_FLAGS_ALLOWED[command]:
            return c.NBD_EINVAL, f"flags {flags:#x} are not allowed with command {command}"
        if command == c.NBD_CMD_FLUSH:
            return None
        changes = command in _CHANGES
        if changes and self._negotiated.export.read_only:
            return c.NBD_EPERM, "the export is read-only"
        if offset + length > self._size_bytes:
            error = c.NBD_ENOSPC if changes and command != c.NBD_CMD_TRIM else c.NBD_EINVAL
            return error, f"range {offset}+{length} is beyond the end at {self._size_bytes}"
        if command == c.NBD_CMD_READ and length > c.MAX_REQUEST_BYTES:
            return c.NBD_EINVAL, f"a read of {length} bytes exceeds the limit of {c.MAX_REQUEST_BYTES}"
        if command == c.NBD_CMD_READ and flags & c.NBD_CMD_FLAG_DF and not self._structured:
            return c.NBD_EINVAL, "the flag DF needs structured replies"
        if command == c.NBD_CMD_BLOCK_STATUS and not self._negotiated.meta_contexts:
            return c.NBD_EINVAL, "no metadata context was negotiated"
        if command == c.NBD_CMD_BLOCK_STATUS and not length:
            return c.NBD_EINVAL, "block status of an empty range"
        return None

    async def _later(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run ``work`` in a task of its own; waits while too many are under way for this client."""
        await self._slow.acquire()
        self._nursery.start_soon(self._slow_task, self._limited, work, *arguments)

    async def _limited(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await work(*arguments)
        finally:
            self._slow.release()

    async def _slow_task(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        try:
            await work(*arguments)
        except ConnectionError as error:
            log.info("%s: gone before its answer: %s", self._client, error)
            self._nursery.cancel_scope.cancel()  # whatever it still asked for, nobody waits for the answers

    def _error(self, request: Request, error: int, text: str) -> bytes:
        if self._structured and request.command in (c.NBD_CMD_READ, c.NBD_CMD_BLOCK_STATUS):
            return pack_error_chunk(request.cookie, error, text)
        return SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, error, request.cookie)

    def _nothing(self, request: Request) -> bytes:
        """The answer to a read of no bytes; a chunk of data must not be empty."""
        if self._structured:
            done, none = c.NBD_REPLY_FLAG_DONE, c.NBD_REPLY_TYPE_NONE
            return CHUNK.pack(c.NBD_STRUCTURED_REPLY_MAGIC, done, none, request.cookie, 0)
        return SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def _failure(self, request: Request, error: Exception) -> bytes:
        number = getattr(error, "nbd_errno", None) or getattr(error, "errno", None) or errno.EIO
        where = f"{self._negotiated.export.name}, bytes {request.offset} to {request.offset + request.length}"
        log.warning("%s: request %s of %s failed: %s", self._client, request.command, where, error)
        return self._error(request, c.wire_error(number), str(error))

    # Writing.

    async def _write(
        self, writes: list[Write], requests: list[Request], answers: list[bytes], flushes: list[Request]
    ) -> None:
        """Write; what is done goes into ``answers``, what has to be durable first into ``flushes``."""
        try:
            done = self._disk.write(writes)
            if done < len(writes):
                await self._disk.write_rest(writes, done)
        except Exception as error:
            if not _is_answer(error):
                raise
            if len(requests) > 1:  # repeated one by one, so that each gets its own answer
                for write, request in zip(writes, requests):
                    await self._write([write], [request], answers, flushes)
            elif requests[0].final:
                self._failed.pop(requests[0].cookie, None)
                answers.append(self._failure(requests[0], error))
            else:
                self._failed[requests[0].cookie] = error
            return
        pack, magic = SIMPLE_REPLY.pack, c.NBD_SIMPLE_REPLY_MAGIC
        for request in requests:
            if not request.final:
                continue
            if request.cookie in self._failed:
                answers.append(self._failure(request, self._failed.pop(request.cookie)))
            elif request.flags & c.NBD_CMD_FLAG_FUA:
                flushes.append(request)
            else:
                answers.append(pack(magic, 0, request.cookie))

    def _flush(self, requests: list[Request], answers: list[bytes]) -> None:
        """Answer at once if everything is durable; else when it is, without a task that would have to be woken for that."""
        if self._disk.is_durable():
            answers += [SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie) for request in requests]
            return
        self._flushes += len(requests)
        self._disk.flush_soon(partial(self._flushed, requests))

    def _flushed(self, requests: list[Request], error: Exception | None) -> None:
        if error is not None:
            answers = [self._failure(request, error) for request in requests]
        else:
            answers = [SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie) for request in requests]
        self._flushes -= len(requests)
        self._flush_ended.set()
        self._post(b"".join(answers))

    async def _until_flushes(self, most: int) -> None:
        """Wait until no more than ``most`` requests wait for a flush."""
        while self._flushes > most:
            self._flush_ended = trio.Event()
            await self._flush_ended.wait()

    # Reading.

    async def _read(self, requests: list[Request]) -> None:
        """Answer reads, as many as fit into the buffer with each send."""
        header_bytes = DATA_CHUNK.size if self._structured else SIMPLE_REPLY.size
        pieces: list[_Piece] = []
        used = 0
        given_away: set[int] = set()  # cookies of requests that a task of their own will finish
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
        if not self._structured or request.flags & c.NBD_CMD_FLAG_DF:
            small, self._out = self._out, lazy_buffer(header_bytes + request.length)
            try:
                piece = (request, request.offset, request.length, True)
                await self._send_pieces([piece], header_bytes + request.length, given_away)
            finally:
                self._out = small
            return
        offset, left = request.offset, request.length
        while left and request.cookie not in given_away:
            if perf_counter_ns() - self._turn_began_ns > _LONG_TURN_MAX_NS:
                await trio.lowlevel.checkpoint()
                self._turn_began_ns = perf_counter_ns()
            length = min(left, PIECE_BYTES)
            left -= length
            await self._send_pieces([(request, offset, length, not left)], header_bytes + length, given_away)
            offset += length

    async def _send_pieces(self, pieces: list[_Piece], used: int, given_away: set[int]) -> None:
        if not pieces:
            return
        out, at, batch = self._out, 0, []
        if self._structured:
            header_bytes, pack_into, magic = DATA_CHUNK.size, DATA_CHUNK.pack_into, c.NBD_STRUCTURED_REPLY_MAGIC
            for request, offset, length, last in pieces:
                pack_into(out, at, magic, last, c.NBD_REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + length, offset)
                at += header_bytes
                batch.append((offset, out[at : at + length]))
                at += length
        else:
            header_bytes = SIMPLE_REPLY.size
            for request, offset, length, _ in pieces:
                SIMPLE_REPLY.pack_into(out, at, c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie)
                at += header_bytes
                batch.append((offset, out[at : at + length]))
                at += length
        try:
            cold = self._disk.read(batch)
        except Exception as error:
            if not _is_answer(error):
                raise
            cold = list(range(len(pieces)))  # repeated one by one below, so that each gets its own answer
        if not cold:
            await self._send(out[:used])
            return
        await self._send_around(pieces, set(cold), header_bytes, given_away)

    async def _send_around(self, pieces: list[_Piece], cold: set[int], header_bytes: int, given_away: set[int]) -> None:
        """Send the pieces that are there; from the first cold piece of a request on, leave it to a task."""
        at, ready, reader = 0, [], self._cold_reader
        waiting = Waiting()
        for index, (request, offset, length, _) in enumerate(pieces):
            end = at + header_bytes + length
            if request.cookie in given_away:
                pass
            elif index in cold:
                given_away.add(request.cookie)
                rest = request.offset + request.length - offset
                if rest > PIECE_BYTES:
                    await self._later(reader.read_long, request, offset, rest)
                else:
                    if waiting.is_full_with(rest):
                        await self._later(reader.read, waiting)
                        waiting = Waiting()
                    waiting.add(request, offset, rest)
            else:
                ready.append(bytes(self._out[at:end]))
            at = end
        if waiting.requests:
            await self._later(reader.read, waiting)
        if ready:
            await self._send(b"".join(ready))

    # The rest.

    async def _prefetch_and_answer(self, request: Request) -> None:
        try:
            await self._disk.prefetch(request.offset, request.length)
        except Exception as error:
            if not _is_answer(error):
                raise
            await self._send(self._failure(request, error))
        else:
            await self._send(SIMPLE_REPLY.pack(c.NBD_SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def _block_status(self, request: Request) -> bytes | None:
        """The answer, or None if it has to wait for a disk."""
        try:
            extents = self._disk.allocation(request.offset, request.length, self._extents_max(request))
        except Exception as error:
            if not _is_answer(error):
                raise
            return self._failure(request, error)
        return self._status_answer(request, extents) if extents else None

    async def _status_and_answer(self, request: Request) -> None:
        try:
            extents = await self._disk.allocation_cold(request.offset, request.length, self._extents_max(request))
        except Exception as error:
            if not _is_answer(error):
                raise
            await self._send(self._failure(request, error))
        else:
            await self._send(self._status_answer(request, extents))

    @staticmethod
    def _extents_max(request: Request) -> int:
        return 1 if request.flags & c.NBD_CMD_FLAG_REQ_ONE else _STATUS_EXTENTS_MAX

    def _status_answer(self, request: Request, extents: list[tuple[int, bool]]) -> bytes:
        flags = [(length, 0 if data else c.NBD_STATE_HOLE | c.NBD_STATE_ZERO) for length, data in extents]
        return pack_block_status(request.cookie, [(ident, flags) for ident in self._negotiated.meta_contexts.values()])


_FLAGS_ALLOWED = {
    c.NBD_CMD_READ: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_DF,
    c.NBD_CMD_WRITE: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_FLUSH: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_TRIM: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_CACHE: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_WRITE_ZEROES: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_NO_HOLE | c.NBD_CMD_FLAG_FAST_ZERO,
    c.NBD_CMD_BLOCK_STATUS: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_REQ_ONE,
}
"""Flags that a command may carry. FUA is harmless on any of them, and some clients set it on all."""

