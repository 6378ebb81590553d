"""Extended headers: 64-bit lengths, payloads of any command, replies that repeat the offset. Debian's libnbd does not speak them yet."""

from __future__ import annotations

import struct

import pytest
import trio
from fake_disks import LARGE_BYTES, SIZE_BYTES, FakeDisk, pattern, until
from nbd_wire import CACHE, DISC, FLUSH, FUA, KIB, MIB, PAYLOAD_LEN, READ, REQ_ONE, STATUS, TRIM, WRITE, ZEROES, WireClient
from nbd_wire import extended_request

from nbd_export import constants as c
from nbd_export.transmission import ExtendedRequestParser, ProtocolError

HUGE_BYTES = 8 << 40
CHANGED = "simsr:changed/before"


class Huge(FakeDisk):
    """A disk of 8 TiB of zeros that only notes what it is asked."""

    size_bytes = HUGE_BYTES

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= HUGE_BYTES

    def _write_one(self, offset: int, length: int, view: memoryview | None) -> None:
        self._check(offset, length)
        self.durable = False
        self.log.append(("zero" if view is None else "write", offset, length))


@pytest.fixture
def huge(rig, monkeypatch) -> Huge:
    disk = rig.disks.add("huge", Huge())
    monkeypatch.setattr(Huge, "content", range(HUGE_BYTES), raising=False)
    del disk.__dict__["content"]
    return disk


async def test_requests_of_every_kind_in_one_batch(rig):
    client = await rig.connect(extended=True)
    cookies = await client.send_batch(
        (WRITE, 100, 0, b"hello"), (FLUSH,), (READ, 100, 5), (TRIM, 8192, 4096), (ZEROES, 4096, 10, b"", FUA), (CACHE, 0, 512),
    )  # fmt: skip
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0] * 6 and replies[2].data == b"hello"
    assert all(chunk.done for reply in replies for chunk in reply.chunks)
    assert rig.disk.content[4096:4106] == bytes(10) and rig.disk.content[8192:12288] == bytes(4096)


@pytest.mark.parametrize("length", [1, 4096, 512 * KIB, 512 * KIB + 1, 3 * MIB + 5, c.MAX_REQUEST_BYTES])
async def test_a_long_write_comes_in_pieces_and_is_answered_with_its_own_offset(rig, length):
    client = await rig.connect("large", extended=True)
    data = pattern(LARGE_BYTES - length, length)
    assert not (await client.call(WRITE, 777, payload=data)).error
    assert (await client.call(READ, 777, length)).data == data


async def test_a_write_without_payload_flag_is_refused_and_nothing_is_written(rig):
    client = await rig.connect(extended=True)
    cookies = await client.send_batch((WRITE, 0, 4096), (READ, 0, 4096))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [c.NBD_EINVAL, 0] and replies[1].data == pattern(0, 4096)
    assert not [entry for entry in rig.disk.log if entry[0] in ("write", "zero")]


