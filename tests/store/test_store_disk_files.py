"""The store on real files: the same histories, two processes, a killed one, and pages that are not in memory."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_kit import TINY, UUID, Driver, Witness, content, disk, everything, paged, put, some_memory

from simsr.errors import BlockDamaged, NoSpace, StoreDamaged, StoreLocked, StoreStopped
from simsr.store import paging
from simsr.store.files import PIECE_BYTES, DiskDirectory
from simsr.store.layout import BLOCK, Geometry
from simsr.store.segments import segment_name
from simsr.store.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "sr")


def test_random_history_with_reopening(path, seeds, note):
    for seed in seeds(3):
        where = f"{path}-{seed}"
        rng = random.Random(seed)
        driver, witness = Driver(rng), Witness()
        store = Store.create(DiskDirectory(where), UUID, TINY)
        with note(seed=seed):
            for life in range(4):
                witness.attach(store)
                driver.begin(store)
                for _ in range(40):
                    driver.step()
                driver.compare()
                last = store.log.seq
                if life % 2:
                    driver.end_jobs()
                    store.close()
                else:
                    driver.jobs.clear()
                    store.abandon()
                store = Store.open(DiskDirectory(where), some_memory(rng))
                assert store.log.seq >= last
                driver.compare(store)
                store._check()
            store.close()
        assert not leaked(where)


def leaked(where: str) -> list[str]:
    """Files of the store that this process still has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    return [name for name in names if name.startswith(where)]


@pytest.mark.parametrize("damage", ["segment", "table", "short", "nothing there"])
def test_a_refused_store_leaves_no_file_open(path, damage):
    store = Store.create(DiskDirectory(path), UUID, TINY)
    for tag in range(3):
        put(disk(store, 40), 0, content(tag + 1) * 40)
    slot = store.log.active.slot
    store.close()
    match damage:
        case "segment":
            os.unlink(os.path.join(path, segment_name(slot)))
        case "short":
            os.truncate(os.path.join(path, segment_name(slot)), 5000)
        case _:
            for name in os.listdir(path):
                if name.startswith("table-" if damage == "table" else ""):
                    os.truncate(os.path.join(path, name), 0)
    for _ in range(2):
        with pytest.raises(StoreDamaged):
            Store.open(DiskDirectory(path))
        assert not leaked(path)


def test_a_store_with_lost_map_files_is_open_and_says_so(path):
    """What is in memory, and what needs no node, is there; the rest is `StoreDamaged`. Closing leaves no file open."""
    store = Store.create(DiskDirectory(path), UUID, TINY)
    for tag in range(3):
        put(disk(store, 40), 0, content(tag + 1) * 40)
    store.close()
    for name in os.listdir(path):
        if name.startswith("map-"):
            os.truncate(os.path.join(path, name), 0)
    for _ in range(2):
        store = Store.open(DiskDirectory(path))
        for ident in (1, 2, 3):
            with pytest.raises(StoreDamaged, match=r"map node at offset \d+ of map-\d{12} cannot be used: the file is too short"):
                store.volumes[ident].read_bytes(0, BLOCK)
        put(disk(store, 8), 0, content(9))
        assert everything(store.volumes[max(store.volumes)])[:BLOCK] == content(9)
        store.close()
        assert not leaked(path)


def test_map_files_are_not_all_kept_open(path, monkeypatch):
    """A large store has thousands of them, a process may open a thousand files."""
    monkeypatch.setattr(paging, "_HANDLES_MAX", 3)
    store = Store.create(DiskDirectory(path), UUID, TINY)
    volume = disk(store, 100)
    for index in range(20):
        put(volume, index * 4 * BLOCK, content(index + 1))
        store.checkpoint()
    held = everything(volume)
    store.close()
    store = Store.open(DiskDirectory(path))
    assert everything(store.volumes[1]) == held and store.table.paged_in > 20
    kept = [name for name in leaked(path) if "/map-" in name]
    assert len(kept) == 3 == len(store.maps._handles)
    store.close()
    assert not leaked(path)


CHILD = """
import sys
from store_kit import TINY, UUID, content, disk, put
from simsr.store.files import DiskDirectory
from simsr.store.store import Store
path = sys.argv[1]
store = Store.create(DiskDirectory(path), UUID, TINY)
volume = disk(store, 1000)
for index in range(100):
    put(volume, index * 4096, content(index + 1))
    print(index, flush=True)
sys.stdin.read()
"""


