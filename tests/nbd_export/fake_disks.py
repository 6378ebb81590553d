"""Disks of memory for `NbdServer`, with levers; and a client under trio.

A `FakeDisk` does what nbd_export.disk.Disk asks for, and checks what the server promises there: ranges inside the disk,
nothing written to a disk that is read-only. Its levers: ranges that are cold until `open_gate`, flushes that wait,
requests that fail.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import trio
from nbd_wire import MODERN, Reply, ReplyReader, extended_request, go, option, request, set_meta_context

from nbd_export import constants as c
from nbd_export.disk import Write
from nbd_export.handshake import ExportInfo
from nbd_export.limits import Terms
from nbd_export.peer import Peer
from simsr.errors import SimsrError

__all__ = ["FakeDisk", "FakeDisks", "Client", "pattern", "SIZE_BYTES", "LARGE_BYTES", "TIMEOUT_S", "until"]

SIZE_BYTES = 4 << 20
LARGE_BYTES = 48 << 20
TIMEOUT_S = 120


_CONTENT = np.arange(1, LARGE_BYTES // 8 + 1, dtype=">u8").tobytes()


def pattern(offset: int, length: int) -> bytes:
    """What a FakeDisk holds at the start: no two aligned 8-byte words are equal."""
    return _CONTENT[offset : offset + length]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something has come about in another task."""
    with trio.fail_after(TIMEOUT_S):
        while not condition():
            await trio.sleep(0.002)


