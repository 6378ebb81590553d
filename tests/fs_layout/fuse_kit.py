"""A daemon with its VDIs mounted, and what tests do with the files: real programs, in processes of their own."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import nbd
import pytest
from daemon_tools import Simsrd, short_directory

__all__ = [
    "MIB", "Mounted", "aligned", "eventually", "fuse_is_there", "is_mounted", "loop_device", "mounted_daemon", "needs_loop", "opened",
    "refused", "run",
]  # fmt: skip

MIB = 1 << 20
RUN_TIMEOUT_S = 120

fuse_is_there = pytest.mark.skipif(
    not (os.access("/dev/fuse", os.W_OK) and shutil.which("fusermount3") and importlib.util.find_spec("pyfuse3")),
    reason="needs /dev/fuse, fusermount3 and pyfuse3",
)
needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="only root can set up loop devices, where there are any"
)


def run(*command: str, status: int = 0, stdin_bytes: bytes = b"") -> str:
    """Run a program, which must end with ``status``; returns what it printed, errors included."""
    done = subprocess.run(
        command, input=stdin_bytes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_TIMEOUT_S, check=False,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    said = done.stdout.decode(errors="replace")
    assert done.returncode == status, f"{' '.join(command)} ended with {done.returncode}:\n{said}"
    return said


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDWR) -> Iterator[int]:
    """An open file; the file system may be gone when it is closed."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """What is done here must fail with that errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, caught.value


def eventually(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


def is_mounted(path: str) -> bool:
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split(" ")[4] == path for line in mounts)


class Mounted(Simsrd):
    """A daemon with the mount `directory` and the SR ``sr``."""

    def __init__(self, folder: str, *options: str) -> None:
        self.directory, self.is_cached = f"{folder}/m", "writeback" in options
        os.makedirs(self.directory, exist_ok=True)
        super().__init__(f"{folder}/r", "--mount", self.directory, *options)

    def disk(self, name: str, size_bytes: int = 32 * MIB) -> tuple[dict, str]:
        """A new disk and the path of its file."""
        vdi = self.create_vdi(size_bytes, name, sr="sr")
        return vdi, self.path(vdi)

    def path(self, vdi: dict) -> str:
        return f"{self.directory}/sr/{'snapshots/' if vdi['is_a_snapshot'] else ''}{vdi['uuid']}.raw"

    def show(self, vdi: dict) -> dict:
        return self.get(f"/v1/vdis/{vdi['uuid']}")

    def snapshot(self, vdi: dict, **more: object) -> dict:
        return self.post(f"/v1/vdis/{vdi['uuid']}/snapshot", **more)

    def revert(self, snapshot: dict) -> dict:
        return self.post(f"/v1/vdis/{snapshot['uuid']}/revert")

    def until_unused(self, vdi: dict) -> None:
        """A file that was closed is let go of a moment later."""
        eventually(lambda: not self.show(vdi)["attached"])

    @contextlib.contextmanager
    def nbd(self, vdi: dict) -> Iterator[nbd.NBD]:
        """An NBD connection to a disk."""
        handle = nbd.NBD()
        handle.connect_uri(vdi["nbd_uri"])
        try:
            yield handle
        finally:
            handle.shutdown()

    def stop_cleanly(self, number: int = signal.SIGTERM) -> None:
        super().stop_cleanly(number)
        assert not is_mounted(self.directory)

    def end(self) -> None:
        super().end()
        while is_mounted(self.directory):  # whatever went wrong, nothing stays mounted
            subprocess.run(["fusermount3", "-u", "-z", self.directory], check=True)


@contextlib.contextmanager
def mounted_daemon(*options: str) -> Iterator[Mounted]:
    """Run a daemon, which must end cleanly and leave nothing mounted."""
    with short_directory() as folder, Mounted(folder, *options) as daemon:
        daemon.create_sr("sr")
        yield daemon


@contextlib.contextmanager
def loop_device(path: str, *options: str) -> Iterator[str]:
    """A loop device on a file; gone afterwards."""
    device = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        eventually(lambda: device not in run("losetup", "--list", "--output", "NAME"))


def aligned(size_bytes: int) -> memoryview:
    """Memory at a page boundary, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, size_bytes))