def test_two_processes_and_a_killed_one(path):
    """While one process has the store another cannot open it; when it is killed, all it was told is done is there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    with child:
        try:
            told = 0
            while told < 60:
                line = child.stdout.readline()
                assert line, "the child process failed"
                told = int(line) + 1
            with pytest.raises(StoreLocked, match=f"store {path} is in use by another process"):
                Store.open(DiskDirectory(path))
            with pytest.raises(StoreLocked):
                Store.create(DiskDirectory(path), UUID, TINY)
        finally:
            child.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) + 1 for line in child.stdout)])
        child.wait()
    store = Store.open(DiskDirectory(path))
    found = everything(store.volumes[1])
    for index in range(told):
        assert found[index * BLOCK : (index + 1) * BLOCK] == content(index + 1), f"write {index} of {told} is missing"
    store._check()
    store.close()


def test_pages_that_are_not_in_memory_are_left_to_a_job(path):
    store = Store.create(DiskDirectory(path), UUID, Geometry(256, 8, 9))
    volume = disk(store, 300)
    data = b"".join(content(tag + 1) for tag in range(230))
    put(volume, 0, data)
    store.close()
    for name in os.listdir(path):
        fd = os.open(os.path.join(path, name), os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    store = Store.open(DiskDirectory(path))
    volume = store.volumes[1]
    view = memoryview(bytearray(BLOCK))
    paged(volume, lambda: volume.map.ready(0, 230))
    cold = [block for block in range(230) if volume.read([(block * BLOCK, view)])]
    if not cold:
        pytest.skip("this file system keeps pages in memory that it is told to drop")
    block = cold[-1]
    batch = [(block * BLOCK + 5, 3, memoryview(b"abc"))]
    if volume.read([(block * BLOCK, view)]):
        assert volume.write(batch) == 0
    job = volume.read_job(block * BLOCK, view)
    job.begin()
    job.run()
    job.release()
    assert view == content(block + 1)
    assert volume.read([(block * BLOCK, view)]) in ([], [0])  # some file systems never answer yes
    assert everything(volume) == data.ljust(300 * BLOCK, b"\0")
    store.close()


def test_damage_on_a_real_disk_is_found(path):
    store = Store.create(DiskDirectory(path), UUID, TINY)
    volume = disk(store, 10)
    slot, block = store.log.active.slot, store.log.active.used_blocks
    put(volume, 0, content(1) + content(2))
    store.close()
    with open(os.path.join(path, segment_name(slot)), "r+b") as file:
        file.seek((block + 1) * BLOCK + 17)
        file.write(b"?")
    store = Store.open(DiskDirectory(path))
    assert store.volumes[1].read_bytes(0, BLOCK) == content(1)
    with pytest.raises(BlockDamaged, match=rf"byte {BLOCK} of volume 1 .*\(segment {slot}, offset {(block + 1) * BLOCK}\)"):
        store.volumes[1].read_bytes(BLOCK, BLOCK)
    store.close()


# The file layer itself.


def test_create_is_zero_filled_and_open_finds_it(path):
    directory = DiskDirectory(path)
    size = PIECE_BYTES * 2 + 100
    file = directory.create("a", size)
    assert file.size_bytes == size and directory.names() == ["a"]
    view = memoryview(bytearray(b"x" * size))
    file.pread(view, 0)
    assert view == bytes(size)
    file.close()
    file.close()
    with pytest.raises(FileNotFoundError):
        directory.open("b")
    again = directory.open("a")
    with pytest.raises(OSError, match="the file ends at"):
        again.pread(view, 1)
    assert not again.read_cached(view, 1)
    again.close()
    directory.remove("a")
    directory.sync()
    assert directory.names() == [] and directory.free_bytes() > 0
    directory.close()
    directory.close()
    assert os.stat(path).st_mode & 0o777 == 0o700


def test_writes_of_many_buffers_and_short_ones(path, monkeypatch):
    """More buffers than one call takes; and the kernel may write less than it was asked to."""
    directory = DiskDirectory(path)
    file = directory.create("a", 0)
    buffers = [memoryview(bytes([index % 251]) * (index % 7)) for index in range(3000)]
    whole = b"".join(buffers)
    file.pwritev(buffers, 10)
    assert file.size_bytes == 10 + len(whole)
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, [b"".join(parts)[:1001]], offset))
    file.pwritev(buffers, 20000)
    for offset in (10, 20000):
        view = memoryview(bytearray(len(whole)))
        file.pread(view, offset)
        assert view == whole
    file.close()
    directory.close()


def test_an_area_is_a_window_into_the_file(path):
    directory = DiskDirectory(path)
    file = directory.create("a", 4 * BLOCK)
    area = file.area(BLOCK, 2 * BLOCK)
    area.write(10, b"abc")
    area.pwrite(2 * BLOCK - 3, b"xyz")
    area.write(2 * BLOCK - 2, b"y")
    area.pwrite(11, b"b")
    view = memoryview(bytearray(4 * BLOCK))
    file.pread(view, 0)
    assert view == (bytes(BLOCK + 10) + b"abc").ljust(3 * BLOCK - 3, b"\0") + b"xyz" + bytes(BLOCK)
    area.close()
    file.close()
    directory.close()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "fdatasync"])
def test_a_file_that_cannot_be_made_is_not_left_behind(path, monkeypatch, call):
    store = Store.create(DiskDirectory(path), UUID, TINY)
    names = store.directory.names()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(NoSpace, match="cannot make a segment file: No space left on device"):
            store.pool.make_one()
    assert store.directory.names() == names
    store.pool.make_one()
    store.close()
    assert not leaked(path)


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_checkpoint_that_fails_leaves_no_file_open(path, monkeypatch, call, number):
    store = Store.create(DiskDirectory(path), UUID, TINY)
    put(disk(store, 4), 0, content(1))
    store.flush()
    names = store.directory.names()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((NoSpace, StoreStopped)):
            store.checkpoint()
    assert not [name for name in leaked(path) if "/map-" in name or "/table-" in name]
    assert number == errno.EIO or store.directory.names() == names
    store.close()
    assert not leaked(path)


def test_rename_takes_lock_and_files_along(path):
    store = Store.create(DiskDirectory(path), UUID, TINY)
    put(disk(store, 4), 0, content(1))
    store.directory.rename(path + "-new")
    put(store.volumes[1], BLOCK, content(2))
    with pytest.raises(StoreLocked):
        Store.open(DiskDirectory(path + "-new"))
    store.close()
    store = Store.open(DiskDirectory(path + "-new"))
    assert everything(store.volumes[1])[: 2 * BLOCK] == content(1) + content(2)
    store.close()
    assert not os.path.exists(path)
