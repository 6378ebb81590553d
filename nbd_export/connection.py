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
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import trio

from nbd_export import constants as c
from nbd_export.channel import Channel, TlsChannel
from nbd_export.disk import Disk, Disks, Dropped, Offer, Write, is_answer
from nbd_export.handshake import Handshake, Negotiated, Phase
from nbd_export.limits import Terms
from nbd_export.peer import Peer
from nbd_export.reading import Reader
from nbd_export.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbd_export.scripted import ScriptedRequests
from nbd_export.status import BlockStatus
from nbd_export.transmission import NO_PAYLOAD, ExtendedRequestParser, ProtocolError, Request, RequestParser

__all__ = ["Connection"]

log = logging.getLogger("simsr.nbd")

HANDSHAKE_TIMEOUT_S = 30

_SLOW_MAX = 16  # requests of one connection that wait for a disk at one time
_FLUSHES_MAX = 1024  # requests of one connection that wait for the next flush, and stop it from taking more
_SPIN_MAX_NS = 60_000
_SPIN_MIN_NS = 4_000
_TURN_MAX_NS = 500_000

_CHANGES = (c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_TRIM)


class Owner(Protocol):
    """The server, as far as a connection knows it."""

    requests_total: int

    def may_spin(self, connection: Connection, now_ns: int) -> bool:
        """Whether ``connection`` is the only busy one."""


