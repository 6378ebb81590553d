"""The engine over files of memory: group commit, running out of space and out of it again, syncs that fail, cold edges."""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from simsr.daemon.engine import Disk, Engine
from simsr.daemon.gate import Gate
from simsr.errors import NoSpace, StoreStopped
from simsr.store.hot import HotMemory
from simsr.store.layout import Geometry
from simsr.store.memory import MemoryDirectory
from simsr.store.store import Create, Delete, Store
from simsr.store.read_job import ReadJob

SMALL = Geometry(segment_blocks=64, record_blocks=4)
DISK_BYTES = 4 << 20
TIMEOUT_S = 120


class Rig:
    def __init__(self, store: Store, directory: MemoryDirectory, engine: Engine) -> None:
        self.store, self.directory, self.engine = store, directory, engine

    def disk(self, ident: int) -> Disk:
        if ident not in self.store.volumes:
            self.store.commit([Create(ident, DISK_BYTES, {})])
        return Disk(self.engine, self.store.volumes[ident], lambda: None)


@asynccontextmanager
async def engine_over(directory: MemoryDirectory, hot_memory: HotMemory | None = None):
    """An engine that runs; all pins must be gone in the end and the invariants hold."""
    store = Store.create(directory, bytes(15) + b"e", SMALL)
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            engine = Engine(store, hot_memory=hot_memory)
            await nursery.start(engine.run)
            yield Rig(store, directory, engine)
            nursery.cancel_scope.cancel()
    store._check()
    assert not any(segment.pins for segment in store.pool.by_slot if segment is not None), "something is still pinned"
    store.abandon()


async def write(disk: Disk, offset: int, data: bytes | int) -> None:
    """As a connection writes."""
    one = (offset, data, None) if isinstance(data, int) else (offset, len(data), memoryview(data))
    done = disk.write([one])
    if done < 1:
        await disk.write_rest([one], done)


async def read(disk: Disk, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    if disk.read([(offset, view)]):
        (error,) = await disk.read_cold([(offset, view)])
        if error is not None:
            raise error
    return bytes(view)


async def test_flushes_at_one_time_share_few_syncs():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        flushes = rig.store.log.flushes
        async with trio.open_nursery() as nursery:
            for n in range(50):
                await write(disk, n * 4096, bytes([n + 1]) * 4096)
                nursery.start_soon(disk._engine.flush)
        assert disk.is_durable()
        assert 1 <= rig.store.log.flushes - flushes <= 10


async def test_a_flush_that_began_earlier_does_not_answer_for_later_writes():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        async with trio.open_nursery() as nursery:
            await write(disk, 0, b"1" * 4096)
            nursery.start_soon(disk._engine.flush)
            await trio.lowlevel.checkpoint()
            await write(disk, 0, b"2" * 4096)
            wanted = rig.store.log.flush_needed_seq
            await disk._engine.flush()
            assert rig.store.log.durable_seq >= wanted


async def test_a_sync_that_fails_stops_everything_for_everybody():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"x" * 4096)
        rig.directory.fail_sync = True
        failed = []

        async def flush() -> None:
            with pytest.raises(StoreStopped):
                await disk._engine.flush()
            failed.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(flush)
        assert len(failed) == 10
        rig.directory.fail_sync = False
        assert not disk.is_durable()
        with pytest.raises(StoreStopped):
            await disk._engine.flush()
        with pytest.raises(StoreStopped):
            await write(disk, 4096, b"y" * 4096)
        assert await read(disk, 0, 4096) == b"x" * 4096, "what is there can still be read"


