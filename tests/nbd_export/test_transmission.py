"""The server's transmission phase: every command and flag, cold disks, slow disks, failing disks, impatient clients."""

from __future__ import annotations

import errno
import logging
import socket
import struct

import pytest
import trio
from fake_disks import LARGE_BYTES, SIZE_BYTES, Client, FakeDisk, pattern
from nbd_wire import request, shake_hands_bytes
from trio.testing import wait_all_tasks_blocked

from nbd_export import constants as c
from nbd_export import connection as connection_module
from nbd_export import server as server_module
from nbd_export.server import NbdServer, listen_tcp
from simsr.errors import BlockDamaged, NoSpace, StoreStopped

READ, WRITE, FLUSH, TRIM = c.NBD_CMD_READ, c.NBD_CMD_WRITE, c.NBD_CMD_FLUSH, c.NBD_CMD_TRIM
CACHE, ZEROES, STATUS, DISC = c.NBD_CMD_CACHE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_BLOCK_STATUS, c.NBD_CMD_DISC
FUA, NO_HOLE, DF, REQ_ONE = c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_NO_HOLE, c.NBD_CMD_FLAG_DF, c.NBD_CMD_FLAG_REQ_ONE
FAST_ZERO = c.NBD_CMD_FLAG_FAST_ZERO
KIB, MIB = 1 << 10, 1 << 20
BOTH = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def no_bugs(caplog):
    """The server must not have met anything that it calls a bug."""
    yield
    bugs = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not bugs, bugs


async def until(condition) -> None:
    with trio.fail_after(TIMEOUT_S):
        while not condition():
            await trio.sleep(0.002)


# --- READ --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, 4096), (4096, 4096), (511, 3), (4095, 2), (123, 256 * KIB), (0, 256 * KIB + 1), (777, MIB),
     (SIZE_BYTES - 1, 1), (SIZE_BYTES - 4096, 4096), (0, SIZE_BYTES)],
)  # fmt: skip
async def test_read(rig, structured, offset, length):
    client = await rig.connect(structured=structured)
    reply = await client.call(READ, offset, length)
    assert not reply.error and reply.data == pattern(offset, length)


@BOTH
@pytest.mark.parametrize("offset", [0, 777])
async def test_the_longest_read(rig, structured, offset):
    client = await rig.connect("large", structured=structured)
    assert (await client.call(READ, offset, c.MAX_REQUEST_BYTES)).data == pattern(offset, c.MAX_REQUEST_BYTES)


async def test_a_structured_read_comes_in_pieces_that_cover_it_in_order(rig):
    client = await rig.connect(structured=True)
    reply = await client.call(READ, 100, 3 * MIB)
    offsets = [struct.unpack_from(">Q", chunk.payload)[0] for chunk in reply.chunks]
    lengths = [len(chunk.payload) - 8 for chunk in reply.chunks]
    assert len(reply.chunks) > 1 and sum(lengths) == 3 * MIB
    assert offsets == [100 + sum(lengths[:index]) for index in range(len(lengths))]
    assert [chunk.done for chunk in reply.chunks] == [False] * (len(lengths) - 1) + [True]


@pytest.mark.parametrize("length", [4096, 300 * KIB, 32 * MIB])
async def test_df_makes_it_one_chunk(rig, length):
    client = await rig.connect("large", structured=True)
    reply = await client.call(READ, 4096, length, flags=DF)
    assert not reply.error and len(reply.chunks) == 1 and reply.data == pattern(4096, length)


async def test_df_without_structured_replies_is_an_error(rig):
    client = await rig.connect()
    assert (await client.call(READ, 0, 4096, flags=DF)).error == c.NBD_EINVAL
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)


@BOTH
async def test_a_batch_of_reads_of_all_sizes(rig, structured):
    client = await rig.connect(structured=structured)
    ranges = [(n * 7_001, n * n * 2000 + 1) for n in range(40)]
    cookies = await client.send_batch(*[(READ, offset, length) for offset, length in ranges])
    replies = await client.replies(cookies)
    assert [reply.data for reply in replies] == [pattern(offset, length) for offset, length in ranges]


