"""Files that the kernel caches: never a stale byte, whoever changes the disk."""

from __future__ import annotations

import errno
import mmap
import os
import random

import nbd
import pytest
from fuse_kit import MIB, eventually, fuse_is_there, opened, refused, run

pytestmark = fuse_is_there


def kinds(daemon, vdi):
    return {one["kind"] for one in daemon.show(vdi)["attached"]}


def test_what_was_synced_is_with_nbd_and_what_nbd_wrote_is_read(writeback):
    disk, path = writeback.disk("in turns")
    chance, model = random.Random(3), bytearray(4 * MIB)
    for number in range(40):
        offset, size = chance.randrange(3 * MIB), chance.choice([1, 700, 4096, 100_000])
        data = chance.randbytes(size)
        model[offset : offset + size] = data
        if number % 2:
            with writeback.nbd(disk) as client:
                client.pwrite(data, offset)
                assert client.pread(4 * MIB, 0) == model
        else:
            with opened(path) as fd:
                os.pwrite(fd, data, offset)
                assert os.pread(fd, 4 * MIB, 0) == model
        writeback.until_unused(disk)


def test_pages_are_cached_and_written_at_fsync(writeback):
    disk, path = writeback.disk("cached")
    with opened(path) as fd:
        os.pwrite(fd, b"x" * MIB, 0)
        os.fsync(fd)
        before = writeback.get("/v1/mounts")[0]["requests_total"]
        for _ in range(100):
            assert os.pread(fd, 4096, 8192) == b"x" * 4096
            os.pwrite(fd, b"y" * 4096, 12288)
        assert writeback.get("/v1/mounts")[0]["requests_total"] - before <= 4
        assert kinds(writeback, disk) == {"fuse-cached"}
        os.fsync(fd)
        eventually(lambda: os.stat(path).st_blocks == MIB // 512)


def test_who_caches_and_who_writes_past_the_cache_exclude_each_other(writeback):
    disk, path = writeback.disk("exclusive")
    with opened(path) as fd:
        os.pwrite(fd, b"cached", 0)
        client = nbd.NBD()
        with pytest.raises(nbd.Error, match="policy"):
            client.connect_uri(disk["nbd_uri"])
        with opened(path) as other:  # two files share the cache
            assert os.pread(other, 6, 0) == b"cached"
            assert kinds(writeback, disk) == {"fuse-cached"}
    writeback.until_unused(disk)
    with writeback.nbd(disk) as client:
        assert client.pread(6, 0) == b"cached"
        with opened(path) as fd:  # not cached, then
            assert kinds(writeback, disk) == {"fuse", "nbd"}
            for number in range(20):
                client.pwrite(bytes([number]) * 4096, 0)
                assert os.pread(fd, 4096, 0) == bytes([number]) * 4096
                os.pwrite(fd, bytes([number + 100]) * 4096, 0)
                assert client.pread(4096, 0) == bytes([number + 100]) * 4096
    writeback.until_unused(disk)
    with opened(path) as fd:
        assert os.pread(fd, 1, 0) == bytes([119]) and kinds(writeback, disk) == {"fuse-cached"}


def test_readers_see_a_revert_at_once(writeback):
    """revert_semantics.md, invariant 6: not a byte of what was before, not from a mapping either."""
    disk, path = writeback.disk("reverted")
    with opened(path) as fd:
        os.pwrite(fd, b"old" * 100_000, 0)
    writeback.until_unused(disk)
    snapshot = writeback.snapshot(disk)
    with opened(path) as fd:
        os.pwrite(fd, b"new" * 100_000, 0)
        answer = writeback.api.post(f"/v1/vdis/{snapshot['uuid']}/revert")
        assert answer.json()["error"]["code"] == "VdiInUse"
    writeback.until_unused(disk)
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, 300_000, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert os.pread(fd, 300_000, 0) == mapped[:] == b"new" * 100_000
        assert writeback.revert(snapshot)["changed"]
        assert os.pread(fd, 300_000, 0) == b"old" * 100_000 and mapped[:] == b"old" * 100_000
    with opened(writeback.path(snapshot), os.O_RDONLY) as fd:
        assert os.pread(fd, 300_000, 0) == b"old" * 100_000


def test_a_revert_to_another_size(writeback):
    """The kernel takes the size of a cached file for its own affair: the file gets a new number, and is found with its new size."""
    disk, path = writeback.disk("sizes", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"small", 0)
    writeback.until_unused(disk)
    snapshot = writeback.snapshot(disk)
    writeback.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=2 * MIB)
    assert os.stat(path).st_size == 2 * MIB
    with opened(path) as fd:
        assert os.pwrite(fd, b"large", 2 * MIB - 5) == 5
    writeback.until_unused(disk)
    assert writeback.revert(snapshot)["size_changed"]
    assert os.stat(path).st_size == MIB
    with opened(path) as fd:
        assert os.pread(fd, 2 * MIB, 0) == b"small" + bytes(MIB - 5)


