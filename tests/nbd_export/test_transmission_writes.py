"""Writing over the wire: WRITE, FUA, FLUSH, TRIM, WRITE_ZEROES; and CACHE and BLOCK_STATUS."""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fake_disks import SIZE_BYTES, FakeDisk, pattern, until
from nbd_wire import CACHE, FAST_ZERO, FLUSH, FUA, MIB, NO_HOLE, READ, REQ_ONE, STATUS, TRIM, WRITE, ZEROES, request

from nbd_export import constants as c
from nbd_export import server as server_module
from simsr.errors import BlockDamaged, StoreStopped

STYLES = pytest.mark.parametrize(
    "style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


# --- WRITE, FUA, FLUSH -------------------------------------------------------------------------------------------


@STYLES
@pytest.mark.parametrize("length", [1, 512, 4096, 65537, MIB, 5 * MIB + 1, 32 * MIB])
@pytest.mark.parametrize("offset", [0, 8191])
async def test_write(rig, style, offset, length):
    name = "disk" if length < SIZE_BYTES else "large"
    client = await rig.connect(name, **style)
    disk = rig.disks.disks[name]
    data = bytes(range(1, 256)) * (length // 255 + 1)
    assert not (await client.call(WRITE, offset, payload=data[:length])).error
    assert disk.content[offset : offset + length] == data[:length]
    assert disk.content[offset + length : offset + length + 100] == pattern(offset + length, 100)
    assert not disk.flushes


async def test_writes_of_one_batch_are_done_in_order(rig):
    client = await rig.connect()
    cookies = await client.send_batch(*[(WRITE, n % 3 * 100, 0, bytes([n + 1]) * 300) for n in range(100)], (READ, 0, 500))
    replies = await client.replies(cookies)
    assert not any(reply.error for reply in replies)
    assert replies[-1].data == bytes([100]) * 300 + bytes([99]) * 200, "a read after writes in the same batch"


async def test_a_write_that_has_to_wait_is_finished_in_order(rig):
    disk = rig.disk
    disk.write_limit, disk.write_gate = 2, trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch(*[(WRITE, 0, 0, bytes([n + 1]) * 4096) for n in range(5)])
    assert await client.silent()
    disk.write_gate.set()
    assert not any(reply.error for reply in await client.replies(cookies))
    assert disk.content[:4096] == bytes([5]) * 4096


async def test_fua_is_answered_after_the_flush(rig):
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    slow, plain = await client.send_batch((WRITE, 0, 0, b"a" * 512, FUA), (WRITE, 512, 0, b"b" * 512))
    assert not (await client.reply(plain)).error
    assert await client.silent() and disk.content[:512] == b"a" * 512
    assert (await client.call(READ, 0, 512)).data == b"a" * 512, "reads wait for a flush"
    disk.flush_gate.set()
    assert not (await client.reply(slow)).error
    assert disk.durable


@pytest.mark.parametrize("command", [WRITE, ZEROES, TRIM])
@pytest.mark.parametrize("length", [4096, 2 * MIB])
async def test_fua_with_every_command_that_writes(rig, command, length):
    disk = rig.disk
    client = await rig.connect()
    payload = b"x" * length if command == WRITE else b""
    assert not (await client.call(command, 0, length, payload, FUA)).error
    assert disk.durable and disk.flushes == 1
    names = [entry[0] for entry in disk.log]
    assert names.index("flush") == len(names) - 2 and names[-1] == "flushed"


@pytest.mark.parametrize("command", [READ, FLUSH, CACHE])
async def test_fua_on_commands_without_use_for_it(rig, command):
    client = await rig.connect()
    assert not (await client.call(command, 0, 0 if command == FLUSH else 4096, b"", FUA)).error


async def test_flush_with_nothing_to_do_is_answered_at_once(rig):
    rig.disk.flush_gate = trio.Event()
    client = await rig.connect()
    assert not (await client.call(FLUSH)).error
    assert not rig.disk.flushes


async def test_flush_waits_for_the_disk(rig):
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    assert not (await client.call(WRITE, 0, payload=b"x")).error
    cookie = await client.send(FLUSH)
    assert await client.silent()
    disk.flush_gate.set()
    assert not (await client.reply(cookie)).error


async def test_a_flush_covers_the_writes_before_it_in_the_batch(rig):
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x" * 4096), (FLUSH,), (WRITE, 4096, 0, b"y" * 4096))
    assert not any(reply.error for reply in await client.replies(cookies))
    assert [entry[0] for entry in rig.disk.log].index("flush") > 0


async def test_flushes_that_wait_are_all_answered(rig):
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    await client.call(WRITE, 0, payload=b"x")
    first = await client.send(FLUSH)
    await until(lambda: disk.flushes == 1)
    await client.call(WRITE, 1, payload=b"y")
    more = [await client.send(FLUSH) for _ in range(20)]
    assert await client.silent()
    disk.flush_gate.set()
    assert not any(reply.error for reply in await client.replies([first, *more]))


async def test_flushes_that_fail(rig):
    disk = rig.disk
    disk.flush_failure = StoreStopped(path="sr", reason="fdatasync failed")
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x"), (FLUSH,), (WRITE, 1, 0, b"y", FUA), (READ, 0, 2))
    assert [reply.error for reply in await client.replies(cookies)] == [0, c.NBD_EIO, c.NBD_EIO, 0]
    disk.flush_failure = OSError(errno.EIO, "I/O error")
    assert (await client.call(FLUSH)).error == c.NBD_EIO
    disk.flush_failure = None
    assert not (await client.call(FLUSH)).error


@asynccontextmanager
async def sending_until_blocked(client, data: bytes):
    """Send until nobody can go on; what is yielded is empty if not all was taken then. No more is sent afterwards."""
    sent = []

    async def send() -> None:
        await client.stream.send_all(data)
        sent.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.05)
        yield sent
        nursery.cancel_scope.cancel()


async def test_endless_flushes_without_taking_answers_do_not_pile_up(rig):
    """While a flush is running nothing is answered, so nothing but a limit of our own stops a client that goes on asking."""
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    await client.call(WRITE, 0, payload=b"x")
    flood = b"".join(request(FLUSH, 10_000 + n) for n in range(200_000))
    async with sending_until_blocked(client, flood) as sent:
        assert not sent
    taken = rig.server.statistics()["requests_total"]
    assert taken < 100_000, f"{taken} flushes wait in memory"
    disk.flush_gate.set()
    await until(lambda: rig.server.statistics()["requests_total"] > taken)


async def test_answers_that_come_after_a_flush_do_not_pile_up_for_a_client_that_takes_none(rig, monkeypatch):
    monkeypatch.setattr(server_module, "SOCKET_BUFFER_BYTES", 1 << 14)
    client = await rig.connect()
    count = 40_000
    flood = b"".join(request(WRITE, 10_000 + n, 0, payload=b"f", flags=FUA) for n in range(count))
    async with sending_until_blocked(client, flood) as sent:
        taken = rig.server.statistics()["requests_total"]
        assert not sent, f"{taken} answers wait in memory"
    for n in range(count):
        client.reader.expect(WRITE, 10_000 + n, 0, 1)
    for n in range(0, taken - 1000, 100):  # what it has not taken yet must be right when it does
        assert not (await client.reply(10_000 + n)).error


# --- TRIM, WRITE_ZEROES, CACHE -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (4096, 8192), (1, 4095), (1, 8191), (4095, 2), (100, 100), (4000, 8400), (0, SIZE_BYTES), (SIZE_BYTES - 1, 1),
     (5, 0), (SIZE_BYTES, 0)],
)  # fmt: skip
async def test_trim_touches_whole_blocks_inside_the_range_only(rig, offset, length):
    client = await rig.connect()
    assert not (await client.call(TRIM, offset, length)).error
    before = offset + -offset % 4096
    after = max(before, (offset + length) // 4096 * 4096)
    if before < after:
        assert not any(rig.disk.content[before:after])
    assert rig.disk.content[:before] == pattern(0, min(before, SIZE_BYTES))
    assert rig.disk.content[after : after + 5000] == pattern(after, min(5000, SIZE_BYTES - after))


async def test_trim_at_the_end_of_a_disk_that_ends_within_a_block(rig):
    rig.disks.add("odd", FakeDisk(10 * 4096 + 512))
    client = await rig.connect("odd")
    assert not (await client.call(TRIM, 10 * 4096, 512)).error
    assert not (await client.call(TRIM, 10 * 4096 + 1, 511)).error
    assert not (await client.call(TRIM, 0, 10 * 4096 + 512)).error
    assert not any(rig.disks.disks["odd"].content[: 10 * 4096])


@pytest.mark.parametrize("flags", [0, NO_HOLE, FAST_ZERO, FUA, NO_HOLE | FAST_ZERO | FUA])
@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (1, 10_000), (4095, 1), (512, 3 * MIB), (7, 0)])
async def test_write_zeroes(rig, flags, offset, length):
    client = await rig.connect()
    assert not (await client.call(ZEROES, offset, length, b"", flags)).error
    content = rig.disk.content
    assert not any(content[offset : offset + length])
    assert content[:offset] == pattern(0, offset) and content[offset + length :][:999] == pattern(offset + length, 999)
    assert rig.disk.durable == (bool(flags & FUA) or not length)


