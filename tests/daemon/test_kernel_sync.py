"""Syncs that the kernel carries out without a thread, alone and under an engine, and what is done where it cannot."""

from __future__ import annotations

import errno
import os
from contextlib import asynccontextmanager

import pytest
import trio

from simsr.daemon import engine as engine_module
from simsr.daemon import kernel_sync, threads
from simsr.daemon.engine import Disk, Engine
from simsr.daemon.kernel_sync import KernelSync
from simsr.errors import StoreStopped
from simsr.store.files import DiskDirectory
from simsr.store.layout import Geometry
from simsr.store.store import Create, Store

SMALL = Geometry(segment_blocks=64, record_blocks=4)
TIMEOUT_S = 120


@asynccontextmanager
async def syncing():
    sync = KernelSync()
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync.run)
            yield sync
            nursery.cancel_scope.cancel()
    sync.close()


async def synced(sync: KernelSync, fd: int) -> OSError | None:
    ended, errors = trio.Event(), []

    def done(error: OSError | None) -> None:
        errors.append(error)
        ended.set()

    sync.begin(fd, done)
    assert not errors, "it is not told of before the loop turns"
    await ended.wait()
    return errors[0]


async def test_one_sync_after_the_other(tmp_path):
    async with syncing() as sync:
        with open(tmp_path / "f", "wb", buffering=0) as file:
            for number in range(20):
                file.write(bytes(4096 * number))
                assert await synced(sync, file.fileno()) is None


async def test_a_file_that_is_closed_meanwhile_is_synced(tmp_path):
    async with syncing() as sync:
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(1 << 20))
        ended = trio.Event()
        sync.begin(fd, lambda error: ended.set())
        os.close(fd)
        await ended.wait()


async def test_what_cannot_be_synced_is_refused_at_once(tmp_path):
    async with syncing() as sync:
        ours, theirs = os.pipe()
        os.close(theirs)
        with pytest.raises(OSError) as refused:
            sync.begin(ours, pytest.fail)
        assert refused.value.errno == errno.EINVAL
        os.close(ours)
        with pytest.raises(OSError) as refused:
            sync.begin(ours, pytest.fail)
        assert refused.value.errno == errno.EBADF
        with open(tmp_path / "f", "wb") as file:
            assert await synced(sync, file.fileno()) is None, "it goes on"


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The next syncs end with this error: what the kernel says of them is changed where it is read."""
    call = kernel_sync._call

    def changed(what: int, *arguments: object) -> int:
        result = call(what, *arguments)
        if len(arguments) == 5:  # io_getevents
            kernel_sync._EVENT.pack_into(arguments[3], 0, 0, 0, -number, 0)
        return result

    monkeypatch.setattr(kernel_sync, "_call", changed)


async def test_an_error_is_told(tmp_path, monkeypatch):
    failing(monkeypatch, errno.EIO)
    async with syncing() as sync:
        with open(tmp_path / "f", "wb") as file:
            error = await synced(sync, file.fileno())
    assert error.errno == errno.EIO and str(error) == "[Errno 5] Input/output error"


async def test_a_machine_whose_calls_are_not_known(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(OSError, match="vax"):
        KernelSync()


# Under an engine.


@asynccontextmanager
async def running_engine(path):
    """(engine, disk) on a store of the host's disk."""
    store = Store.create(DiskDirectory(str(path)), bytes(15) + b"k", SMALL)
    store.commit([Create(1, 1 << 20, {})])
    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            engine = Engine(store)
            await nursery.start(engine.run)
            yield engine, Disk(engine, store.volumes[1], lambda: None)
            nursery.cancel_scope.cancel()
    store.abandon()


@pytest.fixture
def in_threads(monkeypatch):
    """The flushes that took a thread."""
    jobs, start = [], threads.start_thread_soon

    def noted(call, deliver):
        jobs.append(call)
        start(call, deliver)

    monkeypatch.setattr(threads, "start_thread_soon", noted)
    return jobs


def put(disk: Disk, block: int) -> None:
    assert disk.write([(block * 4096, 4096, memoryview(os.urandom(4096)))]) == 1


async def test_a_flush_takes_no_thread(tmp_path, in_threads):
    async with running_engine(tmp_path / "sr") as (engine, disk):
        for block in range(5):
            put(disk, block)
            assert not engine.is_durable()
            await engine.durable()
            assert engine.is_durable()
        assert engine.store.log.flushes >= 5
    assert not in_threads


async def test_what_is_written_meanwhile_is_left_to_the_next_flush(tmp_path, in_threads):
    async with running_engine(tmp_path / "sr") as (engine, disk):
        order = []
        put(disk, 0)
        engine.flush_soon(lambda error: order.append(("first", error, engine.is_durable())))
        put(disk, 1)
        engine.flush_soon(lambda error: order.append(("second", error, engine.is_durable())))
        while len(order) < 2:
            await trio.sleep(0.001)
        assert order == [("first", None, False), ("second", None, True)]


async def test_more_than_one_file_takes_a_thread(tmp_path, in_threads):
    async with running_engine(tmp_path / "sr") as (engine, disk):
        for block in range(SMALL.segment_blocks):
            while engine.tight:
                await trio.sleep(0.001)
            put(disk, block)
        await engine.durable()
        assert engine.is_durable()
    assert len(in_threads) == 1


async def test_a_sync_that_fails_stops_the_store(tmp_path, in_threads, monkeypatch):
    async with running_engine(tmp_path / "sr") as (engine, disk):
        failing(monkeypatch, errno.EIO)
        put(disk, 0)
        with pytest.raises(StoreStopped, match="Input/output error"):
            await engine.durable()
        monkeypatch.undo()
        with pytest.raises(StoreStopped):
            disk.write([(0, 4096, memoryview(bytes(4096)))])
        with pytest.raises(StoreStopped):
            await engine.durable()


@pytest.mark.parametrize("when", ["never", "not any more"])
async def test_threads_where_the_kernel_does_not_do_it(tmp_path, in_threads, monkeypatch, when):
    def refuses(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "no such call")

    if when == "never":
        monkeypatch.setattr(engine_module, "KernelSync", refuses)
    async with running_engine(tmp_path / "sr") as (engine, disk):
        if when == "not any more":
            put(disk, 0)
            await engine.durable()
            monkeypatch.setattr(KernelSync, "begin", refuses)
        for block in range(3):
            put(disk, block)
            await engine.durable()
            assert engine.is_durable()
    assert len(in_threads) == 3


async def test_the_engine_ends_when_its_flush_has(tmp_path, in_threads):
    ended = []
    async with running_engine(tmp_path / "sr") as (engine, disk):
        for block in range(50):
            put(disk, block)
        engine.flush_soon(ended.append)
    assert ended == [None] and not in_threads