@BOTH
async def test_a_read_of_nothing_is_answered(rig, structured):
    client = await rig.connect(structured=structured)
    reply = await client.call(READ, 4096, 0)
    assert reply.error in (0, c.NBD_EINVAL) and reply.data == b""
    assert (await client.call(READ, SIZE_BYTES, 0)).error in (0, c.NBD_EINVAL)
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)


@pytest.mark.parametrize("structured", [False, True])
async def test_a_read_longer_than_the_limit_is_refused_and_the_connection_goes_on(rig, structured):
    client = await rig.connect("large", structured=structured)
    assert (await client.call(READ, 0, c.MAX_REQUEST_BYTES + 1)).error in (c.NBD_EINVAL, c.NBD_EOVERFLOW)
    assert (await client.call(READ, 0, (1 << 32) - 1)).error == c.NBD_EINVAL
    assert (await client.call(READ, 0, 512)).data == pattern(0, 512)


# --- READ of what is not in memory -------------------------------------------------------------------------------


@BOTH
async def test_cold_reads_are_answered_when_they_are_there_and_hot_ones_at_once(rig, structured):
    disk = rig.disk
    disk.cold, disk.gate = [range(MIB, 2 * MIB)], trio.Event()
    client = await rig.connect(structured=structured)
    ranges = [(0, 4096), (MIB, 4096), (8192, 4096), (MIB + 8192, 4096), (2 * MIB, 4096), (MIB - 1, 2)]
    cookies = await client.send_batch(*[(READ, offset, length) for offset, length in ranges])
    for index in (0, 2, 4):
        assert (await client.reply(cookies[index])).data == pattern(*ranges[index])
    assert await client.silent()
    later = await client.call(READ, 12288, 100)
    assert later.data == pattern(12288, 100), "a later request waits for the cold ones"
    disk.gate.set()
    for index in (1, 3, 5):
        assert (await client.reply(cookies[index])).data == pattern(*ranges[index])


@pytest.mark.parametrize("cold", [range(0, 1), range(300 * KIB, 300 * KIB + 1), range(MIB - 1, MIB), range(0, MIB)])
@pytest.mark.parametrize("flags", [0, DF])
async def test_a_long_structured_read_that_is_cold_in_one_place(rig, cold, flags):
    disk = rig.disk
    disk.cold = [cold]
    client = await rig.connect(structured=True)
    ranges = [(0, MIB), (0, 4096), (MIB - 5, 10), (100, 600 * KIB), (MIB, MIB)]
    cookies = await client.send_batch(*[(READ, offset, length, b"", flags) for offset, length in ranges])
    replies = await client.replies(cookies)
    assert [reply.data for reply in replies] == [pattern(*one) for one in ranges]
    if flags:
        assert all(len(reply.chunks) == 1 for reply in replies)


@BOTH
async def test_many_cold_reads_in_one_batch(rig, structured):
    disk = rig.disk
    disk.cold, disk.gate = [range(0, SIZE_BYTES)], trio.Event()
    client = await rig.connect(structured=structured)
    async with trio.open_nursery() as nursery:
        sent = []
        nursery.start_soon(_send_into, client, sent, [(READ, n * 4096, 4096) for n in range(300)])
        await until(lambda: disk.cold_now)
        disk.gate.set()
        await until(lambda: sent)
        replies = await client.replies(sent)
    assert [reply.data for reply in replies] == [pattern(n * 4096, 4096) for n in range(300)]
    assert disk.cold_most <= 64, f"{disk.cold_most} tasks for one client at one time"


async def _send_into(client: Client, sent: list, requests: list) -> None:
    sent += await client.send_batch(*requests)