@pytest.mark.parametrize("command", [READ, TRIM, ZEROES, CACHE, FLUSH, STATUS, 77])
@pytest.mark.parametrize("length", [1, 4096, 2 * MIB])
async def test_a_payload_that_does_not_belong_there_is_skipped(rig, command, length):
    client = await rig.connect(extended=True)
    cookies = await client.send_batch((command, 0, 0, b"\x21\xe4\x1c\x71" * (length // 4) or b"x"), (READ, 0, 512))
    replies = await client.replies(cookies)
    assert replies[0].error == c.NBD_EINVAL and replies[1].data == pattern(0, 512)


async def test_a_payload_that_is_too_large_ends_the_connection(rig):
    client = await rig.connect(extended=True)
    await client.stream.send_all(extended_request(ZEROES, 1, 0, c.MAX_REQUEST_BYTES + 1, flags=PAYLOAD_LEN))
    assert await client.at_end()


async def test_lengths_beyond_32_bits(rig, huge):
    client = await rig.connect("huge", extended=True, meta=(c.BASE_ALLOCATION,))
    huge.extents = [(HUGE_BYTES - 4096, False), (4096, True)]
    assert (await client.call(STATUS, 0, HUGE_BYTES)).extents == {1: [(HUGE_BYTES - 4096, 3), (4096, 0)]}
    assert not (await client.call(ZEROES, 4096, 5 << 30)).error
    zeroed = [entry[1:] for entry in huge.log if entry[0] == "zero"]
    assert sum(length for _, length in zeroed) == 5 << 30 and zeroed[0][0] == 4096
    assert all(a + n == b for (a, n), (b, _) in zip(zeroed, zeroed[1:])), "there are gaps"
    assert max(length for _, length in zeroed) <= c.CLEAR_AT_ONCE_BYTES, "nobody else had a turn"
    huge.log.clear()
    assert not (await client.call(TRIM, 1, 3 << 30)).error
    zeroed = [entry[1:] for entry in huge.log if entry[0] == "zero"]
    assert zeroed[0][0] == 4096 and sum(length for _, length in zeroed) == (3 << 30) - 4096
    assert (await client.call(ZEROES, 0, HUGE_BYTES + 1)).error == c.NBD_ENOSPC
    assert (await client.call(TRIM, 1, (1 << 64) - 1)).error == c.NBD_EINVAL
    assert (await client.call(READ, 0, 1 << 40)).error == c.NBD_EOVERFLOW
    assert not (await client.call(CACHE, 0, HUGE_BYTES)).error
    assert huge.log[-1] == ("prefetch", 0, c.PREFETCH_MAX_BYTES)


async def test_a_long_zero_with_fua_is_answered_when_it_is_durable(rig, huge):
    client = await rig.connect("huge", extended=True)
    huge.flush_gate = trio.Event()
    cookie = await client.send(ZEROES, 0, 3 << 30, b"", FUA)
    await until(lambda: huge.flushes)
    assert await client.silent()
    huge.flush_gate.set()
    assert not (await client.reply(cookie)).error and huge.durable


async def test_a_long_zero_that_fails_in_the_middle_is_answered_once(rig, huge):
    client = await rig.connect("huge", extended=True)

    def write_one(offset: int, length: int, view: memoryview | None) -> None:
        if offset >= 1 << 30:
            raise OSError(28, "full")

    huge._write_one = write_one
    cookies = await client.send_batch((ZEROES, 0, 4 << 30), (FLUSH,))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_ENOSPC, 0]


# --- BLOCK_STATUS with a choice of contexts -----------------------------------------------------------------------


def choice(length: int, *idents: int) -> bytes:
    return struct.pack(f">Q{len(idents)}I", length, *idents)


@pytest.fixture
async def chooser(rig):
    rig.disk.extents = [(4096, True), (8192, False)]
    rig.disk.changes[CHANGED] = [(100, True), (300, False)]
    client = await rig.connect(extended=True, meta=(c.BASE_ALLOCATION, c.QEMU_ALLOCATION_DEPTH, CHANGED))
    return client


BASE = {1: [(4096, 0), (8192, 3)]}
DEPTH = {2: [(4096, 1), (8192, 0)]}
DIFFERENT = {18: [(100, 1), (300, 0)]}


async def test_all_contexts_or_those_that_the_payload_names(chooser):
    assert (await chooser.call(STATUS, 0, 12288)).extents == BASE | DEPTH | DIFFERENT
    for idents, wanted in [((1,), BASE), ((2, 1), BASE | DEPTH), ((18,), DIFFERENT), ((18, 1), BASE | DIFFERENT)]:
        assert (await chooser.call(STATUS, 0, 0, choice(12288, *idents))).extents == wanted
    one = await chooser.call(STATUS, 0, 0, choice(12288, 1, 18), REQ_ONE)
    assert one.extents == {1: [(4096, 0)], 18: [(100, 1)]}


@pytest.mark.parametrize(
    "payload",
    [choice(12288), choice(12288, 3), choice(12288, 1, 1), choice(0, 1), choice(SIZE_BYTES + 1, 1), choice(1 << 63, 1), b"1234567",
     choice(12288, 1) + b"x", choice(12288, *range(500))],
    ids=["no context", "unknown", "twice", "nothing", "too long", "huge", "cut", "odd", "many"],
)  # fmt: skip
async def test_a_choice_that_makes_no_sense(chooser, payload):
    assert (await chooser.call(STATUS, 0, 0, payload)).error == c.NBD_EINVAL
    assert (await chooser.call(STATUS, 0, 0, choice(12288, 1))).extents == BASE


async def test_changes_have_to_wait_and_delay_nobody(rig, chooser):
    rig.disk.gate = trio.Event()
    cookies = await chooser.send_batch((STATUS, 0, 4096), (STATUS, 0, 0, choice(12288, 1)), (READ, 0, 512))
    assert (await chooser.reply(cookies[1])).extents == BASE and not (await chooser.reply(cookies[2])).error
    assert await chooser.silent()
    rig.disk.gate.set()
    assert (await chooser.reply(cookies[0])).extents.keys() == {1, 2, 18}


async def test_changes_that_cannot_be_told(rig, chooser):
    async def changed(*_: object) -> list:
        raise OSError(5, "gone")

    rig.disk.changed = changed
    assert (await chooser.call(STATUS, 0, 4096)).error == c.NBD_EIO
    assert (await chooser.call(STATUS, 0, 0, choice(12288, 1))).extents == BASE


async def test_changes_in_structured_replies(rig):
    rig.disk.changes[CHANGED] = [(100, True), (300, False)]
    client = await rig.connect(structured=True, meta=(CHANGED,))
    assert list((await client.call(STATUS, 0, 400)).extents.values()) == [[(100, 1), (300, 0)]]


# --- The parser --------------------------------------------------------------------------------------------------


def test_the_parser_however_the_bytes_are_cut(seeds):
    import random

    for seed in seeds(30):
        rng = random.Random(seed)
        sent, wanted = b"", []
        for cookie in range(40):
            command = rng.choice([READ, WRITE, WRITE, FLUSH, STATUS, ZEROES])
            offset = rng.randrange(1 << 20)
            payload = rng.randbytes(rng.choice([1, 100, 4096, 70_000, 600_000])) if command in (WRITE, STATUS) else b""
            length = rng.choice([0, 1, 1 << 40]) if not payload else len(payload)
            sent += extended_request(command, cookie, offset, length, payload)
            wanted.append((command, cookie, offset, length, payload))
        parser, at, got, parts = ExtendedRequestParser(1 << 30), 0, [], {}
        while at < len(sent) or parser.has_request:
            space = parser.space()
            count = min(len(space), rng.choice([1, 31, 33, 5000, 400_000]), len(sent) - at)
            space[:count] = sent[at : at + count]
            parser.received(count)
            at += count
            for request in parser.requests():
                cookie, offset = struct.unpack(">QQ", request.cookie)
                assert parts.setdefault(cookie, [offset, b""])[0] == offset, "pieces of one write with different offsets to repeat"
                assert request.offset == offset + len(parts[cookie][1])
                parts[cookie][1] += bytes(request.payload or b"")
                if request.final:
                    length = len(parts[cookie][1]) if request.payload is not None else request.length
                    got.append((request.command, cookie, offset, length, parts[cookie][1]))
        assert got == wanted


@pytest.mark.parametrize("magic", [c.NBD_REQUEST_MAGIC, 0, c.NBD_EXTENDED_REPLY_MAGIC])
def test_compact_requests_are_no_extended_ones(magic):
    parser = ExtendedRequestParser(1 << 20)
    parser.feed(struct.pack(">IHHQQQ", magic, 0, READ, 1, 0, 512))
    with pytest.raises(ProtocolError, match="magic"):
        parser.requests()


# --- A real daemon -----------------------------------------------------------------------------------------------


def test_a_daemon_with_extended_headers(shared, make_vdi):
    disk = make_vdi(6 << 40)
    with WireClient.connect(disk["nbd_socket"], extended=True) as client:
        client.write(5 << 40, b"data" * MIB)
        client.flush()
        assert not client.call(ZEROES, (5 << 40) + MIB, MIB).error
        assert client.read((5 << 40) + MIB - 4, 8) == b"data" + bytes(4)
        assert not client.call(ZEROES, 0, 6 << 40, flags=FUA).error
        assert client.read(5 << 40, 4) == bytes(4)
        client.send(DISC)
        with pytest.raises(ConnectionError):
            client.receive()
    assert shared.get(f"/v1/vdis/{disk['uuid']}")["physical_utilisation_bytes"] == 0
