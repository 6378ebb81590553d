"""Reads that wait for the disk without a task: their answers, and that nothing ends before they have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_disks import pattern, until
from nbd_wire import DISC, MIB, READ
from trio.testing import wait_all_tasks_blocked

from nbd_export import constants as c
from nbd_export.cold import ColdReader, Waiting
from nbd_export.replies import SimpleReplies
from nbd_export.transmission import Request
from simsr.errors import BlockDamaged

STYLES = pytest.mark.parametrize("style", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"])


@pytest.fixture
def disk(rig):
    """All of it is cold, and what reads it is carried out by the test."""
    rig.disk.cold, rig.disk.soon = [range(MIB)], []
    yield rig.disk
    for run in rig.disk.soon:  # no connection ends before
        run()


@STYLES
async def test_answers_come_when_their_jobs_end_and_hot_ones_at_once(rig, disk, style):
    client = await rig.connect(**style)
    first = await client.send(READ, 4096, 4096)
    await until(lambda: len(disk.soon) == 1)
    second, hot = await client.send_batch((READ, 8192, 100), (READ, MIB, 4096))
    await until(lambda: len(disk.soon) == 2)
    assert (await client.reply(hot)).data == pattern(MIB, 4096)
    assert await client.silent()
    disk.soon.pop()()
    assert (await client.reply(second)).data == pattern(8192, 100)
    assert await client.silent()
    disk.soon.pop(0)()
    assert (await client.reply(first)).data == pattern(4096, 4096)
    assert not any(what[0] == "read_cold" for what in disk.log), "none took a task"


@STYLES
async def test_a_job_that_fails_is_an_error_of_its_reads_alone(rig, disk, style):
    client = await rig.connect(**style)
    bad = await client.send(READ, 0, 4096)
    await until(lambda: len(disk.soon) == 1)
    disk.soon_error = BlockDamaged(path="sr", volume=1, offset_bytes=0, segment=1, segment_offset=0)
    disk.soon.pop()()
    assert (await client.reply(bad)).error == c.NBD_EIO
    disk.soon_error = None
    good = await client.send(READ, 0, 4096)
    await until(lambda: len(disk.soon) == 1)
    disk.soon.pop()()
    assert (await client.reply(good)).data == pattern(0, 4096)


async def test_a_long_read_still_takes_a_task(rig, disk):
    client = await rig.connect(structured=True)
    assert (await client.call(READ, 0, MIB)).data == pattern(0, MIB)
    assert not disk.soon


async def test_a_goodbye_waits_for_the_answers(rig, disk):
    client = await rig.connect()
    cookie = await client.send(READ, 4096, 4096)
    await client.send(DISC)
    await until(lambda: disk.soon)
    await wait_all_tasks_blocked(0.01)
    assert not disk.detached
    disk.soon.pop(0)()
    assert (await client.reply(cookie)).data == pattern(4096, 4096)
    await until(lambda: disk.detached == 1)


@pytest.mark.parametrize("how", ["closes", "is hung up on"])
async def test_the_disk_is_kept_for_the_jobs_of_a_client_that_is_gone(rig, disk, how):
    client = await rig.connect()
    await client.send(READ, 4096, 4096)
    await until(lambda: disk.soon)
    if how == "closes":
        client.close()
    else:
        rig.disks.hang_ups["disk"]("a test")
    await wait_all_tasks_blocked(0.01)
    assert not disk.detached
    disk.soon.pop(0)()
    await until(lambda: disk.detached == 1)


async def test_a_client_that_takes_nothing_gets_tasks_of_which_there_are_few(disk):
    channel = SimpleNamespace(unsent=[b"what it has not taken"])
    reader = ColdReader(disk, SimpleReplies(), channel, lambda data: None, lambda request, error: b"")
    waiting = Waiting()
    waiting.add(Request(READ, 0, 1, 0, 4096, None, True), 0, 4096)
    assert not reader.read_soon(waiting) and not disk.soon
    channel.unsent.clear()
    assert reader.read_soon(waiting) and reader.under_way == len(disk.soon) == 1