async def test_a_full_store_says_so_and_works_again_when_something_was_deleted():
    directory = MemoryDirectory()
    directory.room_bytes = 12 * SMALL.segment_bytes
    async with engine_over(directory) as rig:
        first, second = rig.disk(1), rig.disk(2)
        await write(second, 0, b"2" * 4096)
        written = 0
        with pytest.raises(NoSpace):
            while written < DISK_BYTES:
                await write(first, written, bytes([written // 65536 + 1]) * 65536)
                written += 65536
        assert written >= 4 * SMALL.segment_bytes
        for offset in range(0, written, 65536):
            assert await read(first, offset, 65536) == bytes([offset // 65536 + 1]) * 65536
        assert await read(second, 0, 4096) == b"2" * 4096
        await write(second, 0, 1 << 20)  # zeros need no room for data
        with pytest.raises(NoSpace):
            await write(second, 0, b"3" * (3 << 20))
        rig.store.commit([Delete(1)])
        await rig.engine.flush()
        rig.store.reap()
        await rig.engine.checkpoint()
        for offset in range(0, 1 << 20, 65536):
            await write(second, offset, b"4" * 65536)
        assert await read(second, 0, 1 << 20) == b"4" * (1 << 20)


async def test_a_disk_can_be_overwritten_for_ever_in_little_space():
    """What is dead must be reclaimed, by a checkpoint, before anybody is told that there is no space."""
    directory = MemoryDirectory()
    directory.room_bytes = 16 * SMALL.segment_bytes
    async with engine_over(directory) as rig:
        disk = rig.disk(1)
        for turn in range(60):
            await write(disk, 0, bytes([turn + 1]) * (256 << 10))
        assert await read(disk, 0, 256 << 10) == bytes([60]) * (256 << 10)


class FullHost:
    """The file system below has no room for the map file of a checkpoint."""

    def __init__(self, directory: MemoryDirectory) -> None:
        self.full = False
        directory.on_step = self._step

    def _step(self, what: str) -> None:
        if self.full and what.startswith(("write map-", "create map-")):
            raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_checkpoint_that_finds_no_space_is_put_off():
    """Nothing refers to its file yet, so nothing is lost; deleting must go on working, for it is the way out."""
    directory = MemoryDirectory()
    async with engine_over(directory) as rig:
        host = FullHost(directory)
        disk, other = rig.disk(1), rig.disk(2)
        await write(disk, 0, b"x" * 65536)
        await write(other, 0, b"y" * 65536)
        host.full = True
        with suppress(NoSpace):
            await rig.engine.checkpoint()
        await write(disk, 0, b"z" * 4096)
        await disk._engine.flush()
        rig.store.commit([Delete(2)])
        await rig.engine.flush()
        host.full = False
        await rig.engine.checkpoint()
        assert await read(disk, 0, 8192) == b"z" * 4096 + b"x" * 4096


async def test_a_store_on_a_full_file_system_can_be_opened():
    directory = MemoryDirectory()
    async with engine_over(directory) as rig:
        await write(rig.disk(1), 0, b"x" * 65536)
        survivor = directory.after_kill()
    FullHost(survivor).full = True
    store = Store.open(survivor)
    assert store.volumes[1].read_bytes(0, 65536) == b"x" * 65536
    store.abandon()


async def test_zeroing_more_than_there_is_room_for_data_does_not_wait():
    """4 GiB of zeros take a record, not 4 GiB of segments; with edges that have to be fetched first."""
    async with engine_over(MemoryDirectory()) as rig:
        rig.store.commit([Create(9, 8 << 30, {})])
        disk = rig.disk(9)
        await write(disk, 0, b"a" * 8192)
        await write(disk, 4 << 30, b"b" * 8192)
        rig.directory.cold = True
        await write(disk, 100, 4 << 30)
        assert await read(disk, 0, 8192) == b"a" * 100 + bytes(8092)
        assert await read(disk, (4 << 30), 200) == bytes(100) + b"b" * 100


async def test_writes_within_cold_blocks_fetch_them_first():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 65536)
        rig.directory.cold = True
        await write(disk, 100, b"n" * 200)
        await write(disk, 4000, b"n" * 20000)
        await write(disk, 40000, 1000)
        expected = bytearray(b"o" * 65536)
        expected[100:300] = b"n" * 200
        expected[4000:24000] = b"n" * 20000
        expected[40000:41000] = bytes(1000)
        assert await read(disk, 0, 65536) == expected


async def test_two_writers_within_the_same_cold_block_lose_nothing():
    async with engine_over(MemoryDirectory()) as rig:
        disks = [rig.disk(1) for _ in range(8)]
        await write(disks[0], 0, b"o" * 8192)
        rig.directory.cold = True
        async with trio.open_nursery() as nursery:
            for number, disk in enumerate(disks):
                nursery.start_soon(write, disk, number * 1000 + 500, bytes([number + 1]) * 1000)
        data = await read(disks[0], 0, 8192)
        assert data == b"o" * 500 + b"".join(bytes([n + 1]) * 1000 for n in range(7)) + bytes([8]) * (8192 - 7500)


async def test_a_cold_block_that_cannot_be_read_fails_its_write_and_leaves_no_pin():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 12288)
        physical = rig.store.volumes[1]._runs(rig.store.volumes[1]._entries(0, 3))
        segment, position, _, _ = physical[0]
        rig.directory.flip(f"seg-{segment.slot:08d}", position + 10)
        rig.directory.cold = True
        with pytest.raises(Exception, match="checksum"):
            await write(disk, 100, b"n" * 9000)
        assert not segment.pins
        await write(disk, 4096 + 100, b"n" * 100)
        assert (await read(disk, 4096, 200))[100:] == b"n" * 100


async def test_cancelled_cold_reads_leave_no_pin():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 65536)
        rig.directory.cold = True
        async with trio.open_nursery() as nursery:
            for n in range(40):
                nursery.start_soon(read, disk, n % 16 * 4096, 4096)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_reads_without_a_task_end_before_a_closed_gate_is_empty_and_begin_only_where_nothing_has_to_be_waited_for():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 65536)
        rig.directory.cold = True
        views, answers = [memoryview(bytearray(4096)) for _ in range(40)], []
        begun = [disk.read_soon([(n % 16 * 4096, view)], answers.append) for n, view in enumerate(views)]
        assert begun == [True] * 16 + [False] * 24, "as many as there are threads for it"
        gate = Gate()
        gate.close([disk])
        assert disk.under_way == 16 and not disk.read_soon([(0, views[16])], answers.append)
        await gate.emptied()
        assert answers == [[None]] * 16 and all(bytes(view) == b"o" * 4096 for view in views[:16])
        gate.open()
        assert disk.read_soon([(0, views[16]), (4096, views[17])], answers.append)
        await wait_until(lambda: len(answers) == 17)
        assert answers[16] == [None, None] and bytes(views[17]) == b"o" * 4096


async def test_a_read_without_a_task_of_a_damaged_block():
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 8192)
        segment, position, _, _ = rig.store.volumes[1]._runs(rig.store.volumes[1]._entries(0, 2))[0]
        rig.directory.flip(f"seg-{segment.slot:08d}", position + 10)
        rig.directory.cold = True
        views, answers = [memoryview(bytearray(4096)) for _ in range(2)], []
        assert disk.read_soon([(0, views[0]), (4096, views[1])], answers.append)
        await wait_until(lambda: answers)
        assert "checksum" in str(answers[0][0]) and answers[0][1] is None and bytes(views[1]) == b"o" * 4096


