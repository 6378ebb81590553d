"""Real programs on the files: loop devices with file systems, qemu-img, fio, dd; in both modes of caching."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fuse_kit import MIB, Mounted, fuse_is_there, loop_device, needs_loop, opened, run

pytestmark = fuse_is_there


@pytest.fixture(params=["direct", "writeback"])
def daemon(request) -> Mounted:
    return request.getfixturevalue(request.param)


@contextmanager
def mounted(device: str, where) -> Iterator[str]:
    where.mkdir(exist_ok=True)
    run("mount", device, str(where))
    try:
        yield str(where)
    finally:
        run("umount", str(where))


@needs_loop
@pytest.mark.parametrize(
    ("make", "check"),
    [(("mkfs.ext4", "-q", "-F"), ("fsck.ext4", "-f", "-n")), (("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"))],
    ids=["ext4", "xfs"],
)
def test_file_systems_on_loop_devices(daemon, tmp_path, make, check):
    direct_io = "off" if make[0] == "mkfs.ext4" and daemon.is_cached else "on"  # both, in fewer tests
    disk, path = daemon.disk(f"{make[0]} {direct_io}", 320 * MIB)
    content = os.urandom(3 * MIB + 17)
    with loop_device(path, f"--direct-io={direct_io}") as device:
        if direct_io == "on":
            assert run("losetup", "--noheadings", "--output", "DIO", device).strip() == "1"
        run(*make, device)
        with mounted(device, tmp_path / "m") as where:
            for number in range(3):
                with open(f"{where}/{number}", "wb") as file:
                    file.write(content)
            os.unlink(f"{where}/1")
    daemon.until_unused(disk)
    snapshot = daemon.snapshot(disk)
    with loop_device(path, f"--direct-io={direct_io}") as device:
        run(*check, device)
        with mounted(device, tmp_path / "m") as where:
            with open(f"{where}/2", "rb") as file:
                assert file.read() == content
            os.unlink(f"{where}/2")
    daemon.until_unused(disk)
    daemon.revert(snapshot)
    with loop_device(path, f"--direct-io={direct_io}") as device:
        run(*check, device)
        with mounted(device, tmp_path / "m") as where:
            assert sorted(name for name in os.listdir(where) if name.isdigit()) == ["0", "2"]
            with open(f"{where}/2", "rb") as file:
                assert file.read() == content


def test_qemu_img(daemon, tmp_path):
    disk, path = daemon.disk("qemu")
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(MIB) + bytes(30 * MIB) + os.urandom(MIB))
    for number, cache in enumerate(["none", "writeback"]):
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-t", cache, "-T", cache, str(source), path)
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", "-T", cache, str(source), path)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, str(tmp_path / f"{number}.qcow2"))
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, str(tmp_path / f"{number}.qcow2"))
    assert '"virtual-size": 33554432' in run("qemu-img", "info", "--output=json", "-f", "raw", path)
    daemon.until_unused(disk)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), disk["nbd_uri"])


@pytest.mark.parametrize(
    "options",
    [
        ("--ioengine=libaio", "--iodepth=32", "--direct=1", "--bsrange=512-64k", "--blockalign=512"),
        ("--ioengine=psync", "--bsrange=100-40000", "--bs_unaligned", "--fsync=16"),
    ],
    ids=["aio, direct, 512 bytes", "buffered, unaligned"],
)
def test_fio_verifies(daemon, options):
    disk, path = daemon.disk(options[0] + options[1])
    run(
        "fio", "--name=verify", f"--filename={path}", "--size=8M", "--rw=randrw", "--verify=crc32c", "--verify_fatal=1", "--randseed=11",
        "--verify_state_save=0", "--verify_backlog=64", "--thread", *options,
    )  # fmt: skip


def test_dd(daemon):
    disk, path = daemon.disk("dd")
    content = os.urandom(5 * MIB)
    run("dd", "if=/dev/stdin", f"of={path}", "bs=1M", "iflag=fullblock", "conv=notrunc,fsync", stdin_bytes=content)
    run("dd", "if=/dev/stdin", f"of={path}", "bs=512", "seek=20480", "oflag=direct", "conv=notrunc,fdatasync", stdin_bytes=content[: 64 * 512])
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 5 * MIB, 0) == content and os.pread(fd, 64 * 512, 10 * MIB) == content[: 64 * 512]
    wanted = hashlib.sha256(content).hexdigest()
    assert run("sh", "-c", f"dd if={path} bs=1M count=5 iflag=direct status=none | sha256sum").split()[0] == wanted


def test_dd_as_most_people_call_it(direct):
    """With O_TRUNC, which is nothing to a block device, and to us (where nothing is cached)."""
    disk, path = direct.disk("plain dd", MIB)
    run("dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=1", "conv=fsync")
    assert "No space left" in run("dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=2", status=1)
    assert "Invalid argument" in run("truncate", "--size=512K", path, status=1)
    run("truncate", "--size=2M", path)
    assert os.path.getsize(path) == 2 * MIB
