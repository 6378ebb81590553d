"""Long reads that the disk lends: sent as they lie there, whatever else is in the batch, and never looked at later."""

from __future__ import annotations

import errno
import socket

import pytest
import trio
import trio.testing
from fake_disks import pattern
from nbd_wire import KIB, MIB, READ

from nbd_export import constants as c
from nbd_export.channel import Channel

STYLES = pytest.mark.parametrize("style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"])


@pytest.fixture
def disk(rig):
    rig.disk.lends = True
    return rig.disk


def asked(disk, what):
    return [entry for entry in disk.log if entry[0] == what]


@STYLES
async def test_what_is_lent_is_not_read(rig, disk, style):
    client = await rig.connect(**style)
    assert (await client.call(READ, 8 * KIB, 64 * KIB)).data == pattern(8 * KIB, 64 * KIB)
    assert asked(disk, "lend") == [("lend", 8 * KIB, 64 * KIB)] and not asked(disk, "read")


@STYLES
async def test_a_long_read_is_lent_piece_by_piece(rig, disk, style):
    client = await rig.connect(**style)
    assert (await client.call(READ, 4 * KIB, MIB + 64 * KIB)).data == pattern(4 * KIB, MIB + 64 * KIB)
    assert asked(disk, "lend") and not asked(disk, "read")


@STYLES
async def test_a_batch_of_which_some_is_lent(rig, disk, style):
    """The second one is cold in part, the third one fails, the fourth one is short: each gets its answer."""
    disk.cold = [range(200 * KIB, 204 * KIB)]
    disk.failures[300 * KIB] = OSError(errno.EIO, "no")
    client = await rig.connect(**style)
    cookies = await client.send_batch(
        (READ, 0, 64 * KIB), (READ, 192 * KIB, 64 * KIB), (READ, 256 * KIB, 64 * KIB), (READ, 400 * KIB, 512), (READ, 512 * KIB, 64 * KIB)
    )
    replies = [await client.reply(cookie) for cookie in cookies]
    assert [reply.error for reply in replies] == [0, 0, c.NBD_EIO, 0, 0]
    for reply, (offset, length) in zip(replies, ((0, 64), (192, 64), (0, 0), (400, 0.5), (512, 64))):
        if not reply.error:
            assert reply.data == pattern(offset * KIB, int(length * KIB))


@STYLES
async def test_lent_and_copied_in_one_batch(rig, disk, style):
    """What the disk does not lend, though it is in memory, lies between what it does."""
    client = await rig.connect(**style)
    whole, lend = [(0, 64 * KIB), (64 * KIB, 32 * KIB), (128 * KIB, 48 * KIB), (192 * KIB, 40 * KIB)], disk.lend
    disk.lend = lambda offset, length: None if offset in (0, 128 * KIB) else lend(offset, length)
    for cookie, (offset, length) in zip(await client.send_batch(*((READ, *one) for one in whole)), whole):
        assert (await client.reply(cookie)).data == pattern(offset, length)
    assert len(asked(disk, "lend")) == 2


async def test_short_reads_are_copied(rig, disk):
    client = await rig.connect()
    cookies = await client.send_batch(*((READ, number * 4 * KIB, 4 * KIB) for number in range(16)))
    for number, cookie in enumerate(cookies):
        assert (await client.reply(cookie)).data == pattern(number * 4 * KIB, 4 * KIB)
    assert not asked(disk, "lend")


async def test_more_parts_than_one_call_takes():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    parts = [number.to_bytes(2, "big") for number in range(3000)]
    with ours, theirs, trio.fail_after(30):
        await Channel(ours).send_parts(parts)
        assert theirs.recv(10_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"".join(parts)


async def test_nothing_lent_is_looked_at_after_waiting():
    """A client that takes nothing: what is lent may be filled anew as soon as the sender waits."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    lent = bytearray(b"a" * MIB)
    channel = Channel(ours)
    received = bytearray()
    with ours, theirs, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for head in (b"1", b"2"):  # the second one waits behind the first one
                nursery.start_soon(channel.send_parts, [head, memoryview(lent)])
            await trio.testing.wait_all_tasks_blocked()
            lent[:] = b"b" * MIB
            while len(received) < 2 * MIB + 2:
                await trio.lowlevel.wait_readable(theirs)
                received += theirs.recv(1 << 16)
    assert sorted(received[:1] + received[MIB + 1 : MIB + 2]) == sorted(b"12")
    assert bytes(received[1 : MIB + 1]) == bytes(received[MIB + 2 :]) == b"a" * MIB