@BOTH
async def test_the_memory_of_cold_reads_is_bounded(rig, structured):
    """A client that asks for a lot and takes nothing must not make the server hold it all."""
    client = await rig.connect("large", structured=structured)
    disk = rig.disks.disks["large"]
    disk.cold, disk.gate = [range(0, LARGE_BYTES)], trio.Event()
    cookies = await client.send_batch(*[(READ, n * 4096, c.MAX_REQUEST_BYTES) for n in range(20)])
    await until(lambda: disk.cold_now)
    await wait_all_tasks_blocked(0.05)
    assert disk.cold_bytes_most <= 3 * c.MAX_REQUEST_BYTES, f"{disk.cold_bytes_most >> 20} MiB held for one client"
    disk.gate.set()
    for cookie in cookies[:1]:
        assert len((await client.reply(cookie)).data) == c.MAX_REQUEST_BYTES


@BOTH
async def test_a_cold_read_that_fails(rig, structured):
    disk = rig.disk
    disk.cold = [range(0, MIB)]
    disk.failures[8192] = BlockDamaged(path="sr", volume=1, offset_bytes=8192, segment=1, segment_offset=0)
    client = await rig.connect(structured=structured)
    cookies = await client.send_batch((READ, 4096, 4096), (READ, 8192, 4096), (READ, 2 * MIB, 4096), (READ, 12288, 4096))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[0].data == pattern(4096, 4096)


@BOTH
@pytest.mark.parametrize("length", [4096, 2 * MIB])
async def test_a_damaged_block_fails_its_own_read_alone(rig, structured, length):
    rig.disk.failures[MIB + length - 1] = BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0)
    client = await rig.connect(structured=structured)
    cookies = await client.send_batch((READ, 0, 4096), (READ, MIB, length), (READ, 3 * MIB, MIB), (READ, 4096, 1))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[2].data == pattern(3 * MIB, MIB)
    if structured:
        assert "checksum" in replies[1].text


# --- WRITE, FUA, FLUSH -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("length", [1, 512, 4096, 65537, MIB, 5 * MIB + 1, 32 * MIB])
@pytest.mark.parametrize("offset", [0, 8191])
async def test_write(rig, structured, offset, length):
    name = "disk" if length < SIZE_BYTES else "large"
    client = await rig.connect(name, structured=structured)
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


async def test_endless_flushes_without_taking_answers_do_not_pile_up(rig):
    """While a flush is running nothing is answered, so nothing but a limit of our own stops a client that goes on asking."""
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    await client.call(WRITE, 0, payload=b"x")
    flood = b"".join(request(FLUSH, 10_000 + n) for n in range(200_000))
    with trio.move_on_after(0.5):
        await client.stream.send_all(flood)
    taken = rig.server.statistics()["requests_total"]
    assert taken < 100_000, f"{taken} flushes wait in memory"
    disk.flush_gate.set()
    await until(lambda: rig.server.statistics()["requests_total"] > taken)


async def test_answers_that_come_after_a_flush_do_not_pile_up_for_a_client_that_takes_none(rig, monkeypatch):
    monkeypatch.setattr(server_module, "SOCKET_BUFFER_BYTES", 1 << 14)
    client = await rig.connect()
    count = 40_000
    flood = b"".join(request(WRITE, 10_000 + n, 0, payload=b"f", flags=FUA) for n in range(count))
    with trio.move_on_after(3) as sending:
        await client.stream.send_all(flood)
    taken = rig.server.statistics()["requests_total"]
    assert sending.cancelled_caught, f"{taken} answers wait in memory"
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


