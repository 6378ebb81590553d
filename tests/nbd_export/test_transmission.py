"""READ over the wire: every size and flag, in pieces or whole; and of disks whose content is not in memory."""

from __future__ import annotations

import struct

import pytest
import trio
from fake_disks import LARGE_BYTES, SIZE_BYTES, Client, pattern, until
from nbd_wire import DF, KIB, MIB, READ
from trio.testing import wait_all_tasks_blocked

from nbd_export import constants as c
from simsr.errors import BlockDamaged

STYLES = pytest.mark.parametrize(
    "style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"]
)


# --- READ --------------------------------------------------------------------------------------------------------


@STYLES
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, 4096), (4096, 4096), (511, 3), (4095, 2), (123, 256 * KIB), (0, 256 * KIB + 1), (777, MIB),
     (SIZE_BYTES - 1, 1), (SIZE_BYTES - 4096, 4096), (0, SIZE_BYTES)],
)  # fmt: skip
async def test_read(rig, style, offset, length):
    client = await rig.connect(**style)
    reply = await client.call(READ, offset, length)
    assert not reply.error and reply.data == pattern(offset, length)


@STYLES
@pytest.mark.parametrize("offset", [0, 777])
async def test_the_longest_read(rig, style, offset):
    client = await rig.connect("large", **style)
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


@STYLES
async def test_a_batch_of_reads_of_all_sizes(rig, style):
    client = await rig.connect(**style)
    ranges = [(n * 7_001, n * n * 2000 + 1) for n in range(40)]
    cookies = await client.send_batch(*[(READ, offset, length) for offset, length in ranges])
    replies = await client.replies(cookies)
    assert [reply.data for reply in replies] == [pattern(offset, length) for offset, length in ranges]


@STYLES
async def test_a_read_of_nothing_is_answered(rig, style):
    client = await rig.connect(**style)
    reply = await client.call(READ, 4096, 0)
    assert reply.error in (0, c.NBD_EINVAL) and reply.data == b""
    assert (await client.call(READ, SIZE_BYTES, 0)).error in (0, c.NBD_EINVAL)
    assert (await client.call(READ, 0, 4096)).data == pattern(0, 4096)


@STYLES
async def test_a_read_longer_than_the_limit_is_refused_and_the_connection_goes_on(rig, style):
    client = await rig.connect("large", **style)
    too_long = c.NBD_EOVERFLOW if "extended" in style else c.NBD_EINVAL
    assert (await client.call(READ, 0, c.MAX_REQUEST_BYTES + 1)).error == too_long
    assert (await client.call(READ, 0, (1 << 32) - 1)).error == c.NBD_EINVAL
    assert (await client.call(READ, 0, 512)).data == pattern(0, 512)


# --- READ of what is not in memory -------------------------------------------------------------------------------


@STYLES
async def test_cold_reads_are_answered_when_they_are_there_and_hot_ones_at_once(rig, style):
    disk = rig.disk
    disk.cold, disk.gate = [range(MIB, 2 * MIB)], trio.Event()
    client = await rig.connect(**style)
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


@STYLES
async def test_many_cold_reads_in_one_batch(rig, style):
    disk = rig.disk
    disk.cold, disk.gate = [range(0, SIZE_BYTES)], trio.Event()
    client = await rig.connect(**style)
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


@STYLES
async def test_the_memory_of_cold_reads_is_bounded(rig, style):
    """A client that asks for a lot and takes nothing must not make the server hold it all."""
    client = await rig.connect("large", **style)
    disk = rig.disks.disks["large"]
    disk.cold, disk.gate = [range(0, LARGE_BYTES)], trio.Event()
    cookies = await client.send_batch(*[(READ, n * 4096, c.MAX_REQUEST_BYTES) for n in range(20)])
    await until(lambda: disk.cold_now)
    await wait_all_tasks_blocked(0.05)
    assert disk.cold_bytes_most <= 3 * c.MAX_REQUEST_BYTES, f"{disk.cold_bytes_most >> 20} MiB held for one client"
    disk.gate.set()
    for cookie in cookies[:1]:
        assert len((await client.reply(cookie)).data) == c.MAX_REQUEST_BYTES


@STYLES
async def test_a_cold_read_that_fails(rig, style):
    disk = rig.disk
    disk.cold = [range(0, MIB)]
    disk.failures[8192] = BlockDamaged(path="sr", volume=1, offset_bytes=8192, segment=1, segment_offset=0)
    client = await rig.connect(**style)
    cookies = await client.send_batch((READ, 4096, 4096), (READ, 8192, 4096), (READ, 2 * MIB, 4096), (READ, 12288, 4096))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[0].data == pattern(4096, 4096)


@STYLES
@pytest.mark.parametrize("length", [4096, 2 * MIB])
async def test_a_damaged_block_fails_its_own_read_alone(rig, style, length):
    rig.disk.failures[MIB + length - 1] = BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0)
    client = await rig.connect(**style)
    cookies = await client.send_batch((READ, 0, 4096), (READ, MIB, length), (READ, 3 * MIB, MIB), (READ, 4096, 1))
    replies = await client.replies(cookies)
    assert [reply.error for reply in replies] == [0, c.NBD_EIO, 0, 0]
    assert replies[2].data == pattern(3 * MIB, MIB)
    if style:
        assert "checksum" in replies[1].text
