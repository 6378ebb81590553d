"""The file layer in memory keeps the promises of its fault model: the ground of the crash tests must be firm itself."""

from __future__ import annotations

import errno
import random

import pytest

from simsr.errors import StoreLocked
from simsr.store.memory import SECTOR_BYTES, MemoryDirectory


def read(directory: MemoryDirectory, name: str) -> bytes:
    return dict(directory.images())[name]


def cuts(directory: MemoryDirectory, style: str = "some", count: int = 200) -> list[MemoryDirectory]:
    return [directory.after_cut(random.Random(seed), style) for seed in range(count)]


def test_bytes_survive_a_kill_and_a_cut_only_after_a_sync():
    directory = MemoryDirectory()
    file = directory.create("a", 2 * SECTOR_BYTES)
    directory.sync()
    file.pwritev([b"one", b"two"], 0)
    assert read(directory.after_kill(), "a")[:6] == b"onetwo"
    assert read(cuts(directory, "none", 1)[0], "a")[:6] == bytes(6)
    assert read(cuts(directory, "all", 1)[0], "a")[:6] == b"onetwo"
    file.datasync()
    file.pwritev([b"TWO"], 3)
    assert read(cuts(directory, "none", 1)[0], "a")[:6] == b"onetwo"
    assert {read(one, "a")[:6] for one in cuts(directory)} == {b"onetwo", b"oneTWO"}


def test_sectors_keep_a_prefix_of_their_writes_independently():
    directory = MemoryDirectory()
    file = directory.create("a", 3 * SECTOR_BYTES)
    directory.sync()
    for byte in (b"1", b"2"):
        file.pwritev([byte * (2 * SECTOR_BYTES)], 0)
    found = {(data[:1], data[SECTOR_BYTES : SECTOR_BYTES + 1]) for data in (read(one, "a") for one in cuts(directory))}
    assert found == {(a, b) for a in (b"\0", b"1", b"2") for b in (b"\0", b"1", b"2")}
    for one in cuts(directory):
        data = read(one, "a")
        for at in range(0, len(data), SECTOR_BYTES):
            assert len(set(data[at : at + SECTOR_BYTES])) == 1, "a sector is torn"


def test_names_survive_only_after_a_sync_of_the_directory():
    directory = MemoryDirectory()
    directory.create("old", 10)
    directory.sync()
    directory.create("new", 10)
    directory.remove("old")
    assert directory.after_kill().names() == ["new"]
    assert cuts(directory, "none", 1)[0].names() == ["old"]
    assert {tuple(one.names()) for one in cuts(directory)} == {(), ("old",), ("new",), ("new", "old")}
    directory.sync()
    assert {tuple(one.names()) for one in cuts(directory)} == {("new",)}


def test_a_cut_after_a_kill_still_finds_what_was_pending():
    directory = MemoryDirectory()
    directory.create("a", 10)
    directory.sync()
    directory.open("a").pwritev([b"x"], 0)
    killed = directory.after_kill()
    assert {read(one, "a")[:1] for one in cuts(killed)} == {b"\0", b"x"}
    killed.open("a").datasync()
    assert {read(one, "a")[:1] for one in cuts(killed)} == {b"x"}
    assert {read(one, "a")[:1] for one in cuts(directory)} == {b"\0", b"x"}, "the survivor shares memory with the dead"


def test_survivors_of_survivors_are_settled():
    directory = MemoryDirectory()
    directory.create("a", 4 * SECTOR_BYTES).pwritev([b"x" * 4 * SECTOR_BYTES], 0)
    for one in cuts(directory, count=10):
        assert {tuple(again.images()) for again in cuts(one, count=10)} == {tuple(one.images())}


def test_a_failed_sync_keeps_what_was_pending_pending():
    directory = MemoryDirectory()
    file = directory.create("a", 10)
    directory.sync()
    file.pwritev([b"x"], 0)
    directory.fail_sync = True
    with pytest.raises(OSError, match="injected"):
        file.datasync()
    assert read(cuts(directory, "none", 1)[0], "a")[:1] == b"\0"


def test_every_change_is_a_step_that_can_be_stopped():
    steps: list[str] = []
    directory = MemoryDirectory(steps.append)
    file = directory.create("a", 100)
    file.pwritev([b"x", b"y"], 3)
    file.area(8, 8).write(1, b"zz")
    file.datasync()
    directory.sync()
    directory.remove("a")
    assert steps == ["create a", "write a 3+2", "write a 9+2", "sync a", "sync directory", "remove a"]

    def refuse(what: str) -> None:
        raise OSError(errno.EIO, what)

    directory = MemoryDirectory()
    file = directory.create("a", 8)
    directory.on_step = refuse
    for action in (lambda: file.pwritev([b"x"], 0), lambda: directory.remove("a"), file.datasync, directory.sync):
        with pytest.raises(OSError):
            action()
    assert read(directory, "a") == bytes(8) and directory.names() == ["a"]


def test_reads_and_room_and_lock():
    directory = MemoryDirectory()
    file = directory.create("a", 8)
    view = memoryview(bytearray(4))
    with pytest.raises(OSError, match="past the end"):
        file.pread(view, 6)
    assert file.read_cached(view, 0)
    directory.cold = True
    assert not file.read_cached(view, 0)
    directory.room_bytes = 10
    directory.create("b", 10)
    with pytest.raises(OSError) as caught:
        directory.create("c", 1)
    assert caught.value.errno == errno.ENOSPC and directory.names() == ["a", "b"] and directory.free_bytes() == 0
    with pytest.raises(FileNotFoundError):
        directory.open("nothing")
    directory.lock()
    with pytest.raises(StoreLocked):
        directory.lock()