# --- Requests that cannot be carried out -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("command", "beyond"),
    [(READ, c.NBD_EINVAL), (WRITE, c.NBD_ENOSPC), (ZEROES, c.NBD_ENOSPC), (TRIM, c.NBD_EINVAL), (CACHE, c.NBD_EINVAL)],
)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE_BYTES, 1), (SIZE_BYTES - 1, 2), (SIZE_BYTES - 100, 4096), (2**64 - 1, 1), (2**64 - 4096, 4096), (2**63, 4096),
     (2**64 - 1, 32 * MIB)],
)  # fmt: skip
async def test_out_of_range(rig, structured, command, beyond, offset, length):
    client = await rig.connect(structured=structured)
    payload = bytes(length) if command == WRITE else b""
    assert (await client.call(command, offset, length, payload)).error == beyond
    assert (await client.call(READ, 0, 16)).data == pattern(0, 16)
    assert not [entry for entry in rig.disk.log if entry[0] in ("write", "zero")]


@BOTH
@pytest.mark.parametrize("command", [4242, 8, 65535])
async def test_unknown_commands(rig, structured, command):
    client = await rig.connect(structured=structured)
    cookies = await client.send_batch((command, 0, 4096), (READ, 0, 4096))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EINVAL, 0]


@BOTH
@pytest.mark.parametrize("length", [4096, 2 * MIB])
@pytest.mark.parametrize("flags", [1 << 15, 1 << 6, FUA | 1 << 9, c.NBD_CMD_FLAG_PAYLOAD_LEN])
async def test_unknown_flags_are_answered_once(rig, structured, flags, length):
    client = await rig.connect(structured=structured, meta=(c.BASE_ALLOCATION,) if structured else ())
    commands = [READ, WRITE, TRIM, ZEROES, CACHE, FLUSH] + [STATUS] * structured
    cookies = await client.send_batch(*[(n, 0, length, b"z" * length if n == WRITE else b"", flags) for n in commands])
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EINVAL] * len(commands)
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096), "a write with unknown flags was carried out"


async def test_flags_of_other_commands_are_refused(rig):
    client = await rig.connect(structured=True, meta=(c.BASE_ALLOCATION,))
    wrong = [(WRITE, DF), (READ, NO_HOLE), (READ, REQ_ONE), (TRIM, FAST_ZERO), (STATUS, NO_HOLE), (FLUSH, REQ_ONE)]
    for command, flags in wrong:
        reply = await client.call(command, 0, 0 if command == FLUSH else 16, bytes(16) if command == WRITE else b"", flags)
        assert reply.error == c.NBD_EINVAL, f"command {command} with flags {flags}"


@BOTH
@pytest.mark.parametrize("length", [1, 4096, 2 * MIB])
async def test_a_read_only_disk(rig, structured, length):
    disk = rig.disks.add("snap", FakeDisk(read_only=True))
    client = await rig.connect("snap", structured=structured)
    for command in (WRITE, ZEROES, TRIM):
        cookies = await client.send_batch(
            (command, 0, length, b"w" * length if command == WRITE else b""),
            (command, 0, length, b"w" * length if command == WRITE else b"", FUA),
        )
        assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_EPERM, c.NBD_EPERM]
    assert (await client.call(READ, 0, length)).data == pattern(0, length)
    assert not (await client.call(FLUSH)).error and not (await client.call(CACHE, 0, length)).error
    assert bytes(disk.content[:length]) == pattern(0, length)


@pytest.mark.parametrize("command", [WRITE, ZEROES, TRIM])
async def test_changes_of_length_nothing(rig, command):
    client = await rig.connect()
    for offset in (0, 1, 4096, SIZE_BYTES):
        assert not (await client.call(command, offset, 0)).error
    assert bytes(rig.disk.content) == pattern(0, SIZE_BYTES)


@pytest.mark.parametrize(
    ("failure", "error"),
    [(NoSpace(name="sr", reason="full"), c.NBD_ENOSPC), (StoreStopped(path="sr", reason="EIO"), c.NBD_EIO),
     (OSError(errno.ENOSPC, "no space"), c.NBD_ENOSPC), (OSError(errno.EIO, "I/O error"), c.NBD_EIO),
     (OSError(errno.EBUSY, "busy"), c.NBD_EIO), (OSError("no errno at all"), c.NBD_EIO),
     (BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0), c.NBD_EIO)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)  # fmt: skip