def test_a_resize_under_an_open_file(writeback):
    disk, path = writeback.disk("resized", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"before", 0)
        writeback.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=2 * MIB)
        assert os.fstat(fd).st_size == MIB  # which this file keeps
        with refused(errno.EBUSY):  # or there would be two caches
            os.open(path, os.O_RDWR)
        os.pwrite(fd, b"after", 10)
    writeback.until_unused(disk)
    with opened(path) as fd:
        assert os.fstat(fd).st_size == 2 * MIB and os.pread(fd, 15, 0) == b"before\0\0\0\0after"
        os.ftruncate(fd, 3 * MIB)
        assert os.fstat(fd).st_size == 3 * MIB and os.pwrite(fd, b"end", 3 * MIB - 3) == 3
    writeback.until_unused(disk)
    with writeback.nbd(writeback.show(disk)) as client:
        assert client.pread(3, 3 * MIB - 3) == b"end"


def test_dirty_pages_and_a_grow_by_the_file_itself(writeback):
    """The flush that the grow waits for must not wait for pages that wait for the grow."""
    disk, path = writeback.disk("grown", 8 * MIB)
    with opened(path) as fd:
        for number in range(1, 6):
            os.pwrite(fd, bytes([number]) * (4 * MIB), MIB)
            os.ftruncate(fd, (8 + number) * MIB)
        assert os.pread(fd, 4 * MIB, MIB) == bytes([5]) * (4 * MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise limits of the kernel")
def test_the_kernel_may_collect_more_than_a_hundredth(writeback):
    device = os.stat(writeback.directory).st_dev
    with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/max_ratio") as file:
        assert int(file.read()) == 20


def test_opening_to_truncate_is_refused(writeback):
    disk, path = writeback.disk("o_trunc", MIB)
    with refused(errno.EINVAL):
        os.open(path, os.O_RDWR | os.O_TRUNC)
    assert os.stat(path).st_size == MIB


def test_what_does_not_fit_is_an_error_at_fsync(writeback):
    disk, path = writeback.disk("too small", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"x" * 4096, MIB)
        with refused(errno.ENOSPC):
            os.fsync(fd)
    assert os.stat(path).st_size == MIB  # the kernel had taken it to be larger


def test_direct_and_cached_access_to_one_file(writeback):
    disk, path = writeback.disk("mixed")
    with opened(path) as cached, opened(path, os.O_RDWR | os.O_DIRECT) as direct:
        buffer = memoryview(mmap.mmap(-1, 4096))
        for number in range(1, 30):
            os.pwrite(cached, bytes([number]) * 4096, 0)
            assert os.preadv(direct, [buffer], 0) == 4096 and buffer == bytes([number]) * 4096
            buffer[:] = bytes([number + 50]) * 4096
            os.pwritev(direct, [buffer], 0)
            assert os.pread(cached, 4096, 0) == bytes([number + 50]) * 4096


def test_shared_mappings(writeback):
    disk, path = writeback.disk("mapped", MIB)
    with opened(path) as fd, mmap.mmap(fd, MIB) as mapped:
        mapped[5000:5006] = b"mapped"
        mapped.flush()
        assert os.pread(fd, 6, 5000) == b"mapped"
    writeback.until_unused(disk)
    with writeback.nbd(disk) as client:
        assert client.pread(6, 5000) == b"mapped"


def test_snapshots_are_cached_beside_everything(writeback):
    disk, path = writeback.disk("kept")
    run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=4", "conv=notrunc,fsync")
    writeback.until_unused(disk)
    snapshot = writeback.snapshot(disk)
    kept = writeback.path(snapshot)
    with opened(path, os.O_RDONLY) as fd:
        content = os.pread(fd, 4 * MIB, 0)
    with writeback.nbd(disk) as client, opened(kept, os.O_RDONLY) as fd, writeback.nbd(snapshot) as other:
        client.pwrite(bytes(4 * MIB), 0)
        assert os.pread(fd, 4 * MIB, 0) == other.pread(4 * MIB, 0) == content
        before = writeback.get("/v1/mounts")[0]["requests_total"]
        assert os.pread(fd, 4 * MIB, 0) == content
        assert writeback.get("/v1/mounts")[0]["requests_total"] == before
