"""The clients of the simulation: sessions of random requests, each answer held against the model. Over NBD here, over FUSE in `sim_fuse`."""

from __future__ import annotations

import errno
import random
import struct
from typing import TYPE_CHECKING, NamedTuple

import trio
from nbd_wire import DISC, FLUSH, FUA, READ, STATUS, TRIM, WRITE, ZEROES, Reply, ReplyReader, extended_request
from nbd_wire import request as simple_request
from nbd_wire import shake_hands_bytes
from sim_machine import Failure, SimChannel, Socket
from sim_model import NEVER, SECTOR, Disk, Version, payload, sectors_of

from nbd_export import constants as c

if TYPE_CHECKING:
    from sim_world import World

__all__ = ["Gone", "NbdSession", "Session", "STUCK_S"]

BLOCK = 8  # sectors
_NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim", ZEROES: "zero", STATUS: "extents"}
STUCK_S = 120


class Gone(Exception):
    """The server has closed the connection, or refused it."""


class Asked(NamedTuple):
    command: int
    flags: int
    first: int
    count: int
    issue: int
    at_s: float
    versions: list[Version]


class Session:
    """One use of ``disk`` by one client: what it has asked, and whether the answers can be right. Whatever carries bytes is in subclasses."""

    commands = (READ, WRITE, FLUSH, TRIM, ZEROES, STATUS)

    def __init__(self, world: World, disk: Disk, rng: random.Random, name: str) -> None:
        self.world, self.disk, self._rng, self.name = world, disk, rng, name
        self.asked: dict[int, Asked] = {}
        self._cookie = 0
        self._began = world.tick()
        self.sectors = 0
        self.style = ""

    async def open(self) -> None:
        """Raises `Gone` if it is refused."""
        raise NotImplementedError

    async def close(self, in_order: bool) -> None:
        """Leave; returns when nothing of this session can happen any more."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Leave at once, without a word; nothing happens if that was done."""

    @property
    def has_answers(self) -> bool:
        """Whether something has come that the client has not looked at yet."""
        return False

    async def work_once(self) -> None:
        """A batch of requests. Raises `Gone`."""
        raise NotImplementedError

    async def work(self) -> None:
        """Batches of requests, for a while."""
        rng = self._rng
        for _ in range(rng.choice((1, 2, 5, 12))):
            if not min(self.sectors, self.disk.sectors):
                return
            await self.work_once()
            await self.world.think(rng.choice((0, 0, 0.0003, 0.004, 0.1, 1.5)) * rng.random())

    def lost(self) -> None:
        """No answer comes any more."""
        for asked in self.asked.values():
            end = self.world.tick()
            for version in asked.versions:
                version.end = end
            self.world.ended(asked.issue)
        self.asked.clear()

    # Requests.

    def random_request(self) -> tuple[int, int, int, int]:
        """(command, first sector, sectors, flags)"""
        rng, disk = self._rng, self.disk
        sectors = min(self.sectors, disk.sectors)
        command = rng.choices((READ, WRITE, FLUSH, TRIM, ZEROES, STATUS), (30, 50, 15 if self.world.is_volatile else 6, 3, 5, 3))[0]
        if command not in self.commands or disk.of is not None and command in (WRITE, TRIM, ZEROES):
            command = READ
        if command == FLUSH:
            return FLUSH, 0, 0, 0
        count = min(sectors, rng.choice((1, 3, 8, 8, 8, 16, 24, 40, 64)))
        first = rng.randrange(sectors - count + 1)
        if command == TRIM or rng.random() < 0.6:
            first = first // BLOCK * BLOCK
            count = min(sectors - first, -(-count // BLOCK) * BLOCK)
            if command == TRIM and count % BLOCK:
                command = ZEROES
        flags = FUA if command in (WRITE, ZEROES, TRIM) and rng.random() < 0.12 else 0
        return command, first, count, flags

    def ask(self, command: int, first: int = 0, count: int = 0, flags: int = 0) -> tuple[int, bytes]:
        """Note a request in the model; returns (cookie, payload)."""
        world, content = self.world, self.disk.content
        self._cookie += 1
        issue, versions, data = world.tick(), [], b""
        if command in (WRITE, ZEROES, TRIM):
            values = [world.new_value(sector) if command == WRITE else 0 for sector in range(first, first + count)]
            versions = [Version(issue, NEVER, value, False, stable=False) for value in values]
            for sector, version in enumerate(versions, first):
                content.versions[sector].append(version)
            data = payload(values) if command == WRITE else b""
        self.asked[self._cookie] = Asked(command, flags, first, count, issue, trio.current_time(), versions)
        world.begun(issue)
        world.requests += 1
        return self._cookie, data

    def judge(self, reply: Reply) -> None:
        """Hold an answer against the model."""
        world, asked, disk = self.world, self.asked.pop(reply.cookie), self.disk
        end = world.tick()
        what = f"{_NAMES[asked.command]} {asked.first}+{asked.count}"
        world.note(f"{self.name} {what} issued {asked.issue}: {errno.errorcode.get(reply.error, reply.error) if reply.error else 'ok'}")
        for version in asked.versions:
            version.end, version.certain, version.stable = end, not reply.error, bool(asked.flags & FUA)
        if reply.error:
            world.errors += 1
            is_spoiled = reply.error == errno.EIO and self._began <= disk.spoiled
            if not is_spoiled and not world.may_fail(disk, asked.issue, asked.command, reply.error):
                raise Failure(f"{self.name}: {what} of {disk.uuid} failed without a reason: {reply.error} {reply.text}")
        elif asked.command == FLUSH or asked.flags & FUA and asked.versions:
            world.is_durable(disk.sr, asked.issue)
            if asked.command == FLUSH:
                disk.content.flushed(asked.issue)
        elif asked.command == READ and not world.is_damaged(asked.issue):
            self._judge_data(asked, reply, what)
        elif asked.command == STATUS and not world.is_damaged(asked.issue):
            self._judge_extents(asked, reply, what)
        world.ended(asked.issue)
        if asked.versions:
            disk.content.prune(asked.first, asked.first + asked.count, world.oldest(disk.sr))

    def _judge_data(self, asked: Asked, reply: Reply, what: str) -> None:
        if self.disk.unsure >= asked.issue:
            return
        found = sectors_of(reply.data)
        if len(found) < asked.count and not self._may_end_at(asked.first + len(found)):
            raise Failure(f"{self.name}: {what} of {self.disk.uuid} gave {len(found)} sectors")
        left = max(0, self.disk.sectors - asked.first)
        if len(found) > left and not self.world.may_be_refused(self.disk, asked.issue):
            raise Failure(f"{self.name}: {what} of {self.disk.uuid} gave {len(found)} sectors, and it has {left} from there on")
        del found[left:]  # a revert has made it smaller meanwhile
        if wrong := self.disk.content.wrong(found, asked.issue, asked.first, self.disk.coming):
            raise Failure(f"{self.name}: {what} of {self.disk.uuid}: {wrong}")
        self.world.sectors_read += asked.count

    def _may_end_at(self, sector: int) -> bool:
        return False

    def _judge_extents(self, asked: Asked, reply: Reply, what: str) -> None:
        """What is said to read as zeros may hold zeros."""
        sector, disk = asked.first, self.disk
        if disk.unsure >= asked.issue:
            return
        for extents in reply.extents.values():
            for length, flags in extents:
                for at in range(sector, min(sector + length // SECTOR, asked.first + asked.count)):
                    if flags & c.NBD_STATE_ZERO and not disk.content.may_be(at, asked.issue, 0, disk.coming):
                        raise Failure(f"{self.name}: {what}: sector {at} is said to be zero: {disk.content.versions[at]}")
                sector += length // SECTOR

    def judge_end(self) -> None:
        """The server has hung up."""
        issue = min((asked.issue for asked in self.asked.values()), default=self.world.moment)
        self.world.note(f"{self.name} lost its connection with {len(self.asked)} requests under way")
        self.world.disconnects += 1
        if not self.world.is_excused(self.disk, issue):
            raise Failure(f"{self.name}: the daemon closed a connection to {self.disk.uuid} without a reason")
        self.lost()


class NbdSession(Session):
    """One connection to ``disk``."""

    def __init__(self, world: World, disk: Disk, rng: random.Random, name: str) -> None:
        super().__init__(world, disk, rng, name)
        self.style = rng.choice(("simple", "structured", "extended"))
        extended, structured = self.style == "extended", self.style != "simple"
        self.commands = Session.commands if structured else (READ, WRITE, FLUSH, TRIM, ZEROES)
        self._reader = ReplyReader(structured, extended)
        self._request = extended_request if extended else simple_request
        self._sock, self._server_sock = Socket.pair(rng)
        self.closed = trio.Event()

    # Coming and going.

    async def open(self) -> None:
        """Raises `Gone` if the export is refused."""
        host, fixed = self.world.host, self._rng.random() < 0.3
        host._nursery.start_soon(self._serve, host.nbd, self.disk.uuid if fixed else None)
        extended, structured = self.style == "extended", self.style != "simple"
        asked = "whatever" if fixed else self.disk.uuid
        meta = ("base:allocation",) if structured else ()
        await self._send(shake_hands_bytes(asked, structured=structured, extended=extended, meta=meta))
        await self._exactly(18)
        acknowledged, wanted = 0, (3 if meta else 1)
        while acknowledged < wanted:
            _, _, kind, length = struct.unpack(">QIII", await self._exactly(20))
            data = await self._exactly(length)
            if kind & c.NBD_REP_FLAG_ERROR:
                self._sock.close()
                await self.closed.wait()
                raise Gone(data.decode(errors="replace"))
            if kind == c.NBD_REP_INFO and data[:2] == b"\0\0":
                self.sectors = int.from_bytes(data[2:10], "big") // SECTOR
            acknowledged += kind == c.NBD_REP_ACK

    async def _serve(self, server: object, fixed: str | None) -> None:
        try:
            await server.converse(SimChannel(self._server_sock, self.world.journal.now_ns), fixed_export=fixed)
        finally:
            self._server_sock.close()
            self.closed.set()

    async def close(self, in_order: bool) -> None:
        """Leave; returns when nothing of this connection can happen any more."""
        if in_order:
            try:
                await self._send(self._request(DISC, 0))
            except Gone:
                pass
        else:
            self._sock.close()
        await self.closed.wait()
        self._sock.close()
        await self.world.if_up()
        self.lost()

    def abandon(self) -> None:
        self._sock.close()

    # Bytes.

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await self._sock.writable()
            except BrokenPipeError:
                raise Gone from None
        await trio.lowlevel.checkpoint()

    async def _receive(self) -> bytes:
        space = memoryview(bytearray(32 << 10))
        while True:
            await self._sock.readable()
            await self.world.if_up()
            try:
                count = self._sock.recv_into(space)
            except BlockingIOError:
                continue
            if not count:
                await self.closed.wait()
                await self.world.if_up()
                raise Gone
            return bytes(space[:count])

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            await self._sock.readable()
            await self.world.if_up()
            space = memoryview(bytearray(count - len(data)))
            try:
                got = self._sock.recv_into(space)
            except BlockingIOError:
                continue
            if not got:
                await self.closed.wait()
                raise Gone
            data += bytes(space[:got])
        return data

    @property
    def has_answers(self) -> bool:
        return bool(self._sock.incoming.data)

    # Requests.

    def make(self, command: int, first: int = 0, count: int = 0, flags: int = 0) -> bytes:
        """Note a request in the model; returns its bytes."""
        cookie, data = self.ask(command, first, count, flags)
        self._reader.expect(command, cookie, first * SECTOR, count * SECTOR)
        return self._request(command, cookie, first * SECTOR, count * SECTOR, data, flags)

    async def answered(self) -> None:
        """Take what has come and judge it; waits for something. Raises `Gone`."""
        try:
            data = await self._receive()
        except Gone:
            self.judge_end()
            raise
        self._reader.feed(data)
        for cookie in list(self._reader.replies):
            self.judge(self._reader.replies.pop(cookie))

    async def work_once(self) -> None:
        rng = self._rng
        depth = rng.choice((1, 1, 2, 4, 12))
        await self._send(b"".join(self.make(*self.random_request()) for _ in range(depth)))
        leave = rng.randrange(depth) if rng.random() < 0.1 else 0
        while len(self.asked) > leave:
            await self.answered()

    async def read_all(self) -> list[int | None]:
        """All sectors, unjudged. Raises `Gone`, OSError."""
        found: list[int | None] = []
        while len(found) < self.sectors:
            count = min(128, self.sectors - len(found))
            await self._send(self.make(READ, len(found), count))
            (cookie,) = self.asked
            while cookie not in self._reader.replies:
                self._reader.feed(await self._receive())
            reply, asked = self._reader.replies.pop(cookie), self.asked.pop(cookie)
            self.world.ended(asked.issue)
            if reply.error:
                raise OSError(reply.error, f"{self.disk.uuid} cannot be read: {reply.text}")
            found += sectors_of(reply.data)
        return found