class Connection:
    """One client. `run` is its task."""

    def __init__(self, server: Owner, channel: Channel, peer: Peer) -> None:
        self._server = server
        self._channel = channel
        self._peer = peer
        self._slow = trio.Semaphore(_SLOW_MAX)
        self._spin_ns = _SPIN_MIN_NS
        self._flushes = 0  # requests that wait for a flush
        self._flush_ended = trio.Event()
        self._failed: dict[int | bytes, Exception] = {}  # cookies of writes in pieces of which one failed
        self._leftover = b""
        self._negotiated: Negotiated
        self._replies: Replies
        self._parser: RequestParser
        self._disk: Disk
        self._terms: Terms
        self._reader: Reader
        self._status: BlockStatus
        self._nursery: trio.Nursery

    async def run(self, disks: Disks, fixed_export: str | None, tls: ssl.SSLContext | None, tls_required: bool) -> None:
        """Serve the client until one side ends it. Raises OSError, `ProtocolError`."""
        ended = None
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
            ended = await self._shake_hands(disks, fixed_export, tls, tls_required)
        if ended is None:
            return
        self._negotiated, offer = ended
        self._disk = offer.attach(self._negotiated.export.name, self.hang_up)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._prepare()
                try:
                    if await self._meet("open"):
                        await self._transmit()
                        await self._until_flushes(0)
                        await self._reader.cold.settled()
                        await self._meet("close")
                finally:
                    with trio.CancelScope(shield=True):  # what a job reads must not be closed meanwhile
                        await self._reader.cold.settled()
            self._channel.say_goodbye()
        finally:
            self._disk.detach()

    def _prepare(self) -> None:
        negotiated, disk, channel = self._negotiated, self._disk, self._channel
        self._terms = disk.terms
        if negotiated.is_tapdisk or not negotiated.structured_replies:  # for which Linux's client, alone among those that boot VMs, never asks
            disk.client_kind = "tapdisk" if negotiated.is_tapdisk else "kernel"
        disk.each_write_durable = self._each_write_durable()
        self._size_bytes = negotiated.export.size_bytes
        self._writable_bytes = 0 if negotiated.export.read_only else self._size_bytes
        if negotiated.extended_headers:
            self._replies, make_parser = ExtendedReplies(), ExtendedRequestParser
        else:
            self._replies, make_parser = StructuredReplies() if negotiated.structured_replies else SimpleReplies(), RequestParser
        self._parser = make_parser(self._writable_bytes)
        self._parser.feed(self._leftover)
        self._reader = Reader(disk, self._replies, channel, self._later, self._post, self._failure)
        self._status = BlockStatus(disk, negotiated.meta_contexts, self._replies, self._failure)
        self._scripted = ScriptedRequests(
            disk, self._replies, channel, self._post, self._failure, self._status_and_answer, self.hang_up, self._each_write_durable
        )

    async def _meet(self, op: str) -> bool:
        """Let coming and going take as long as the scenario says, if there is one; False if the client must go."""
        if self._disk.scripted is None:
            return True
        try:
            await self._disk.scripted.meet(op)
        except (OSError, Dropped) as error:
            log.info("%s: %s: %s", self._peer.label, op, error)
            return False
        return True

    def hang_up(self, reason: str) -> None:
        """Close the connection, whatever is under way."""
        log.info("%s: closed: %s", self._peer.label, reason)
        self._nursery.cancel_scope.cancel()

    async def _shake_hands(
        self, disks: Disks, fixed_export: str | None, tls: ssl.SSLContext | None, tls_required: bool
    ) -> tuple[Negotiated, Offer] | None:
        offer = disks.offer_to(self._peer)
        handshake = Handshake(offer, fixed_export=fixed_export, tls_offered=tls is not None, tls_required=tls_required)
        await self._channel.send(handshake.greeting())
        space = memoryview(bytearray(65536))
        while handshake.result is None:
            try:
                count = self._channel.recv_into(space)
            except BlockingIOError:
                await self._channel.readable()
                continue
            if not count:
                return None
            answer = handshake.receive(space[:count])
            if answer:
                await self._channel.send(answer)
            if handshake.closed:
                return None
            if handshake.phase is Phase.STARTTLS:
                await self._start_tls(handshake, tls)
                offer = disks.offer_to(self._peer)
                handshake.secured(offer)
        self._leftover = handshake.leftover
        return handshake.result, offer

    async def _start_tls(self, handshake: Handshake, context: ssl.SSLContext) -> None:
        """What was said in the clear so far counts for nothing, and what was said too early is refused: anybody may have said it."""
        if handshake.leftover:
            raise ProtocolError("the client, or somebody in between, sent more in the clear behind STARTTLS")
        channel = TlsChannel(self._channel.sock, context)
        try:
            await channel.shake_hands()
        except ssl.SSLError as error:
            raise ProtocolError(f"no TLS: {error.reason or error}") from None
        self._channel, self._peer = channel, replace(self._peer, subject=channel.subject())
        log.info("%s: %s, %s", self._peer.label, channel.describe(), self._peer)

    # The loop.

    async def _transmit(self) -> None:
        parser, server, channel, terms = self._parser, self._server, self._channel, self._terms
        channel.turn_began_ns = channel.now_ns()
        while True:
            batch = parser.requests()
            if batch:
                server.requests_total += len(batch)
                if not await (self._handle(batch) if terms.rate is None else self._handle_at_its_rate(batch)):
                    return
                if channel.unsent:  # answers of flushes: take nothing more until the client has taken them
                    await channel.drained.wait()
                if parser.has_request:
                    await trio.lowlevel.checkpoint()
                    continue
            if not await self._receive():
                return

    async def _receive(self) -> bool:
        """Get more bytes into the parser; False when the client is gone."""
        space, channel = self._parser.space(), self._channel
        now = channel.now_ns()
        if now - channel.turn_began_ns > _TURN_MAX_NS:
            await trio.lowlevel.checkpoint()
            channel.turn_began_ns = now = channel.now_ns()
        waited_for = self._flushes or self._scripted.under_way or self._reader.cold.under_way  # whose end would go unnoticed meanwhile
        may_spin = self._server.may_spin(self, now) and not waited_for
        deadline = now + self._spin_ns if may_spin else 0
        while True:
            try:
                count = channel.recv_into(space)
            except BlockingIOError:
                if deadline:
                    if channel.now_ns() < deadline:
                        continue
                    deadline = 0
                    self._spin_ns = max(_SPIN_MIN_NS, self._spin_ns // 2)
                slept = channel.now_ns()
                await channel.readable()
                channel.turn_began_ns = channel.woken_ns = channel.now_ns()
                if channel.turn_began_ns - slept < _SPIN_MAX_NS:
                    self._spin_ns = min(_SPIN_MAX_NS, self._spin_ns * 4)
                continue
            self._parser.received(count)
            return count > 0

    def _post(self, data: bytes | memoryview) -> None:
        """Send, for callers that cannot wait. Never raises: if the client is gone, its task will notice."""
        try:
            if self._channel.post(data):
                self._nursery.start_soon(self._slow_task, self._channel.drain)
        except OSError as error:
            log.info("%s: gone before its answer: %s", self._peer.label, error)

    # Requests.

    async def _handle_at_its_rate(self, batch: list[Request]) -> bool:
        """`_handle`, when the export's limits allow it."""
        rate = self._terms.rate
        for portion in rate.portions(batch):
            if wait_ns := rate.take(portion, self._channel.now_ns()):
                await trio.sleep(wait_ns / 1e9)
            if not await self._handle(portion):
                return False
        return True

    async def _handle(self, batch: list[Request]) -> bool:
        """Answer one batch; False after DISC."""
        reads: list[Request] = []
        writes: list[Write] = []
        written: list[Request] = []
        flushes: list[Request] = []
        answers: list[bytes] = []
        if self._disk.scripted is not None or self._scripted.pieces:
            return await self._handle_scripted(batch)
        size, writable, going_on, plain = self._size_bytes, self._writable_bytes, True, True
        for request in batch:
            command, flags, _, offset, length, payload, final = request
            if command == c.NBD_CMD_READ and not flags and 0 < length <= c.MAX_REQUEST_BYTES and offset + length <= size:
                reads.append(request)
            elif command == c.NBD_CMD_WRITE and not flags and offset + length <= writable and final:
                writes.append((offset, length, payload))
                written.append(request)
            elif command == c.NBD_CMD_FLUSH and not flags:
                flushes.append(request)
            elif command == c.NBD_CMD_DISC:
                going_on, self._disk.in_order = False, True
                break
            elif problem := self._problem(request):
                if final:
                    answers.append(self._replies.error(request, *problem))
            elif command == c.NBD_CMD_READ and not length:
                answers.append(self._replies.nothing(request))
            elif command == c.NBD_CMD_READ:
                reads.append(request)
            elif command == c.NBD_CMD_WRITE:
                plain = False
                writes.append((offset, length, payload))
                written.append(request)
            elif command in (c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_TRIM):
                if command == c.NBD_CMD_TRIM:
                    start, end = -offset % 4096 + offset, (offset + length) & -4096
                    offset, length = start, max(0, end - start)
                if length > c.CLEAR_AT_ONCE_BYTES:
                    await self._later(self._clear_and_answer, request, offset, length)
                    continue
                plain = False
                writes.append((offset, length, None))
                written.append(request)
            elif command == c.NBD_CMD_FLUSH:
                flushes.append(request)
            elif command == c.NBD_CMD_CACHE:
                await self._later(self._prefetch_and_answer, request)
            else:
                request = self._with_real_length(request)
                if answer := self._status.now(request):
                    answers.append(answer)
                else:
                    await self._later(self._status_and_answer, request)
        if written:
            await self._write(writes, written, answers, flushes, plain)
        if flushes:
            self._flush(flushes, answers)
        if answers:
            await self._channel.send(answers[0] if len(answers) == 1 else b"".join(answers))
        if reads:
            await self._reader.read(reads)
        if self._flushes > _FLUSHES_MAX:
            await self._until_flushes(_FLUSHES_MAX)
        return going_on

    async def _handle_scripted(self, batch: list[Request]) -> bool:
        """`_handle`, for a disk under a scenario: each request by itself."""
        for request in batch:
            if request.command == c.NBD_CMD_DISC:
                self._disk.in_order = True
                return False
            if problem := self._problem(request):
                if request.final:
                    await self._channel.send(self._replies.error(request, *problem))
            elif request.command == c.NBD_CMD_READ and not request.length:
                await self._channel.send(self._replies.nothing(request))
            elif request.final and request.cookie in self._failed:  # of a write whose first pieces came before the scenario
                await self._channel.send(self._failure(request, self._failed.pop(request.cookie)))
            else:
                await self._scripted.start(self._nursery, self._with_real_length(request), request is batch[0])
        for _ in range(2):  # after two rounds of the loop what need not wait is answered, and looking for more holds nobody up
            if self._scripted.under_way:
                await trio.lowlevel.checkpoint()
        return True

    def _problem(self, request: Request) -> tuple[int, str] | None:
        """Why a request cannot be carried out: (NBD error, text); None if it can."""
        command, flags, _, offset, length, payload, _ = request
        if command not in _FLAGS_ALLOWED:
            return c.NBD_EINVAL, f"unknown command {command}"
        if flags & NO_PAYLOAD:
            return c.NBD_EINVAL, "a write without payload"
        if flags & ~_FLAGS_ALLOWED[command]:
            return c.NBD_EINVAL, f"flags {flags:#x} are not allowed with command {command}"
        if command == c.NBD_CMD_FLUSH:
            return None
        changes = command in _CHANGES
        if changes and self._negotiated.export.read_only:
            return c.NBD_EPERM, "the export is read-only"
        if command == c.NBD_CMD_BLOCK_STATUS:
            if flags & c.NBD_CMD_FLAG_PAYLOAD_LEN and (payload is None or len(payload) < 8 or len(payload) % 4):
                return c.NBD_EINVAL, "the payload of a block status has 8 bytes and 4 for each context"
            if problem := self._status.problem(request):
                return c.NBD_EINVAL, problem
            length = self._with_real_length(request).length
            if not length:
                return c.NBD_EINVAL, "block status of an empty range"
        if offset + length > self._size_bytes and not self._has_grown_to(offset + length):
            error = c.NBD_ENOSPC if changes and command != c.NBD_CMD_TRIM else c.NBD_EINVAL
            return error, f"range {offset}+{length} is beyond the end at {self._size_bytes}"
        if command == c.NBD_CMD_READ and length > c.MAX_REQUEST_BYTES:
            error = c.NBD_EOVERFLOW if self._negotiated.extended_headers else c.NBD_EINVAL
            return error, f"a read of {length} bytes exceeds the limit of {c.MAX_REQUEST_BYTES}"
        if command == c.NBD_CMD_READ and flags & c.NBD_CMD_FLAG_DF and not self._replies.in_pieces:
            return c.NBD_EINVAL, "the flag DF needs structured replies"
        return None

    @staticmethod
    def _with_real_length(request: Request) -> Request:
        """A BLOCK_STATUS with a payload has its length in there."""
        if request.payload is None:
            return request
        return request._replace(length=int.from_bytes(request.payload[:8], "big"), payload=bytes(request.payload))

    def _has_grown_to(self, end: int) -> bool:
        """Whether the disk was resized since the client connected, and has ``end`` bytes now."""
        if self._disk.size_bytes > self._size_bytes:
            self._size_bytes = self._disk.size_bytes
            if not self._negotiated.export.read_only:
                self._parser.writable_bytes = self._writable_bytes = self._size_bytes
        return end <= self._size_bytes

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
            log.info("%s: gone before its answer: %s", self._peer.label, error)
            self._nursery.cancel_scope.cancel()  # whatever it still asked for, nobody waits for the answers

    def _failure(self, request: Request, error: Exception) -> bytes:
        number = getattr(error, "nbd_errno", None) or getattr(error, "errno", None) or errno.EIO
        where = f"{self._negotiated.export.name}, bytes {request.offset} to {request.offset + request.length}"
        log.warning("%s: request %s of %s failed: %s", self._peer.label, request.command, where, error)
        return self._replies.error(request, c.wire_error(number), str(error))

    # Writing.

    async def _write(
        self, writes: list[Write], requests: list[Request], answers: list[bytes], flushes: list[Request], plain: bool = False
    ) -> None:
        """Write; what is done goes into ``answers``, what has to be durable first into ``flushes``. ``plain``: none has a flag or more to come."""
        try:
            done = self._disk.write(writes)
            if done < len(writes):
                await self._disk.write_rest(writes, done)
        except Exception as error:
            if not is_answer(error):
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
        durable = self._each_write_durable()
        if plain and not durable and not self._failed:
            answers += self._replies.done(requests)
            return
        acknowledged = []
        for request in requests:
            if not request.final:
                continue
            if request.cookie in self._failed:
                answers.append(self._failure(request, self._failed.pop(request.cookie)))
            elif durable or request.flags & c.NBD_CMD_FLAG_FUA:
                flushes.append(request)
            else:
                acknowledged.append(request)
        answers += self._replies.done(acknowledged)

    def _each_write_durable(self) -> bool:
        chosen = self._terms.each_write_durable
        return self._negotiated.is_tapdisk if chosen is None else chosen

    async def _clear_and_answer(self, request: Request, offset: int, length: int) -> None:
        """Zero a range that is too long to be zeroed without a pause."""
        answers: list[bytes] = []
        flushes: list[Request] = []
        end = offset + length
        while offset < end:
            part = min(c.CLEAR_AT_ONCE_BYTES, end - offset)
            piece = request._replace(offset=offset, length=part, final=offset + part == end)
            await self._write([(offset, part, None)], [piece], answers, flushes)
            offset += part
            await trio.lowlevel.checkpoint()
        if flushes:
            self._flush(flushes, answers)
        if answers:
            await self._channel.send(b"".join(answers))

    def _flush(self, requests: list[Request], answers: list[bytes]) -> None:
        """Answer at once if everything is durable; else when it is, without a task that would have to be woken for that."""
        if self._disk.is_durable():
            answers += self._replies.done(requests)
            return
        self._flushes += len(requests)
        self._disk.flush_soon(partial(self._flushed, requests))

    def _flushed(self, requests: list[Request], error: Exception | None) -> None:
        if error is not None:
            answers = [self._failure(request, error) for request in requests]
        else:
            answers = self._replies.done(requests)
        self._flushes -= len(requests)
        self._flush_ended.set()
        self._post(b"".join(answers))

    async def _until_flushes(self, most: int) -> None:
        """Wait until no more than ``most`` requests wait for a flush."""
        while self._flushes > most:
            self._flush_ended = trio.Event()
            await self._flush_ended.wait()

    # The rest.

    async def _prefetch_and_answer(self, request: Request) -> None:
        try:
            await self._disk.prefetch(request.offset, min(request.length, c.PREFETCH_MAX_BYTES))
        except Exception as error:
            if not is_answer(error):
                raise
            await self._channel.send(self._failure(request, error))
        else:
            await self._channel.send(b"".join(self._replies.done([request])))

    async def _status_and_answer(self, request: Request) -> None:
        await self._channel.send(await self._status.later(request))


_FLAGS_ALLOWED = {
    c.NBD_CMD_READ: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_DF,
    c.NBD_CMD_WRITE: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_FLUSH: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_TRIM: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_CACHE: c.NBD_CMD_FLAG_FUA,
    c.NBD_CMD_WRITE_ZEROES: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_NO_HOLE | c.NBD_CMD_FLAG_FAST_ZERO,
    c.NBD_CMD_BLOCK_STATUS: c.NBD_CMD_FLAG_FUA | c.NBD_CMD_FLAG_REQ_ONE | c.NBD_CMD_FLAG_PAYLOAD_LEN,
}
"""Flags that a command may carry. FUA is harmless on any of them, and some clients set it on all."""

