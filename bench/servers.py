"""The servers under test, each a context manager that gives the URI of a fresh disk and leaves nothing behind.

Every server is a child in a session of its own, so that Ctrl-C reaches the benchmark only, which then ends its children
by their pids, in order. What they print goes to a log file next to their data and is quoted when they fail.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.failure import BenchFailure
from simsr.cli.client import Client

__all__ = ["OPTIONAL", "SERVERS", "Served", "qemu_nbd", "running", "serve", "simsrd"]

START_TIMEOUT_S = 120.0  # simsrd writes its first segments in advance
STOP_TIMEOUT_S = 30.0
PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """A server that runs, and its disk."""

    name: str
    uri: str


@contextlib.contextmanager
def simsrd(
    directory: Path,
    *options: str,
    new: bool = True,
    module: str = "simsr.daemon.main",
    environment: dict[str, str] | None = None,
) -> Iterator[Client]:
    """Run our daemon with ``options`` and give a client of its API; on a ``new``, empty root with one SR in it."""
    command = [sys.executable, "-m", module, "--root", str(directory), *options]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})}

    def is_ready(log: Path) -> bool:
        return "simsrd: ready" in log.read_text(errors="replace")

    with running("simsrd", command, directory, is_ready, environment):
        client = Client(str(directory / "control.sock"))
        try:
            if new:
                client.post("/v1/srs", {"name": "bench"})
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def _simsr(directory: Path, size_bytes: int) -> Iterator[str]:
    with simsrd(directory) as client:
        yield client.post("/v1/vdis", {"name": "bench", "size_bytes": size_bytes})["nbd_uri"]


@contextlib.contextmanager
def _nbdkit(directory: Path, size_bytes: int) -> Iterator[str]:
    path = directory / "nbd.sock"
    command = ["nbdkit", "--foreground", "--unix", str(path), "memory", str(size_bytes)]
    with running("nbdkit", command, directory, lambda log: _answers(path)):
        yield f"nbd+unix:///?socket={path}"


@contextlib.contextmanager
def _qemu(directory: Path, size_bytes: int, *options: str) -> Iterator[str]:
    path, image = directory / "nbd.sock", directory / "disk.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", str(image), str(size_bytes)]
    with _installed(create):
        created = subprocess.run(create, capture_output=True, text=True)
    if created.returncode:
        raise BenchFailure(f"qemu-img cannot create {image}: {created.stderr.strip()}")
    with qemu_nbd(image, path, *options) as uri:
        yield uri


@contextlib.contextmanager
def qemu_nbd(image: Path, path: Path, *options: str) -> Iterator[str]:
    """Serve a qcow2 image on the socket ``path``."""
    command = ["qemu-nbd", "--persistent", "--format=qcow2", "--cache=writeback", *options, f"--socket={path}", str(image)]
    with running("qemu-nbd", command, image.parent, lambda log: _answers(path)):
        yield f"nbd+unix:///?socket={path}"


@contextlib.contextmanager
def _qemu_uring(directory: Path, size_bytes: int) -> Iterator[str]:
    with _qemu(directory, size_bytes, "--aio=io_uring") as uri:
        yield uri


SERVERS: dict[str, Callable[[Path, int], contextlib.AbstractContextManager[str]]] = {
    "simsr": _simsr,
    "nbdkit": _nbdkit,
    "qemu": _qemu,
    "qemu-uring": _qemu_uring,
}
OPTIONAL = frozenset({"qemu-uring"})
"""Servers that a machine may be unable to run; the comparison goes on without them."""


@contextlib.contextmanager
def serve(name: str, directory: Path, size_bytes: int) -> Iterator[Served]:
    """Run the server called ``name`` with its data in ``directory``, which must be empty and have a short path."""
    with SERVERS[name](directory, size_bytes) as uri:
        yield Served(name, uri)


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    directory: Path,
    is_ready: Callable[[Path], bool],
    environment: dict[str, str] | None = None,
) -> Iterator[None]:
    """Run a server from when ``is_ready``, which is given the path of its log, until the end of the block."""
    log = directory / "log"
    with open(log, "wb") as output, _installed(command):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        give_up = time.monotonic() + START_TIMEOUT_S
        while not is_ready(log):
            if process.poll() is not None or time.monotonic() > give_up:
                how = "did not start in time" if process.returncode is None else f"ended with {process.returncode}"
                said = "; ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
                raise BenchFailure(f"{name} {how}: {said or 'it said nothing'}")
            time.sleep(0.02)
        yield
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"bench: {process.args[0]} did not stop and was killed", file=sys.stderr)  # type: ignore[index]
        process.kill()
        process.wait()


@contextlib.contextmanager
def _installed(command: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BenchFailure(f"{command[0]} is not installed; script/setup installs it") from None


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0