@pytest.mark.parametrize("command", [WRITE, ZEROES, TRIM, READ])
async def test_what_the_disk_raises_becomes_the_error_of_that_request(rig, failure, error, command):
    rig.disk.failures[8192 + 5] = failure
    client = await rig.connect()
    payload = b"q" * 4096 if command == WRITE else b""
    cookies = await client.send_batch(*[(command, n * 4096, 4096, payload) for n in range(5)])
    assert [reply.error for reply in await client.replies(cookies)] == [0, 0, error, 0, 0]
    del rig.disk.failures[8192 + 5]
    assert not (await client.call(command, 8192, 4096, payload)).error


async def test_writes_after_a_failed_one_in_the_same_batch_are_done_in_order(rig):
    rig.disk.failures[8192] = OSError(errno.EIO, "I/O error")
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"1" * 99), (WRITE, 8192, 0, b"2"), (WRITE, 0, 0, b"3" * 9), (READ, 0, 99))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[3].data == b"3" * 9 + b"1" * 90


@pytest.mark.parametrize("place", [0, 700 * KIB, 3 * MIB - 1])
async def test_a_long_write_that_fails_in_one_place_is_answered_once_with_the_error(rig, place):
    rig.disk.failures[place] = NoSpace(name="sr", reason="full")
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"w" * (3 * MIB)), (WRITE, 3 * MIB, 0, b"v" * MIB, FUA))
    assert [reply.error for reply in await client.replies(cookies)] == [c.NBD_ENOSPC, 0]
    rig.disk.failures.clear()
    assert not (await client.call(WRITE, 0, payload=b"u" * (3 * MIB))).error
    assert bytes(rig.disk.content[: 3 * MIB]) == b"u" * (3 * MIB)


# --- The end of a connection -------------------------------------------------------------------------------------