async def test_cache(rig):
    disk = rig.disk
    disk.gate = trio.Event()
    client = await rig.connect()
    cookie = await client.send(CACHE, 4096, 3 * MIB)
    assert await client.silent()
    assert (await client.call(READ, 0, 1)).data == pattern(0, 1)
    disk.gate.set()
    assert not (await client.reply(cookie)).error
    assert ("prefetch", 4096, 3 * MIB) in disk.log
    disk.failures[0] = BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0)
    assert (await client.call(CACHE, 0, 4096)).error == c.NBD_EIO


# --- BLOCK_STATUS ------------------------------------------------------------------------------------------------

HOLE = c.NBD_STATE_HOLE | c.NBD_STATE_ZERO


async def test_block_status(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    rig.disk.extents = [(4096, True), (8192, False), (100, True)]
    reply = await client.call(STATUS, 0, 12388)
    assert not reply.error and reply.extents == {1: [(4096, 0), (8192, HOLE), (100, 0)]}
    assert len(reply.chunks) == 1
    one = await client.call(STATUS, 0, 12388, b"", REQ_ONE)
    assert one.extents == {1: [(4096, 0)]}


async def test_block_status_of_up_to_4_gib_at_once(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    assert (await client.call(STATUS, 0, SIZE_BYTES)).extents == {1: [(SIZE_BYTES, 0)]}
    assert (await client.call(STATUS, 0, (1 << 32) - 1)).error == c.NBD_EINVAL


async def test_a_reply_with_very_many_extents_is_bounded(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    rig.disk.extents = [(1, bool(n % 2)) for n in range(1 << 20)]
    reply = await client.call(STATUS, 0, 1 << 20)
    assert 1 <= len(reply.extents[1]) <= 1 << 18


async def test_block_status_needs_a_context(rig):
    client = await rig.connect(structured=True)
    assert (await client.call(STATUS, 0, 4096)).error == c.NBD_EINVAL
    simple = await rig.connect()
    assert (await simple.call(STATUS, 0, 4096)).error == c.NBD_EINVAL


async def test_block_status_of_nothing_and_beyond_the_end(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    assert (await client.call(STATUS, 0, 0)).error == c.NBD_EINVAL
    assert (await client.call(STATUS, SIZE_BYTES - 1, 2)).error == c.NBD_EINVAL
    assert not (await client.call(STATUS, SIZE_BYTES - 1, 1)).error


async def test_block_status_that_fails(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    rig.disk.allocation_failure = StoreStopped(path="sr", reason="it cannot be read")
    cookies = await client.send_batch((STATUS, 0, 4096), (READ, 0, 4096))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EIO, 0]