async def test_a_bug_in_a_read_without_a_task_fails_that_read_only(monkeypatch, caplog):
    async with engine_over(MemoryDirectory()) as rig:
        disk = rig.disk(1)
        await write(disk, 0, b"o" * 4096)
        monkeypatch.setattr(ReadJob, "run", lambda job: 1 // 0)
        answers = []
        assert disk.read_soon([(0, memoryview(bytearray(4096)))], answers.append)
        await wait_until(lambda: answers)
        assert isinstance(answers[0][0], ZeroDivisionError) and "not foreseen" in caplog.text


async def wait_until(condition) -> None:
    with trio.fail_after(TIMEOUT_S):
        while not condition():
            await trio.sleep(0.001)


# What is read much.


async def test_what_is_read_much_is_kept_in_memory_until_nobody_reads_it(monkeypatch):
    monkeypatch.setattr("simsr.daemon.upkeep.PERIOD_S", 0.05)
    directory, memory = MemoryDirectory(), HotMemory(4 * SMALL.segment_bytes)
    async with engine_over(directory, memory) as rig:
        disk, data = rig.disk(1), bytes(range(1, 17)) * 4096
        await write(disk, 0, data)
        assert disk.lend(0, len(data)) is None
        for _ in range(SMALL.segment_blocks // 16 + 1):
            assert await read(disk, 0, len(data)) == data
        while not rig.engine.statistics()["hot_segments"]:
            await trio.sleep(0.001)
        assert await read(disk, 0, len(data)) == data  # verified
        assert b"".join(disk.lend(0, len(data))) == data
        gate = Gate()
        gate.close([disk])
        assert disk.lend(0, len(data)) is None, "what is behind a closed gate may be about to change"
        gate.open()
        assert disk.lend(0, len(data)) is not None
        while rig.engine.statistics()["hot_segments"]:
            await trio.sleep(0.01)
        assert disk.lend(0, len(data)) is None and await read(disk, 0, len(data)) == data
        assert memory.used_bytes == 0


async def test_what_cannot_be_brought_into_memory_is_read_as_before(monkeypatch, caplog):
    caplog.set_level("INFO")
    memory = HotMemory(4 * SMALL.segment_bytes)
    async with engine_over(MemoryDirectory(), memory) as rig:
        disk, data = rig.disk(1), bytes(range(1, 17)) * 4096
        await write(disk, 0, data)

        def broken() -> None:
            raise OSError(errno.EIO, "injected")

        for segment in filter(None, rig.store.pool.by_slot):
            segment.file.in_memory = broken
        for _ in range(SMALL.segment_blocks // 16 + 1):
            await read(disk, 0, len(data))
        while memory.limit_bytes:
            await trio.sleep(0.001)
        assert "injected" in caplog.text
        assert await read(disk, 0, len(data)) == data and rig.engine.statistics()["hot_bytes"] == 0
