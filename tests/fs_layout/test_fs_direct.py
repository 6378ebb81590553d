"""Files of disks without a cache: what they look like, what can be done with them, and what NBD clients see of it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import stat
import time
from contextlib import ExitStack

from fuse_kit import MIB, aligned, eventually, fuse_is_there, opened, refused, run

pytestmark = fuse_is_there


def test_the_tree(direct):
    disk, path = direct.disk("tree disk", 20 * MIB + 512)
    snapshot = direct.snapshot(disk, name="tree snapshot")
    top = direct.directory
    assert sorted(os.listdir(top)) == [".simsr", "sr"]
    assert {"by-name", "snapshots", f"{disk['uuid']}.raw"} <= set(os.listdir(f"{top}/sr"))
    assert f"{snapshot['uuid']}.raw" in os.listdir(f"{top}/sr/snapshots")
    assert f"{snapshot['uuid']}.raw" not in os.listdir(f"{top}/sr")
    assert os.path.samefile(f"{top}/sr/by-name/tree disk.raw", path)
    assert os.path.samefile(f"{top}/sr/by-name/tree snapshot.raw", direct.path(snapshot))
    about, kept = os.stat(path), os.stat(direct.path(snapshot))
    assert about.st_size == kept.st_size == 20 * MIB + 512
    assert (stat.filemode(about.st_mode), stat.filemode(kept.st_mode)) == ("-rw-------", "-r--------")
    assert (about.st_uid, about.st_gid) == (os.geteuid(), os.getegid())
    assert about.st_blocks == 0
    assert abs(about.st_mtime - time.time()) < 600
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(kept.st_mtime)) == snapshot["snapshot_time"]
    assert about.st_ino != kept.st_ino and os.stat(path).st_ino == about.st_ino
    assert os.stat(f"{top}/sr").st_nlink == 4  # with by-name and snapshots
    with refused(errno.ENOENT):
        os.stat(f"{top}/sr/{snapshot['uuid']}.raw")


def test_what_is_made_and_deleted_comes_and_goes_at_once(direct):
    disk, path = direct.disk("short-lived")
    assert os.path.exists(path) and os.path.exists(f"{direct.directory}/sr/by-name/short-lived.raw")
    with opened(path, os.O_RDONLY):
        answer = direct.api.delete(f"/v1/vdis/{disk['uuid']}")
        assert answer.json()["error"]["code"] == "VdiInUse" and "FUSE, pid" in answer.text
    direct.delete(f"/v1/vdis/{disk['uuid']}")
    assert not os.path.lexists(path) and not os.path.lexists(f"{direct.directory}/sr/by-name/short-lived.raw")


def test_writes_are_seen_by_nbd_and_nbds_by_us_at_once(direct):
    disk, path = direct.disk("both")
    chance = random.Random(5)
    with opened(path) as fd, opened(path) as other, direct.nbd(disk) as client:
        for number in range(1, 60):
            offset, size = chance.randrange(31 * MIB), chance.choice([1, 511, 512, 4096, 70_001, MIB])
            data = chance.randbytes(size)
            if number % 2:
                assert os.pwrite(fd, data, offset) == size
            else:
                client.pwrite(data, offset)
            assert os.pread(other, size, offset) == client.pread(size, offset) == data
    assert os.stat(path).st_blocks == direct.show(disk)["physical_utilisation_bytes"] // 512 > 0


def test_an_nbd_write_changes_the_time(direct):
    disk, path = direct.disk("times")
    os.utime(path, ns=(10**18, 10**18))
    assert os.stat(path).st_mtime_ns == 10**18
    with direct.nbd(disk) as client:
        client.pwrite(b"x", 0)
    assert time.time() - os.stat(path).st_mtime < 600


def test_synchronous_writes_are_durable_each(direct):
    """The kernel leaves that to us where it caches nothing."""
    disk, path = direct.disk("synchronous", MIB)

    def flushes() -> int:
        return direct.get("/v1/daemon")["statistics"]["srs"][disk["sr"]]["flush_waits"]

    for flags in (os.O_SYNC, os.O_DSYNC):
        with opened(path, os.O_RDWR | flags) as fd:
            before = flushes()
            for number in range(5):
                os.pwrite(fd, b"x" * 4096, number * 4096)
            assert flushes() - before >= 5
    with opened(path) as fd:
        before = flushes()
        os.pwrite(fd, b"x" * 4096, 0)
        assert flushes() == before
        os.fsync(fd)
        assert flushes() > before


def test_the_end_of_the_disk(direct):
    disk, path = direct.disk("end", MIB)
    with opened(path) as fd:
        assert os.pwrite(fd, b"ab", MIB - 1) == 1
        with refused(errno.ENOSPC):
            os.pwrite(fd, b"x", MIB)
        assert os.pread(fd, 100, MIB - 1) == b"a" and os.pread(fd, 100, MIB + 5) == b""
        assert os.lseek(fd, 0, os.SEEK_END) == MIB


def test_truncate_grows_and_never_shrinks(direct):
    disk, path = direct.disk("grow", MIB)
    os.truncate(path, 2 * MIB)
    assert os.stat(path).st_size == direct.show(disk)["size_bytes"] == 2 * MIB
    with refused(errno.EINVAL):
        os.truncate(path, MIB)
    with opened(path) as fd:
        direct.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=3 * MIB)
        assert os.fstat(fd).st_size == 3 * MIB
        assert os.pwrite(fd, b"new", 3 * MIB - 3) == 3
        os.ftruncate(fd, 4 * MIB)
        assert os.fstat(fd).st_size == 4 * MIB and os.pread(fd, 3, 3 * MIB - 3) == b"new"


def test_opening_to_truncate_changes_nothing_as_with_a_block_device(direct):
    disk, path = direct.disk("o_trunc", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"kept", 0)
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == MIB and os.pread(fd, 4, 0) == b"kept"


def test_snapshots_are_read_only(direct):
    disk, path = direct.disk("kept", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"old", 0)
        snapshot = direct.path(direct.snapshot(disk))
        os.pwrite(fd, b"new", 0)
    with opened(snapshot, os.O_RDONLY) as fd:
        assert os.pread(fd, 3, 0) == b"old"
    with refused(errno.EROFS):
        os.open(snapshot, os.O_RDWR)
    with refused(errno.EPERM):
        os.truncate(snapshot, 2 * MIB)


def test_the_tree_cannot_be_changed(direct):
    disk, path = direct.disk("fixed", MIB)
    folder = os.path.dirname(path)
    for attempt in (
        lambda: os.open(f"{folder}/new", os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(f"{folder}/new"),
        lambda: os.unlink(path),
        lambda: os.rename(path, f"{folder}/new.raw"),
        lambda: os.symlink("x", f"{folder}/new"),
        lambda: os.rmdir(f"{folder}/snapshots"),
        lambda: os.chmod(path, 0o777),
        lambda: os.chown(path, 1, 1),
        lambda: os.setxattr(path, "user.simsr.uuid", b"x"),
        lambda: os.removexattr(path, "user.simsr.uuid"),
    ):
        with refused(errno.EPERM):
            attempt()


def test_extended_attributes(direct):
    disk, path = direct.disk("attributes")
    snapshot = direct.snapshot(disk)
    with opened(path) as fd:
        os.pwrite(fd, bytes([1]) * 8192, 4096)
    found = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert found == {
        "user.simsr.uuid": disk["uuid"].encode(), "user.simsr.name": b"attributes", "user.simsr.sr": disk["sr"].encode(),
        "user.simsr.allocated_bytes": b"8192",
    }  # fmt: skip
    assert os.getxattr(direct.path(snapshot), "user.simsr.parent") == disk["uuid"].encode()
    assert os.getxattr(os.path.dirname(path), "user.simsr.name") == b"sr"
    with refused(errno.ENODATA):
        os.getxattr(path, "user.simsr.parent")


def test_statfs(direct):
    below, shown = os.statvfs(direct.root), os.statvfs(direct.directory)
    assert (shown.f_frsize, shown.f_blocks, shown.f_namemax) == (below.f_frsize, below.f_blocks, 255)
    assert 0 < shown.f_bavail <= shown.f_bfree <= shown.f_blocks


def test_status_files(direct):
    disk, path = direct.disk("status")
    folder = f"{direct.directory}/.simsr"
    with open(f"{folder}/status.json") as file:
        status = json.load(file)
    assert status["pid"] == direct.pid and status["directories"] == {disk["sr"]: "sr"}
    assert status["mounts"][0]["path"] == direct.directory
    with open(f"{folder}/vdi/{disk['uuid']}.json") as file:
        assert json.load(file)["name"] == "status"
    with open(f"{folder}/sr/{disk['sr']}.json") as file:
        assert json.load(file)["vdi_count"] > 0
    assert os.stat(f"{folder}/vdi/{disk['uuid']}.json").st_size > 100
    with refused(errno.EPERM):
        os.open(f"{folder}/status.json", os.O_WRONLY)


def test_fallocate_is_not_offered(direct):
    """pyfuse3 knows no FUSE_FALLOCATE; programs find that out and write zeros, which become holes."""
    disk, path = direct.disk("holes")
    with opened(path) as fd:
        os.pwrite(fd, b"x" * 65536, 0)
        assert "unsupported" in run("fallocate", "--punch-hole", "--offset", "0", "--length", "4096", path, status=1)
        os.pwrite(fd, bytes(65536), 0)
    assert os.stat(path).st_blocks == 0


def test_an_open_writable_file_is_an_attachment(direct):
    disk, path = direct.disk("attached", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"old", 0)
        snapshot = direct.snapshot(disk)
        os.pwrite(fd, b"new", 0)
        (attached,) = direct.show(disk)["attached"]
        assert attached == {"client": f"FUSE, pid {os.getpid()}", "writable": True, "kind": "fuse"}
        answer = direct.api.post(f"/v1/vdis/{snapshot['uuid']}/revert")
        assert answer.json()["error"]["code"] == "VdiInUse"
        assert os.pread(fd, 3, 0) == b"new"
    assert direct.revert(snapshot)["changed"]  # which waits for the file that was just closed
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 3, 0) == b"old"


def test_readers_see_a_revert_at_once(direct):
    """revert_semantics.md, invariant 6, for readers; also what they have mapped into memory."""
    disk, path = direct.disk("reverted", MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"old" * 2000, 0)
    snapshot = direct.snapshot(disk)
    direct.post(f"/v1/vdis/{disk['uuid']}/resize", size_bytes=2 * MIB)
    with opened(path) as fd:
        os.pwrite(fd, b"new" * 2000, 0)
    direct.until_unused(disk)
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        assert os.pread(fd, 3, 0) == mapped[:3] == b"new"
        assert direct.revert(snapshot)["size_changed"]
        assert os.pread(fd, 3, 0) == mapped[:3] == b"old"
        assert os.fstat(fd).st_size == MIB and os.pread(fd, 10, MIB) == b""


def test_many_openers(direct):
    disk, path = direct.disk("many")
    with ExitStack() as stack:
        fds = [stack.enter_context(opened(path)) for _ in range(200)]
        for number, fd in enumerate(fds):
            os.pwrite(fd, number.to_bytes(2), number * 5000)
        assert [int.from_bytes(os.pread(fds[-1 - n], 2, n * 5000)) for n in range(200)] == list(range(200))
        assert len(direct.show(disk)["attached"]) == 200
    direct.until_unused(disk)


def test_tapdisks_kind_of_access(direct):
    """O_DIRECT, 512 bytes and multiples, unaligned to blocks; one request of 1 MiB is one request to us."""
    disk, path = direct.disk("aio")
    chance, model = random.Random(9), bytearray(4 * MIB)
    buffer = aligned(MIB)
    with opened(path, os.O_RDWR | os.O_DIRECT) as fd:
        for _ in range(150):
            sectors = chance.choice([1, 1, 2, 7, 8, 88, 129])
            offset = chance.randrange(4 * MIB // 512 - sectors) * 512
            data = chance.randbytes(sectors * 512)
            buffer[: len(data)] = data
            assert os.pwritev(fd, [buffer[: len(data)]], offset) == len(data)
            model[offset : offset + len(data)] = data
        for offset in range(0, 4 * MIB, MIB):
            before = direct.get("/v1/mounts")[0]["requests_total"]
            assert os.preadv(fd, [buffer], offset) == MIB
            assert buffer == model[offset : offset + MIB]
            assert direct.get("/v1/mounts")[0]["requests_total"] == before + 1


def test_shared_mappings_are_refused_not_wrong(direct):
    disk, path = direct.disk("mapped", MIB)
    with opened(path) as fd, refused(errno.ENODEV):
        mmap.mmap(fd, 4096)


def test_hostile_names(direct):
    names = ["../../etc", "a/b", ".simsr", "a_b"]
    made = [direct.post("/v1/srs", name=name) for name in names]
    try:
        listed = [name for name in os.listdir(direct.directory) if name not in (".simsr", "sr")]
        assert len(listed) == len(set(listed)) == len(names)
        found = {}
        for name in listed:
            assert os.path.dirname(os.path.realpath(f"{direct.directory}/{name}")) == direct.directory
            found[os.getxattr(f"{direct.directory}/{name}", "user.simsr.uuid").decode()] = name
        assert set(found) == {sr["uuid"] for sr in made}
        plain = {sr["name"]: found[sr["uuid"]] for sr in made if found[sr["uuid"]] == sr["name"]}
        assert set(plain) == {"a_b"}
        twins = [direct.create_vdi(MIB, "twin", sr="a/b") for _ in range(3)]
        links = f"{direct.directory}/{found[made[1]['uuid']]}/by-name"
        assert sorted(os.path.basename(os.readlink(f"{links}/{link}")) for link in os.listdir(links)) == sorted(
            f"{twin['uuid']}.raw" for twin in twins
        )
        for twin in twins:
            direct.delete(f"/v1/vdis/{twin['uuid']}")
        renamed = direct.api.patch(f"/v1/srs/{made[0]['uuid']}", json={"name": "harmless"}).json()
        assert os.getxattr(f"{direct.directory}/harmless", "user.simsr.uuid").decode() == renamed["uuid"]
        assert not os.path.exists(f"{direct.directory}/{found[renamed['uuid']]}")
    finally:
        for sr in made:
            direct.delete(f"/v1/srs/{sr['uuid']}")
    eventually(lambda: sorted(os.listdir(direct.directory)) == [".simsr", "sr"])


def test_a_tip_knows_whether_what_was_written_was_flushed(direct):
    disk, path = direct.disk("tips", MIB)
    snapshot = direct.snapshot(disk)
    for flushes in (True, False):
        with opened(path) as fd:
            os.pwrite(fd, b"more", 0)
            if flushes:
                os.fsync(fd)
        direct.until_unused(disk)
        direct.revert(snapshot)
    nodes = direct.get(f"/v1/vdis/{disk['uuid']}/tree")["nodes"]
    assert [node["consistency"] for node in nodes if node["consistency"]] == ["clean", "crash"]
