"""Mounts come and go: with the daemon, without it, by command, while they are in use."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from daemon_tools import short_directory
from fuse_kit import MIB, Mounted, eventually, fuse_is_there, is_mounted, mounted_daemon, opened, refused, run

from simsr.cli.main import main

pytestmark = fuse_is_there


@pytest.fixture
def daemon() -> Iterator[Mounted]:
    """A daemon that tests may stop and kill."""
    with short_directory() as folder:
        started = Mounted(folder)
        try:
            started.start()
            started.create_sr("sr")
            yield started
        finally:
            started.end()


@pytest.fixture
def simsr(daemon: Mounted, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``simsr(word, ..., status=0)``: run the command, here in this process; returns what it said."""

    def call(*words: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["--socket", daemon.socket, *words])
        said = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == status, said
        return said

    return call


def test_nothing_flushed_is_lost_when_the_daemon_is_killed(daemon):
    disk, path = daemon.disk("killed")
    with ExitStack() as stack:
        fd = stack.enter_context(opened(path))
        synced = stack.enter_context(opened(path, os.O_RDWR | os.O_DSYNC))
        os.pwrite(fd, b"flushed" * 1000, 0)
        os.fsync(fd)
        os.pwrite(synced, b"each write" * 1000, MIB)
        daemon.kill()
        for attempt in (lambda: os.pread(fd, 1, 0), lambda: os.stat(path), lambda: os.listdir(daemon.directory)):
            with refused(errno.ENOTCONN):
                attempt()
    assert is_mounted(daemon.directory)
    daemon.start()  # which mounts over the stale mount point
    with opened(path) as fd:
        assert os.pread(fd, 7000, 0) == b"flushed" * 1000 and os.pread(fd, 10_000, MIB) == b"each write" * 1000
        with open("/proc/self/mountinfo") as mounts:
            assert sum(line.split(" ")[4] == daemon.directory for line in mounts) == 1
    daemon.stop_cleanly()
    assert not is_mounted(daemon.directory) and os.listdir(daemon.directory) == []


def test_a_stop_while_files_are_open(daemon):
    """Also with what is mounted elsewhere in the tree: a process whose working directory is below."""
    disk, path = daemon.disk("open")
    with opened(path) as fd, subprocess.Popen(["sleep", "600"], cwd=os.path.dirname(path)) as sleeper:
        try:
            os.pwrite(fd, b"x" * 4096, 0)
            assert daemon.stop() == 0
            assert not is_mounted(daemon.directory)
            assert f"mount {daemon.directory} is in use" in daemon.log
            with refused(errno.ENOTCONN):
                os.pread(fd, 4096, 0)
        finally:
            sleeper.kill()
    assert "Traceback" not in daemon.log and "ERROR" not in daemon.log
    daemon.start()
    with opened(path) as fd:
        assert os.pread(fd, 4096, 0) == b"x" * 4096
    daemon.stop_cleanly()


def test_what_is_cached_is_written_at_a_stop():
    with mounted_daemon("--mount-cache", "writeback") as daemon:
        disk, path = daemon.disk("dirty")
        with opened(path) as fd:
            os.pwrite(fd, b"dirty" * 100_000, 0)
            assert daemon.stop() == 0
        daemon.start()
        with opened(path) as fd:
            assert os.pread(fd, 500_000, 0) == b"dirty" * 100_000


def test_the_commands(daemon, simsr, tmp_path):
    daemon.disk("one")
    listed = simsr("mounts")
    assert listed.split() == ["PATH", "CACHE", "OPEN", "REQUESTS", "WAITING", daemon.directory, "direct", "0", "0", "0"]
    where = tmp_path / "a place"
    where.mkdir()
    assert "one mount at a time" in simsr("mount", str(where), status=36)
    assert simsr("umount", daemon.directory) == f"{daemon.directory} is unmounted.\n"
    assert not is_mounted(daemon.directory) and simsr("mounts", "--json") == "[]\n"
    said = simsr("umount", daemon.directory, status=10)
    assert "no mount is called" in said and "'simsr mounts'" in said
    for path, reason in (
        (tmp_path / "none", "no such file or directory"), (tmp_path, "the directory is not empty"), ("/dev/null", "not a directory"),
    ):  # fmt: skip
        assert f"cannot mount at {path}: {reason}" in simsr("mount", str(path), status=36)
    assert "cache mode 'all'" in simsr("mount", str(where), "--cache", "all", status=2)
    try:
        simsr("mount", str(where), "--cache", "writeback", "--shared")
        assert oct(os.stat(where / "sr").st_mode) == "0o40550"
        with opened(str(where / "sr"), os.O_RDONLY) as fd:
            assert "in use" in simsr("umount", str(where), status=37)
            assert os.listdir(where / "sr")
            simsr("umount", "--lazy", str(where))
            with refused(errno.ENOTCONN):
                os.listdir(fd)
    finally:
        if is_mounted(str(where)):
            run("fusermount3", "-u", "-z", str(where))
    daemon.stop_cleanly()


def test_unmounted_by_somebody_else(daemon):
    disk, path = daemon.disk("left")
    run("fusermount3", "-u", daemon.directory)
    eventually(lambda: daemon.get("/v1/mounts") == [])
    assert daemon.api.post("/v1/mounts", json={"path": daemon.directory}).status_code == 201
    with opened(path) as fd:
        os.pwrite(fd, b"x", 0)
        run("fusermount3", "-u", "-z", daemon.directory)  # what is open stays usable
        assert os.pread(fd, 1, 0) == b"x"
        assert len(daemon.get("/v1/mounts")) == 1
    eventually(lambda: daemon.get("/v1/mounts") == [])
    daemon.stop_cleanly()


def test_a_mount_that_is_refused_at_the_start():
    with short_directory() as folder:
        os.makedirs(f"{folder}/m/full")
        done = subprocess.run(
            [sys.executable, "-m", "simsr.daemon.main", "--root", f"{folder}/r", "--mount", f"{folder}/m"], capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 36 and f"simsrd: cannot mount at {folder}/m: the directory is not empty" in done.stderr
        assert "Traceback" not in done.stderr