async def test_disc_finishes_what_is_pending(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(MIB, 2 * MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x", FUA), (READ, MIB, 512), (CACHE, 0, 512), (READ, 4096, 512))
    await client.stream.send_all(request(DISC, 0))
    assert (await client.reply(cookies[3])).data == pattern(4096, 512)
    assert await client.silent() and not disk.detached
    disk.gate.set()
    disk.flush_gate.set()
    assert not any(reply.error for reply in await client.replies(cookies[:3]))
    assert await client.at_end()
    await until(lambda: disk.detached == 1)


async def test_what_follows_disc_is_ignored(rig):
    client = await rig.connect()
    before = bytes(rig.disk.content[:10])
    await client.stream.send_all(request(DISC, 0) + request(WRITE, 1, 0, payload=b"later") + b"garbage" * 10)
    assert await client.at_end()
    assert bytes(rig.disk.content[:10]) == before


async def test_a_client_that_closes_its_sending_side_gets_its_answers(rig):
    disk = rig.disk
    disk.flush_gate = trio.Event()
    client = await rig.connect()
    cookies = await client.send_batch((WRITE, 0, 0, b"x", FUA), (READ, 0, 1))
    await client.stream.send_eof()
    assert (await client.reply(cookies[1])).data == b"x"
    disk.flush_gate.set()
    assert not (await client.reply(cookies[0])).error
    assert await client.at_end()


@pytest.mark.parametrize("tail", [request(READ, 1, 0, 4096)[:13], request(WRITE, 1, 0, payload=bytes(MIB))[:-1], b"\x25"])
async def test_a_client_that_closes_in_the_middle_of_a_request(rig, tail):
    client = await rig.connect()
    await client.stream.send_all(tail)
    client.close()
    await until(lambda: rig.disk.detached == 1 and rig.server.connections == 0)
    other = await rig.connect()
    assert (await other.call(READ, 0, 100)).error == 0


async def test_a_client_that_closes_while_its_requests_wait(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    await client.send_batch((READ, 0, 4096), (WRITE, 0, 0, b"x" * 4096, FUA), (CACHE, 0, 4096), (READ, 2 * MIB, 2 * MIB))
    await until(lambda: disk.flushes and disk.cold_now)
    client.close()
    disk.gate.set()
    disk.flush_gate.set()
    await until(lambda: disk.detached == 1 and rig.server.connections == 0)


async def test_a_client_that_takes_no_answers_delays_nobody(rig):
    greedy = await rig.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(greedy.send_batch, *[(READ, 0, SIZE_BYTES) for _ in range(50)])
        other = await rig.connect()
        for n in range(50):
            assert (await other.call(READ, n * 4096, 4096)).data == pattern(n * 4096, 4096)
            assert not (await other.call(WRITE, n * 4096, payload=bytes([n]) * 4096)).error
        nursery.cancel_scope.cancel()
    greedy.close()
    await until(lambda: rig.server.connections == 1)


async def test_two_connections_see_each_others_writes(rig):
    first, second = await rig.connect(), await rig.connect(structured=True)
    for n in range(1, 20):
        assert not (await first.call(WRITE, n * 100, payload=bytes([n]) * 100)).error
        assert (await second.call(READ, n * 100, 100)).data == bytes([n]) * 100
        assert not (await second.call(WRITE, n * 100, payload=bytes([n + 100]) * 50)).error
        assert (await first.call(READ, n * 100, 100)).data == bytes([n + 100]) * 50 + bytes([n]) * 50
    assert rig.disk.attached == 2
    second.close()
    await until(lambda: rig.disk.detached == 1)
    assert not (await first.call(FLUSH)).error


async def test_a_flush_of_one_connection_covers_what_another_was_told_is_written(rig):
    """NBD_FLAG_CAN_MULTI_CONN promises this."""
    first, second = await rig.connect(), await rig.connect()
    assert not (await first.call(WRITE, 0, payload=b"x")).error
    assert not (await second.call(FLUSH)).error
    assert rig.disk.durable


async def test_requests_that_come_with_the_last_option(rig):
    tail = request(WRITE, 1, 0, payload=b"early") + request(READ, 2, 0, 5)
    client = await rig.connect(tail=tail[:40])
    client.reader.expect(WRITE, 1, 0, 5)
    client.reader.expect(READ, 2, 0, 5)
    await client.stream.send_all(tail[40:])
    assert not (await client.reply(1)).error and (await client.reply(2)).data == b"early"


@pytest.mark.parametrize("garbage", [b"\0" * 28, b"GET / HTTP/1.0\r\n\r\n" * 3, request(WRITE, 1, 0, c.MAX_REQUEST_BYTES + 1)])
async def test_garbage_ends_the_connection_and_no_other(rig, garbage):
    client, other = await rig.connect(), await rig.connect()
    await client.stream.send_all(garbage)
    assert await client.at_end()
    assert (await other.call(READ, 0, 10)).data == pattern(0, 10)
    await until(lambda: rig.server.connections == 1 and rig.disk.detached == 1)


async def test_garbage_with_requests_that_wait(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    client = await rig.connect()
    await client.send_batch((READ, 0, 4096), (WRITE, 0, 0, b"x", FUA))
    await until(lambda: disk.flushes and disk.cold_now)
    await client.stream.send_all(b"garbage" * 4)
    assert await client.at_end()
    await until(lambda: disk.detached == 1)


# --- The end of the server ---------------------------------------------------------------------------------------


async def test_a_server_that_is_cancelled_closes_its_connections(rig):
    disk = rig.disk
    disk.cold, disk.gate, disk.flush_gate = [range(0, MIB)], trio.Event(), trio.Event()
    server = NbdServer(rig.disks)
    path = rig.path + "2"
    listener = server_module.listen_unix(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        idle, busy = await Client.connect(path, "disk"), await Client.connect(path, "disk")
        await busy.send_batch((READ, 0, 4096), (WRITE, MIB, 0, b"x", FUA))
        await until(lambda: disk.flushes and disk.cold_now)
        nursery.cancel_scope.cancel()
    assert server.connections == 0 and disk.detached == 2 and not disk.cold_now
    assert await idle.at_end() and await busy.at_end()
    idle.close(), busy.close(), listener.close()


@pytest.mark.parametrize("how", ["broken pipe", "garbage"])
async def test_a_connection_that_breaks_while_the_server_is_cancelled(rig, how):
    """The error of the one connection and the cancellation of the others arrive in one group; the error must stay inside."""
    disk = rig.disk
    disk.cold, disk.gate = [range(MIB, 2 * MIB)], trio.Event()
    server = NbdServer(rig.disks)
    path = rig.path + "2"
    listener = server_module.listen_unix(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        client = await Client.connect(path, "disk")
        await client.send(READ, MIB, 512)
        await until(lambda: disk.cold_now)
        real_write = disk.write

        def last_write(batch):
            nursery.cancel_scope.cancel()
            if how == "broken pipe":
                client.close()
            return real_write(batch)

        disk.write = last_write
        tail = b"" if how == "broken pipe" else bytes(28)
        many = b"".join(request(WRITE, 1000 + n, 0, payload=b"y") for n in range(256))
        await client.stream.send_all(many + tail)
        await trio.sleep(TIMEOUT_S)
    assert nursery.cancel_scope.cancelled_caught or nursery.cancel_scope.cancel_called
    assert server.connections == 0
    client.close(), listener.close()


async def test_a_bug_in_a_disk_ends_its_connection_only(rig, caplog):
    other = await rig.connect()
    rig.disk.failures[0] = ZeroDivisionError("a bug")
    client = await rig.connect()
    await client.send(READ, 0, 4096)
    assert await client.at_end()
    assert (await other.call(READ, 4096, 10)).data == pattern(4096, 10)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR]
    caplog.clear()


async def test_a_handshake_that_takes_too_long_is_ended(rig, monkeypatch):
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT_S", 0.1)
    sock = trio.socket.socket(socket.AF_UNIX)
    with sock:
        await sock.connect(rig.path)
        with trio.fail_after(TIMEOUT_S):
            received = b""
            while data := await sock.recv(100):
                received += data
        assert received[:8] == b"NBDMAGIC"
    await until(lambda: rig.server.connections == 0)


async def test_no_client_keeps_the_server_to_itself(rig, nursery):
    """A socket that takes whatever it is given never makes its connection wait; others must get their turn all the same."""

    class Bottomless(socket.socket):
        def send(self, data, flags=0):
            return len(data)

    ours, theirs = socket.socketpair()
    turns = 0
    turn_of_read = []
    real_read = rig.disk.read

    def read(batch):
        turn_of_read.extend([turns] * (sum(len(view) for _, view in batch) // (64 * KIB)))
        return real_read(batch)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    rig.disk.read = read
    nursery.start_soon(count_turns)
    nursery.start_soon(rig.server._connection, Bottomless(fileno=ours.detach()), "bottomless", "disk")
    with theirs:
        theirs.sendall(shake_hands_bytes("disk", structured=True))
        theirs.sendall(b"".join(request(READ, n, 0, 4 * MIB) for n in range(250)))
        await until(lambda: len(turn_of_read) >= 250 * 64)
    most = max(turn_of_read.count(turn) for turn in set(turn_of_read))
    assert most < 250 * 64 / 4, f"{most * 64} KiB were read without a turn for anybody else"


async def test_tcp_on_loopback_only(rig, nursery):
    listener = listen_tcp("127.0.0.1", 0)
    nursery.start_soon(rig.server.serve, listener)
    host, port = listener.getsockname()
    stream = await trio.open_tcp_stream(host, port)
    client = Client(stream, False)
    await client.exactly(18)
    await stream.send_all(b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
    assert int.from_bytes((await client.exactly(10))[:8], "big") == SIZE_BYTES
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)
    await stream.aclose()
    listener.close()
    for address in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(ValueError, match="loopback"):
            listen_tcp(address, 0)
