"""A disk that hangs, or fails, harms nobody else; and nothing keeps the mount from ending."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_tools import short_directory
from fuse_kit import MIB, fuse_is_there, is_mounted, opened, refused
from fuse_server import UUIDS

pytestmark = fuse_is_there


class Server:
    """The process of fuse_server.py."""

    def __init__(self, folder: str, cache: str) -> None:
        self.directory = f"{folder}/m"
        os.mkdir(self.directory)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fuse_server.py"), self.directory, cache], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()

    def path(self, name: str) -> str:
        return f"{self.directory}/sr/{UUIDS[name]}.raw"

    def hang(self) -> None:
        Path(self.directory + ".hang").touch()

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Ask it to end; returns what it complained about."""
        _, complaints = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, complaints
        assert not is_mounted(self.directory)
        return complaints


@pytest.fixture(params=["direct", "writeback"])
def server(request) -> Iterator[Server]:
    with short_directory() as folder:
        started = Server(folder, request.param)
        try:
            yield started
        finally:
            if started.process.poll() is None:
                started.process.kill()
                started.process.communicate()
            while is_mounted(started.directory):
                subprocess.run(["fusermount3", "-u", "-z", started.directory], check=True)


class Attempt(threading.Thread):
    """Something that may hang, in a thread."""

    def __init__(self, what) -> None:
        super().__init__(daemon=True)
        self.what, self.result = what, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.what()
        except OSError as error:
            self.result = error.errno


def test_a_disk_that_hangs(server):
    with opened(server.path("hangs")) as fd, opened(server.path("good")) as good:
        server.hang()
        attempts = [Attempt(lambda n=n: os.pread(fd, 4096, n * 8192)) for n in range(30)]
        attempts.append(Attempt(lambda: os.fsync(fd)))
        attempts[0].join(0.2)
        for number in range(50):  # all else goes on
            os.pwrite(good, bytes([number]) * 4096, 0)
            os.fsync(good)
            assert os.pread(good, 4096, 0) == bytes([number]) * 4096
        assert len(os.listdir(f"{server.directory}/sr")) == 5
        assert os.stat(server.path("hangs")).st_size == MIB
        assert os.statvfs(server.directory).f_blocks
        assert all(attempt.is_alive() for attempt in attempts[:-1])
        server.tell("changed hangs")  # waits until the reads have ended, and harms nobody meanwhile
        assert os.pread(good, 1, 0) == b"\x31"
        complaints = server.end()
        for attempt in attempts:
            attempt.join(120)
            assert attempt.result in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        with refused(errno.ENOTCONN):
            os.fsync(good)
        assert "unmounted from its directory" in complaints and "Traceback" not in complaints


def test_a_disk_that_fails_and_a_bug(server):
    with opened(server.path("fails")) as fd:
        with refused(errno.EIO):
            os.pread(fd, 4096, 0)
        with refused(errno.EIO):
            os.pwrite(fd, b"x" * 4096, 0)
            os.fsync(fd)
    with opened(server.path("good")) as fd:
        assert os.pwrite(fd, b"fine", 0) == 4
    assert os.listdir(f"{server.directory}/sr")
    assert "a bug in simsr" in server.end()


def test_clients_that_are_killed(server):
    """Their requests may be withdrawn between poll and read; then nobody must wait for the next one."""
    reader = "import os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nprint(flush=True)\nwhile True: os.pread(fd, 4096, 0); os.stat(sys.argv[1])"
    for _ in range(6):
        clients = [
            subprocess.Popen([sys.executable, "-S", "-c", reader, server.path("good")], stdout=subprocess.PIPE) for _ in range(3)
        ]
        for client in clients:
            client.stdout.read(1)
        for client in clients:
            client.kill()
        for client in clients:
            client.communicate()
        assert len(os.listdir(f"{server.directory}/sr")) == 5
    assert server.end() == ""


def test_what_was_changed_is_read_anew(server):
    with opened(server.path("good"), os.O_RDONLY) as fd:
        assert os.pread(fd, 4, 0) == bytes(4)
        server.tell("changed good")
        assert server.process.stdout.readline() == "told good\n"
        assert os.pread(fd, 4, 0) == bytes(4)
    assert server.end() == ""