class FakeDisk:
    """A disk of ``SIZE_BYTES`` bytes."""

    def __init__(self, size_bytes: int = SIZE_BYTES, *, read_only: bool = False) -> None:
        self.terms = Terms()
        self.scripted = None
        self.changes: dict[str, list[tuple[int, bool]]] = {}  # context -> what `changed` answers with
        self.content = bytearray(memoryview(_CONTENT)[:size_bytes])
        self.read_only = read_only
        self.cold: list[range] = []
        self.soon: list[Callable[[], None]] | None = None  # cold reads without a task, which the test carries out; None: there are none
        self.soon_error: Exception | None = None
        self.gate = trio.Event()  # cold reads and prefetches wait for it
        self.gate.set()
        self.write_gate = trio.Event()  # writes, if `write_limit` cuts a batch, wait for it
        self.write_gate.set()
        self.flush_gate = trio.Event()
        self.flush_gate.set()
        self.write_limit: int | None = None  # requests of a batch that `write` does before it needs to wait
        self.lends = False  # does not copy what is long
        self.failures: dict[int, Exception] = {}  # offset -> what any request that covers it raises
        self.flush_failure: Exception | None = None
        self.extents: list[tuple[int, bool]] | None = None  # what `allocation` answers with
        self.allocation_failure: Exception | None = None
        self.allocation_is_cold = False  # the first question has to wait
        self.log: list[tuple] = []
        self.durable = True
        self.detached = self.attached = 0
        self.flushes = 0
        self.cold_now = self.cold_most = 0
        self.cold_bytes_now = self.cold_bytes_most = 0

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset and 0 <= length, (offset, length)
        assert not length or offset + length <= len(self.content), f"{offset}+{length} is outside"
        for place, failure in self.failures.items():
            if offset <= place < offset + length:
                raise failure

    def _is_cold(self, offset: int, length: int) -> bool:
        return any(part.start < offset + length and offset < part.stop for part in self.cold)

    # nbd_export.disk.Disk.

    def read(self, batch: Sequence[tuple[int, memoryview]]) -> list[int]:
        self.log.append(("read", [(offset, len(view)) for offset, view in batch]))
        cold = []
        for index, (offset, view) in enumerate(batch):
            self._check(offset, len(view))
            if self._is_cold(offset, len(view)):
                view[:] = b"\xee" * len(view)  # whoever sends this has not looked at the answer
                cold.append(index)
            else:
                view[:] = self.content[offset : offset + len(view)]
        return cold

    def lend(self, offset: int, length: int) -> list[memoryview] | None:
        if not self.lends or self._is_cold(offset, length) or any(offset <= place < offset + length for place in self.failures):
            return None
        self.log.append(("lend", offset, length))
        view = memoryview(bytes(self.content[offset : offset + length]))
        return [view[: length // 2], view[length // 2 :]]

    def read_soon(self, batch: Sequence[tuple[int, memoryview]], done: Callable[[list[Exception | None]], None]) -> bool:
        """Where ``soon`` is a list, the test has to call what lies there."""
        if self.soon is None:
            return False

        def run() -> None:
            for offset, view in batch:
                view[:] = self.content[offset : offset + len(view)]
            done([self.soon_error] * len(batch))

        self.soon.append(run)
        return True

    async def read_cold(self, batch: Sequence[tuple[int, memoryview]]) -> list[Exception | None]:
        total = sum(len(view) for _, view in batch)
        self.log += [("read_cold", offset, len(view)) for offset, view in batch]
        self.cold_now += 1
        self.cold_bytes_now += total
        self.cold_most = max(self.cold_most, self.cold_now)
        self.cold_bytes_most = max(self.cold_bytes_most, self.cold_bytes_now)
        errors: list[Exception | None] = []
        try:
            await self.gate.wait()
            for offset, view in batch:
                try:
                    self._check(offset, len(view))
                    view[:] = self.content[offset : offset + len(view)]
                    errors.append(None)
                except (OSError, SimsrError) as error:
                    errors.append(error)
        finally:
            self.cold_now -= 1
            self.cold_bytes_now -= total
        return errors

    def write(self, batch: Sequence[Write]) -> int:
        limit = len(batch) if self.write_limit is None else min(self.write_limit, len(batch))
        for offset, length, view in batch[:limit]:
            self._write_one(offset, length, view)
        return limit

    def _write_one(self, offset: int, length: int, view: memoryview | None) -> None:
        assert not self.read_only, "a write reached a read-only disk"
        assert view is None or len(view) == length
        self.log.append(("zero" if view is None else "write", offset, length))
        self._check(offset, length)
        if length:
            self.durable = False
            self.content[offset : offset + length] = bytes(length) if view is None else view

    async def write_rest(self, batch: Sequence[Write], start: int) -> None:
        for offset, length, view in batch[start:]:
            await self.write_gate.wait()
            self._write_one(offset, length, view)

    def is_durable(self) -> bool:
        return self.durable

    async def flush(self) -> None:
        self.log.append(("flush",))
        self.flushes += 1
        await self.flush_gate.wait()
        if self.flush_failure is not None:
            raise self.flush_failure
        self.durable = True
        self.log.append(("flushed",))

    def flush_soon(self, done: Callable[[Exception | None], None]) -> None:
        trio.lowlevel.spawn_system_task(self._flush_and_tell, done)

    async def _flush_and_tell(self, done: Callable[[Exception | None], None]) -> None:
        try:
            await self.flush()
        except (OSError, SimsrError) as error:
            done(error)
        else:
            done(None)

    async def prefetch(self, offset: int, length: int) -> None:
        self.log.append(("prefetch", offset, length))
        await self.gate.wait()
        self._check(offset, length)

    async def allocation_cold(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        self.allocation_is_cold = False
        await self.gate.wait()
        return self.allocation(offset, length, extents_max)

    def allocation(self, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        if self.allocation_is_cold:
            return []
        self.log.append(("allocation", offset, length, extents_max))
        if self.allocation_failure is not None:
            raise self.allocation_failure
        self._check(offset, length)
        return self.extents[:extents_max] if self.extents is not None else [(length, True)]

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    async def changed(self, context: str, offset: int, length: int, extents_max: int) -> list[tuple[int, bool]]:
        self.log.append(("changed", context, offset, length, extents_max))
        await self.gate.wait()
        self._check(offset, length)
        return self.changes[context][:extents_max]

    def detach(self) -> None:
        self.detached += 1


class FakeDisks:
    """Named disks, and one called "large" for those who ask for it."""

    def __init__(self) -> None:
        self.disks: dict[str, FakeDisk] = {}
        self.refusals: dict[str, Callable[[Peer], str]] = {}  # name -> why a client must not have it
        self.hang_ups: dict[str, Callable[[str], None]] = {}
        self._peer = Peer("nobody")

    def offer_to(self, peer: Peer) -> FakeDisks:
        offer = copy.copy(self)
        offer._peer = peer
        return offer

    def add(self, name: str, disk: FakeDisk) -> FakeDisk:
        self.disks[name] = disk
        return disk

    def find(self, name: str) -> ExportInfo | None:
        if name == "large" and name not in self.disks:
            self.add(name, FakeDisk(LARGE_BYTES))
        if name not in self.disks:
            return None
        disk = self.disks[name]
        refusal = self.refusals.get(name, lambda peer: "")(self._peer)
        return ExportInfo(name, len(disk.content), disk.read_only, refusal=refusal)

    def names(self) -> Iterable[str]:
        return [name for name in self.disks if not self.find(name).refusal]

    def contexts(self, name: str) -> Iterable[str]:
        return list(self.disks[name].changes)

    def has_context(self, name: str, context: str) -> bool:
        return context in self.disks[name].changes

    def attach(self, name: str, hang_up: Callable[[str], None]) -> FakeDisk:
        self.disks[name].attached += 1
        self.hang_ups[name] = hang_up
        return self.disks[name]


class Client:
    """An NBD client under trio. Sending waits when the server does not take more; use a task of its own then."""

    def __init__(self, stream: trio.abc.Stream, structured: bool, extended: bool = False) -> None:
        self.stream = stream
        self.reader = ReplyReader(structured or extended, extended)
        self._request = extended_request if extended else request
        self._cookie = 0

    @classmethod
    async def connect(
        cls, path: str, name: str, *, structured: bool = False, extended: bool = False, meta: tuple[str, ...] = (),
        tail: bytes = b"",
    ) -> Client:  # fmt: skip
        """Connect and shake hands; ``tail`` is sent along with the last option."""
        stream = trio.SocketStream(await _connected(path))
        client = cls(stream, structured, extended)
        assert (await client.exactly(18))[:16] == b"NBDMAGICIHAVEOPT"
        if structured or extended:
            style = c.NBD_OPT_EXTENDED_HEADERS if extended else c.NBD_OPT_STRUCTURED_REPLY
            await stream.send_all(MODERN + option(style))
            assert await client._acknowledged()
            if meta:
                await stream.send_all(set_meta_context(name, *meta))
                assert await client._acknowledged()
            await stream.send_all(go(name) + tail)
        else:
            await stream.send_all(MODERN + go(name) + tail)
        assert await client._acknowledged(), f"{name} was refused"
        return client

    async def _acknowledged(self) -> bool:
        while True:
            header = await self.exactly(20)
            kind, length = int.from_bytes(header[12:16], "big"), int.from_bytes(header[16:20], "big")
            await self.exactly(length)
            if kind == c.NBD_REP_ACK or kind & c.NBD_REP_FLAG_ERROR:
                return kind == c.NBD_REP_ACK

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await self.stream.receive_some(count - len(data))
            assert piece, "the server closed the connection"
            data += piece
        return data

    def expect(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        """(cookie, bytes) of a request that the caller sends himself."""
        self._cookie += 1
        length = length or len(payload)
        self.reader.expect(command, self._cookie, offset, length)
        return self._cookie, self._request(command, self._cookie, offset, length, payload, flags)

    async def send(self, *arguments: object, **options: object) -> int:
        """Send one request; returns its cookie."""
        cookie, data = self.expect(*arguments, **options)
        await self.stream.send_all(data)
        return cookie

    async def send_batch(self, *requests: tuple) -> list[int]:
        """Send (command, offset, length, payload, flags) tuples with one send."""
        made = [self.expect(*one) for one in requests]
        await self.stream.send_all(b"".join(data for _, data in made))
        return [cookie for cookie, _ in made]

    async def receive(self) -> None:
        data = await self.stream.receive_some(1 << 20)
        if not data:
            raise EOFError("the server closed the connection")
        self.reader.feed(data)

    async def reply(self, cookie: int, timeout_s: float = TIMEOUT_S) -> Reply:
        with trio.fail_after(timeout_s):
            while cookie not in self.reader.replies:
                await self.receive()
        return self.reader.replies.pop(cookie)

    async def replies(self, cookies: Iterable[int]) -> list[Reply]:
        return [await self.reply(cookie) for cookie in cookies]

    async def call(self, *arguments: object, **options: object) -> Reply:
        return await self.reply(await self.send(*arguments, **options))

    async def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing arrives for a moment."""
        with trio.move_on_after(seconds):
            await self.receive()
            return False
        return True

    async def at_end(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Take what still comes; True when the server has closed, cleanly or with a reset."""
        with trio.fail_after(timeout_s):
            try:
                while True:
                    await self.receive()
            except (EOFError, trio.BrokenResourceError):
                return True

    def close(self) -> None:
        self.stream.socket.close()


async def _connected(path: str) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.connect(path)
    return sock
